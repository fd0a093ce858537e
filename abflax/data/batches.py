"""Training data from a loader of one's own: whatever yields batches, read pass after pass."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from abflax.data.augmentation import Preprocessing
from abflax.data.dataset import Dataset
from abflax.data.image_files import checked_classes, exactly_named, with_digest
from abflax.errors import InputError, brief, require_instances

_NOTHING = Preprocessing()


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Training data that a loader yields, batch by batch.

    A batch is a dict of "image" `[batch, height, width, channels]`, uint8 or floating, and "label",
    integers `[batch]` in `[0, num_classes)`: NumPy arrays, or what NumPy can read. All are of one
    size. `iter` starts a pass over the data, and is called again when the pass has ended. A Grain
    `DataLoader` or dataset, a PyTorch `DataLoader`, `tfds.as_numpy(…)` and your own class work.

    Iterators with `get_state()` and `set_state(state)`, such as Grain's, are checkpointed: a run
    that was stopped resumes with the same bits. The state is bytes or plain JSON values, and must
    determine all batches to come. A run on other iterators starts another pass when it is resumed,
    and its record says so.

    Attributes:
      loader: the loader, or a function without arguments that returns an iterator.
      num_classes: the number of classes.
      epoch: how many batches count as an epoch; None: `len(loader)`.
      preprocessing: normalization, crops and flips on the device; by default none.
      name: in records; a digest of shapes and settings is added, and of the first batch where two
        passes begin with the same. What comes after it is not known before it is read.
      batch_size: the first batch's, read when this is made.
      image_shape: of the first batch's images, likewise.
      dtype: of the first batch's images, likewise.
      resumes: whether iterators are checkpointed.
      known_by: what loaders are compared by, in a message.

    Raises:
      ValueError: if the loader cannot be iterated twice, or its first batch is not valid.

    Example:
      >>> images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4)
      >>> def loader():
      ...     for part in (slice(0, 2), slice(2, 4)):
      ...         yield {"image": images[part], "label": labels[part]}
      >>> data = Batches(loader, num_classes=4, epoch=2)
      >>> data.batch_size, data.image_shape, len(data), data.resumes
      (2, (8, 8, 1), 4, False)
    """

    loader: Iterable[Any] | Callable[[], Iterator[Any]]
    num_classes: int
    epoch: int | None = None
    preprocessing: Preprocessing = _NOTHING
    name: str = "custom"
    batch_size: int = dataclasses.field(init=False)
    image_shape: tuple[int, int, int] = dataclasses.field(init=False)
    dtype: np.dtype[Any] = dataclasses.field(init=False)
    resumes: bool = dataclasses.field(init=False)
    known_by: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        require_instances({
            "preprocessing": (self.preprocessing, Preprocessing), "name": (self.name, str),
        })  # fmt: skip
        iterator = self.begin()
        images, labels = _arrays(next(iterator, None))
        if images.ndim != 4 or 0 in images.shape or labels.shape != images.shape[:1]:
            raise InputError(
                "a loader's batch needs images [batch, height, width, channels] and labels "
                f"[batch]; got {images.shape} and {labels.shape}"
            )
        if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images must be uint8 or floating, not {images.dtype}")
        self.preprocessing.require_fits(images.shape[1:])
        own = {"batch_size": len(images), "image_shape": images.shape[1:], "dtype": images.dtype}
        own["resumes"] = hasattr(iterator, "get_state") and hasattr(iterator, "set_state")
        own["epoch"] = _epoch(self.loader) if self.epoch is None else self.epoch
        if type(own["epoch"]) is not int or own["epoch"] < 1:
            raise InputError(f"epoch is a number of batches, at least 1, not {brief(own['epoch'])}")
        for name, value in own.items():
            object.__setattr__(self, name, value)
        self.require_batch(images, labels)
        facts = (images.shape, str(images.dtype), self.num_classes, self.epoch, self.preprocessing)
        sha = hashlib.sha256(repr(facts).encode())
        if self.resumes:
            encode_position(iterator)  # raises where the state cannot be saved
        again = _arrays(next(self.begin(), None))
        same = np.array_equal(images, again[0]) and np.array_equal(labels, again[1])
        if same:
            sha.update(images.tobytes() + labels.tobytes())
        known_by = "its first batch alone" if same else "the shapes of its batches alone"
        object.__setattr__(self, "known_by", known_by)
        exactly_named(self, with_digest(self.name, sha))

    def __len__(self) -> int:
        """How many examples count as an epoch."""
        assert self.epoch is not None
        return self.epoch * self.batch_size

    def begin(self) -> Iterator[Any]:
        """Begins a pass over the data."""
        if isinstance(self.loader, Iterable):
            iterator = iter(self.loader)
            if iterator is self.loader:
                raise InputError(
                    f"the loader is a {type(iterator).__name__}, which gives its batches only "
                    "once: give what makes it, a function without arguments"
                )
            return iterator
        if not callable(self.loader):
            raise InputError(f"the loader yields no batches: it is {brief(self.loader)}")
        try:
            inspect.signature(self.loader).bind()
        except TypeError as error:
            raise InputError(f"the loader must be a function without arguments: {error}") from None
        batches = self.loader()
        if not isinstance(batches, Iterable):
            raise InputError(f"the loader's function must return an iterator, not {brief(batches)}")
        return iter(batches)

    def require_batch(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Raises `InputError` for a batch that is not as the first one, or with a wrong label."""
        shape = (self.batch_size, *self.image_shape)
        if images.shape != shape or images.dtype != self.dtype or labels.shape != shape[:1]:
            raise InputError(
                f"the loader's first batch has images {shape} of {self.dtype}, another one "
                f"{images.shape} of {images.dtype} with labels {labels.shape}: let it drop what is "
                "left over"
            )
        checked_classes(labels, self.num_classes)

    def read(self) -> Dataset:
        """Reads one pass into memory, such as that of held-out data; its last batch may be short.

        Raises:
          ValueError: if there is a batch that does not fit the others.
        """
        parts = [_arrays(batch) for batch in self.begin()]
        images, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Dataset(images, labels, self.num_classes, self.preprocessing, self.name)


class BatchReader:
    """Reads a loader's batches, pass after pass.

    Attributes:
      step: how many batches have been read, or the step that was sought.
    """

    def __init__(self, data: Batches) -> None:
        self._data, self._iterator, self.step = data, data.begin(), 0

    @property
    def position(self) -> str | None:
        """Where the next batch is, as text; None where that is not known."""
        return encode_position(self._iterator) if self._data.resumes else None

    def seek(self, step: int, position: str | None) -> None:
        """Goes to a step whose position is given; without one, begins another pass."""
        self._iterator, self.step = self._data.begin(), step
        if position is not None:
            iterator: Any = self._iterator
            iterator.set_state(_decode(position))

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """The next images and labels.

        Raises:
          ValueError: if a pass has no batch, or the batch is not as the first one.
        """
        batch = next(self._iterator, None)
        if batch is None:
            self._iterator = self._data.begin()
            batch = next(self._iterator, None)
        images, labels = _arrays(batch)
        self._data.require_batch(images, labels)
        self.step += 1
        return images, labels


def encode_position(iterator: Any) -> str:
    """An iterator's state as text. Raises `InputError` if it is neither bytes nor JSON."""
    state = iterator.get_state()
    if isinstance(state, bytes):
        return json.dumps({"bytes": base64.b64encode(state).decode()})
    try:
        return json.dumps({"json": state}, default=lambda scalar: scalar.tolist())
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            "the state of the loader's iterator must be bytes or plain JSON values, not "
            f"{brief(state)}"
        ) from None


def _decode(position: str) -> Any:
    found = json.loads(position)
    return base64.b64decode(found["bytes"]) if "bytes" in found else found["json"]


def _epoch(loader: Any) -> Any:
    try:
        return len(loader)
    except TypeError:
        raise InputError(
            "the loader has no length: say how many batches count as an epoch (epoch)"
        ) from None


def _arrays(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a batch."""
    if batch is None:
        raise InputError("the loader yields no batch")
    if not isinstance(batch, Mapping) or not {"image", "label"} <= batch.keys():
        got = sorted(map(str, batch)) if isinstance(batch, Mapping) else brief(batch)
        raise InputError(f'a loader must yield {{"image": …, "label": …}}, not {got}'[:300])
    try:
        return np.asarray(batch["image"]), np.asarray(batch["label"])
    except (TypeError, ValueError) as error:
        raise InputError(f"a batch's images or labels are no arrays: {error}"[:300]) from error
