"""Describes a data set of encoded images of any size, which are read and decoded when needed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from typing import Any, TypeVar

import numpy as np

from abflax.data.augmentation import Preprocessing
from abflax.data.decoding import ImageSource
from abflax.errors import InputError, brief

IMAGENET = Preprocessing(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), flip=True)
"""The mean and standard deviation of ImageNet's training images, which published networks use."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Encoded images with labels; only the labels are in memory.

    Training uses a different random crop of each example in each epoch (`decoding.random_crop`)
    and mirrors half of them. Evaluation uses the center of an image (`decoding.centre_crop`).

    Attributes:
      places: the location of each image: a file, or (folder of a prepared TFDS data set, split,
        record).
      labels: integers `[examples]` in `[0, num_classes)`.
      classes: the names of the classes.
      name: the name in records: what was given, and a digest of all the other fields, where a file
        counts by its path, size and time. Only what the library reads or selects itself has a name
        without one, which identifies the contents as well.
      side: height and width of the network's input, in pixels.
      preprocessing: mean and standard deviation, by default ImageNet's, and whether images are
        mirrored. Padding is not allowed, since random crops replace it.

    Raises:
      ValueError: if there is no example, a label is out of range, or the preprocessing pads.
    """

    places: tuple[ImageSource, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    side: int = 224
    preprocessing: Preprocessing = IMAGENET

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels)
        if not self.places or labels.shape != (len(self.places),):
            raise InputError(
                f"at least one image and a label for each are needed; there are {len(self.places)} "
                f"images and labels of shape {labels.shape}"
            )
        checked_classes(labels, self.num_classes)
        if self.side < 1:
            raise InputError(f"the side of the network's input must be above 0, not {self.side}")
        self.preprocessing.require_fits(self.image_shape)
        if self.preprocessing.pad:
            raise InputError("image files are cropped as they are decoded, and are not padded")
        labels = labels.astype(np.int32)
        labels.flags.writeable = False
        object.__setattr__(self, "labels", labels)
        places = [(place, _state(place)) for place in self.places]
        facts = (places, labels.tolist(), self.classes, self.side, self.preprocessing)
        name = with_digest(self.name, hashlib.sha256(repr(facts).encode()))
        object.__setattr__(self, "name", name)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the network's input."""
        return self.side, self.side, 3

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the decoded images."""
        return np.dtype(np.uint8)

    def take(self, indices: np.ndarray, name: str | None = None) -> ImageFiles:
        """Selects examples; the name contains a digest of the old name and the indices."""
        indices = np.asarray(indices)
        places = tuple(self.places[int(index)] for index in indices)
        taken = dataclasses.replace(self, places=places, labels=self.labels[indices])
        sha = hashlib.sha256(self.name.encode() + indices.astype(np.int64).tobytes())
        return exactly_named(taken, with_digest(name or self.name, sha))


_F = TypeVar("_F")


def exactly_named(data: _F, name: str) -> _F:
    """Renames a data set that was made just now, where the name alone identifies its contents."""
    object.__setattr__(data, "name", name)
    return data


def with_digest(label: str, sha: Any) -> str:
    """A name of a label and twelve digits of a digest, which replace those that are there."""
    return f"{re.sub('-[0-9a-f]{12}$', '', label)}-{sha.hexdigest()[:12]}"


def _state(place: ImageSource) -> tuple[int, int] | None:
    """Size and time of an image's file; None if it has none of its own."""
    try:
        found = os.stat(place) if isinstance(place, str) else None
    except OSError:
        return None
    return found and (found.st_size, found.st_mtime_ns)


def checked_classes(labels: np.ndarray, num_classes: int | None) -> int:
    """Checks labels and returns the number of classes, by default the largest label + 1."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels must be integers, not {labels.dtype}")
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if type(classes) is not int or classes < 1:
        raise InputError(f"num_classes must be a whole number above 0, not {brief(classes)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels must lie in [0, {classes}), but reach from {labels.min()} to {labels.max()}"
        )
    return classes
