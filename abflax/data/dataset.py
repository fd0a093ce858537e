"""Holds a data set in memory, and selects class-balanced subsets of any data set."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax.numpy as jnp
import numpy as np

from abflax.data.augmentation import Preprocessing
from abflax.data.image_files import ImageFiles, checked_classes, exactly_named, with_digest
from abflax.errors import InputError

if TYPE_CHECKING:
    from abflax.data import TrainData

_NOTHING = Preprocessing()


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Dataset:
    """Images and labels in host memory.

    The arrays are the data set's own: read-only arrays are shared, others are copied.

    Attributes:
      images: `[examples, height, width, channels]`, uint8 or floating.
      labels: integers `[examples]` in `[0, num_classes)`; −1 throughout where none are given.
      num_classes: by default the largest label + 1; 0 where there are no labels.
      preprocessing: normalization and augmentation; by default none.
      name: the name in records: what was given ("custom" by default), and a digest of all the
        above. Only what the library loads or selects itself has a name without one.

    Raises:
      ValueError: if shapes or dtypes do not fit, there is no example, a label is out of range, a
        pixel is NaN or infinite, or the preprocessing does not fit the images.

    Examples:
      >>> data = Dataset(np.zeros((6, 8, 8, 1), np.uint8), np.array([0, 0, 0, 0, 1, 1]))
      >>> len(data), data.image_shape, data.num_classes
      (6, (8, 8, 1), 2)
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    preprocessing: Preprocessing
    name: str

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        num_classes: int | None = None,
        preprocessing: Preprocessing = _NOTHING,
        name: str | None = None,
    ) -> None:
        unlabelled = labels is None and num_classes is None
        if type(num_classes) is int and num_classes == 0:  # `dataclasses.replace` of one without
            unlabelled = bool((np.asarray(labels) == -1).all())
        images = np.asarray(images)
        labels = np.full(images.shape[:1], -1) if unlabelled else np.asarray(labels)
        if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images):
            raise InputError(
                "a data set needs images [examples, height, width, channels] and labels "
                f"[examples], at least one; got {images.shape} and {labels.shape}"
            )
        if 0 in images.shape:
            raise InputError(f"images need height, width and channels, not {images.shape}")
        if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images must be uint8 or floating, not {images.dtype}")
        classes = 0 if unlabelled else checked_classes(labels, num_classes)
        if images.dtype != np.uint8 and not np.isfinite(images).all():
            bad = int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
            raise InputError(f"image {bad} has a pixel that is NaN or infinite")
        preprocessing.require_fits(images.shape[1:])
        images, labels = _own(images), labels.astype(np.int32)
        labels.flags.writeable = False
        facts = (images.shape, str(images.dtype), classes, preprocessing)
        sha = hashlib.sha256(repr(facts).encode())
        sha.update(np.ascontiguousarray(images).view(np.uint8).data)  # bfloat16 has none
        sha.update(labels.data)
        fields = (images, labels, classes, preprocessing, with_digest(name or "custom", sha))
        for field, value in zip(dataclasses.fields(self), fields, strict=True):
            object.__setattr__(self, field.name, value)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.images.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the images."""
        return self.images.dtype

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns {"images", "labels"}, as they are copied to the devices.

        Each image is a row. A TPU would pad its last dimensions, the width and three channels.
        """
        return {"images": self.images.reshape(len(self), -1), "labels": self.labels}

    def take(self, indices: np.ndarray, name: str | None = None) -> Dataset:
        """Selects examples; the name contains a digest of the contents."""
        images, labels = self.images[indices], self.labels[indices]
        images.flags.writeable = False
        if not self.num_classes:
            return Dataset(images, preprocessing=self.preprocessing, name=name)
        return Dataset(images, labels, self.num_classes, self.preprocessing, name)


@dataclasses.dataclass(frozen=True)
class DataSets:
    """The data that a run is given.

    Attributes:
      train: the training data.
      test: held-out data; None: nothing is measured.
      target: unlabelled images of another domain; None: there are none.
    """

    train: TrainData
    test: Dataset | ImageFiles | None = None
    target: Dataset | None = None


def _own(array: np.ndarray) -> np.ndarray:
    """The array itself if nobody can write to its memory, else a read-only copy."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and not owner.flags.writeable:
        owner = owner.base
    if owner is None or isinstance(owner, bytes):
        return array
    array = array.copy()
    array.flags.writeable = False
    return array


_D = TypeVar("_D", Dataset, ImageFiles, Dataset | ImageFiles)


def subset(dataset: _D, fraction: float, seed: int) -> _D:
    """Selects round(fraction · size) examples of each class, but at least one.

    The subset is a function of (dataset, fraction, seed) alone, so all methods with the same seed
    use the same examples. A smaller fraction's subset is contained in a larger one's. The subset's
    name describes it.

    Raises:
      ValueError: unless 0 < fraction <= 1.

    Examples:
      Half of each class:

      >>> data = Dataset(np.zeros((6, 8, 8, 1)), np.array([0, 0, 0, 0, 1, 1]))
      >>> subset(data, 0.5, seed=0).labels.tolist()
      [0, 0, 1]
    """
    if not 0 < fraction <= 1:
        raise InputError(f"the fraction of the training data must be in (0, 1], not {fraction}")
    if fraction == 1:
        return dataset
    name = f"{dataset.name}, {float(fraction)} of each class by seed {seed}"
    return exactly_named(dataset.take(_balanced(dataset, fraction, seed)), name)


def few_shot_subset(dataset: _D, per_class: int, seed: int) -> _D:
    """Selects `per_class` examples of each class, or all if a class has fewer.

    The subset is a function of (dataset, per_class, seed) alone. A smaller number's subset is
    contained in a larger one's. The subset's name describes it.

    Raises:
      ValueError: unless per_class >= 1.

    Examples:
      >>> data = Dataset(np.zeros((6, 8, 8, 1)), np.array([0, 0, 0, 0, 1, 1]))
      >>> few_shot_subset(data, 3, seed=0).labels.tolist()
      [0, 0, 0, 1, 1]
    """
    if per_class < 1:
        raise InputError(f"of each class at least 1 example is needed, not {per_class}")
    name = f"{dataset.name}, {per_class} of each class by seed {seed}"
    return exactly_named(dataset.take(_of_each(dataset, lambda size: per_class, seed)), name)


def holdout(dataset: _D, share: float, seed: int) -> tuple[_D, _D]:
    """Splits training data into a training set and a class-balanced validation set.

    Of each class, round(share · size) examples are held out, but at least one. A search evaluates
    on the validation set and does not use the test set. The names of both parts describe the split.

    Raises:
      ValueError: unless 0 < share < 1, and every class has training data left.
    """
    if not 0 < share < 1:
        raise InputError(f"the share held out must be between 0 and 1, not {share}")
    validation = _balanced(dataset, share, seed)
    training = np.setdiff1d(np.arange(len(dataset)), validation)
    if set(dataset.labels[validation]) - set(dataset.labels[training]):
        raise InputError(f"holding out {share} of the data leaves a class without training data")
    name = f"{dataset.name}, {float(share)} held out by seed {seed}"
    return (
        exactly_named(dataset.take(training), name),
        exactly_named(dataset.take(validation), f"validation of {name}"),
    )


def _balanced(dataset: Dataset | ImageFiles, fraction: float, seed: int) -> np.ndarray:
    """Draws the sorted indices of a share of each class, at least one example of each."""
    return _of_each(dataset, lambda size: max(1, round(fraction * size)), seed)


def _of_each(dataset: Dataset | ImageFiles, count: Callable[[int], int], seed: int) -> np.ndarray:
    """Draws the sorted indices of `count(size)` examples of each class."""
    shuffled = np.random.default_rng(seed).permutation(len(dataset))
    chosen = []
    for label in range(dataset.num_classes):
        members = shuffled[dataset.labels[shuffled] == label]
        if len(members):
            chosen.append(members[: count(len(members))])
    return np.sort(np.concatenate(chosen))
