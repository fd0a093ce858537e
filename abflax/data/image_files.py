"""A data set of encoded images of any size, which are read and decoded when they are needed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from abflax.data.augmentation import Preprocessing
from abflax.data.decoding import ImageSource
from abflax.errors import InputError

IMAGENET = Preprocessing(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), flip=True)
"""Mean and deviation of ImageNet's training images, in pixels: what published networks have seen.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Encoded images with labels; only the labels are in memory.

    In training an example shows, in each epoch, another random crop (see
    `decoding.random_crop`) and is mirrored half of the time; held-out images show
    their centre (`decoding.centre_crop`).

    Attributes:
      places: where each image lies: a file, or (folder of a prepared TFDS data set, split, record).
      labels: integers `[examples]` in `[0, num_classes)`.
      classes: their names.
      name: how records call it; it must tell the contents.
      side: height and width of what a network sees, in pixels.
      preprocessing: mean and deviation, by default ImageNet's, and whether images are mirrored.
        The crops are these, so there is no padding.

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
                f"photographs need a label each, and at least one; there are {len(self.places)} "
                f"images and labels of shape {labels.shape}"
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"labels must be integers, not {labels.dtype}")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise InputError(
                f"labels must lie in [0, {self.num_classes}), but reach from {labels.min()} to "
                f"{labels.max()}"
            )
        if self.side < 1:
            raise InputError(f"the side of what a network sees must be above 0, not {self.side}")
        self.preprocessing.require_fits(self.image_shape)
        if self.preprocessing.pad:
            raise InputError("photographs are cropped as they are decoded, and are not padded")
        object.__setattr__(self, "labels", labels.astype(np.int32))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of what a network sees."""
        return self.side, self.side, 3

    def take(self, indices: np.ndarray, name: str | None = None) -> ImageFiles:
        """The examples of these indices; without a name, it is that of the whole and a digest."""
        indices = np.asarray(indices)
        if name is None:
            digest = hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest()[:12]
            name = f"{self.name}, {len(indices)} of them: {digest}"
        places = tuple(self.places[int(index)] for index in indices)
        return dataclasses.replace(self, places=places, labels=self.labels[indices], name=name)


def contents_name(what: str, labels: Sequence[int], digests: Sequence[str], side: int) -> str:
    """A name that tells contents: what they are called, a digest of labels and images, the side."""
    sha = hashlib.sha256()
    for label, digest in zip(labels, digests, strict=True):
        sha.update(f"{label} {digest}\n".encode())
    return f"{what}:{sha.hexdigest()[:12]}, {side}×{side}"
