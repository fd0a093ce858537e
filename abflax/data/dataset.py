"""A data set that fits in memory, and its class-balanced subsets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import jax.numpy as jnp
import numpy as np

from abflax.data.augmentation import Preprocessing
from abflax.errors import InputError

_NOTHING = Preprocessing()


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Dataset:
    """Images and labels, in host memory.

    Attributes:
      images: `[examples, height, width, channels]`, uint8 or floating.
      labels: integers `[examples]` in `[0, num_classes)`.
      num_classes: by default the largest label + 1.
      preprocessing: what the images go through; by default nothing.
      name: how records call it; by default a digest of the contents.

    Raises:
      ValueError: if shapes or dtypes do not fit, there is no example, a label is out of range, a
        pixel is NaN or infinite, or the preprocessing is not for such images.

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
        labels: np.ndarray,
        num_classes: int | None = None,
        preprocessing: Preprocessing = _NOTHING,
        name: str | None = None,
    ) -> None:
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim != 4 or labels.shape != images.shape[:1] or not len(images):
            raise InputError(
                "a data set needs images [examples, height, width, channels] and labels "
                f"[examples], at least one; got {images.shape} and {labels.shape}"
            )
        if 0 in images.shape:
            raise InputError(f"images need height, width and channels, not {images.shape}")
        if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images must be uint8 or floating, not {images.dtype}")
        if not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"labels must be integers, not {labels.dtype}")
        classes = int(labels.max()) + 1 if num_classes is None else num_classes
        if type(classes) is not int or classes < 1:
            raise InputError(f"num_classes must be a whole number above 0, not {classes!r}")
        if labels.min() < 0 or labels.max() >= classes:
            raise InputError(
                f"labels must lie in [0, {classes}), but reach from {labels.min()} to "
                f"{labels.max()}"
            )
        if images.dtype != np.uint8 and not np.isfinite(images).all():
            bad = int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
            raise InputError(f"image {bad} has a pixel that is NaN or infinite")
        preprocessing.require_fits(images.shape[1:])
        labels = labels.astype(np.int32)
        if name is None:
            facts = (images.shape, str(images.dtype), classes, preprocessing)
            sha = hashlib.sha256(repr(facts).encode())
            sha.update(images.tobytes())
            sha.update(labels.tobytes())
            name = f"custom-{sha.hexdigest()[:12]}"
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "num_classes", classes)
        object.__setattr__(self, "preprocessing", preprocessing)
        object.__setattr__(self, "name", name)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.images.shape[1:]

    def arrays(self) -> dict[str, np.ndarray]:
        """{"images", "labels"}, as the devices hold them."""
        return {"images": self.images, "labels": self.labels}

    def take(self, indices: np.ndarray, name: str | None = None) -> Dataset:
        """The examples of these indices; without a name, it is named by its contents."""
        images, labels = self.images[indices], self.labels[indices]
        return Dataset(images, labels, self.num_classes, self.preprocessing, name)


class Labelled(Protocol):
    """What `Dataset` and `ImageFiles` have in common."""

    @property
    def labels(self) -> np.ndarray:
        """Integers `[examples]` in `[0, num_classes)`."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""

    @property
    def name(self) -> str:
        """The name in records."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray, name: str | None = None) -> Self:
        """Selects examples."""


_D = TypeVar("_D", bound=Labelled)


def subset(dataset: _D, fraction: float, seed: int) -> _D:
    """A class-balanced share of a data set: of each class round(fraction · its size), at least 1.

    A function of (data, fraction, seed) alone, so all methods of a seed see the same examples; a
    smaller fraction's subset lies within a larger one's. The name stays: fraction and seed are
    part of a run's configuration.

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
    return dataset.take(_balanced(dataset, fraction, seed), dataset.name)


def few_shot_subset(dataset: _D, per_class: int, seed: int) -> _D:
    """A number of examples of each class; all of them where a class has fewer.

    As `subset`, a function of (data, number, seed), and a smaller number's lie within a larger
    one's.

    Raises:
      ValueError: unless per_class >= 1.

    Examples:
      >>> data = Dataset(np.zeros((6, 8, 8, 1)), np.array([0, 0, 0, 0, 1, 1]))
      >>> few_shot_subset(data, 3, seed=0).labels.tolist()
      [0, 0, 0, 1, 1]
    """
    if per_class < 1:
        raise InputError(f"of each class at least 1 example is needed, not {per_class}")
    return dataset.take(_of_each(dataset, lambda size: per_class, seed), dataset.name)


def holdout(dataset: _D, share: float, seed: int) -> tuple[_D, _D]:
    """Splits training data into what is trained on and a class-balanced validation set.

    A search measures on the validation set, so that the test set stays unseen. The names of both
    say how the data were split.

    Args:
      dataset: the training data.
      share: of each class, round(share · its size), at least 1, goes into the validation set.
      seed: of the split.

    Raises:
      ValueError: unless 0 < share < 1, and something of every class is left to train on.
    """
    if not 0 < share < 1:
        raise InputError(f"the share held out must be between 0 and 1, not {share}")
    held = _balanced(dataset, share, seed)
    fitted = np.setdiff1d(np.arange(len(dataset)), held)
    if set(dataset.labels[held]) - set(dataset.labels[fitted]):
        raise InputError(f"holding out {share} of the data leaves a class without training data")
    name = f"{dataset.name}, {share:g} held out by seed {seed}"
    return (
        dataset.take(fitted, name),
        dataset.take(held, f"validation of {name}"),
    )


def _balanced(dataset: Labelled, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a share of each class, at least one example of each."""
    return _of_each(dataset, lambda size: max(1, round(fraction * size)), seed)


def _of_each(dataset: Labelled, count: Callable[[int], int], seed: int) -> np.ndarray:
    """Sorted indices of as many examples of each class as `count` says for its size."""
    shuffled = np.random.default_rng(seed).permutation(len(dataset))
    chosen = []
    for label in range(dataset.num_classes):
        members = shuffled[dataset.labels[shuffled] == label]
        if len(members):
            chosen.append(members[: count(len(members))])
    return np.sort(np.concatenate(chosen))
