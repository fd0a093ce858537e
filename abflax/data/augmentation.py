"""Augmentation and normalisation on the device; pure functions of images and keys."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from abflax.errors import InputError
from abflax.settings import require_types


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a data set's images go through before a network sees them.

    Attributes:
      mean, std: per channel (or one for all), in the units of the stored pixels.
      pad: reflect-padding before a random crop back to the original size, in pixels.
      flip: whether half of the images are mirrored left to right.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        require_types(self)
        if not self.mean or not self.std or min(self.std) <= 0 or self.pad < 0:
            raise InputError(f"mean and std need entries, std above 0 and pad at least 0: {self}")

    def require_fits(self, image_shape: tuple[int, ...]) -> None:
        """Raises `InputError` where it is not for images of that shape."""
        height, width, channels = image_shape
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, channels):
                raise InputError(
                    f"{name} has {len(getattr(self, name))} entries for {channels} channels"
                )
        if self.pad >= min(height, width):
            raise InputError(
                f"images of {height}×{width} cannot be padded by {self.pad} in reflection"
            )


def normalise(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """(pixel − mean) / std, in the default floating dtype: float32, or float64 under x64.

    Args:
      images: `[..., height, width, channels]`, of any dtype.
      preprocessing: `mean` and `std` broadcast over the channels.
    """
    dtype = jnp.result_type(float)
    mean = jnp.asarray(preprocessing.mean, dtype)
    return (images.astype(dtype) - mean) / jnp.asarray(preprocessing.std, dtype)


def augment(
    images: jax.Array,
    examples: jax.Array,
    epochs: jax.Array,
    key: jax.Array,
    preprocessing: Preprocessing,
) -> jax.Array:
    """Random crop and flip, keyed by (key, epoch, example) and by nothing else.

    So the number of devices, and what else is in the batch, change nothing.

    Args:
      images: `[batch, height, width, channels]`.
      examples: `[batch]`, each image's index in the data set.
      epochs: `[batch]`, which pass over the data it is.
      key: the run's augmentation key.
      preprocessing: `pad` and `flip`.

    Returns:
      Images of the same shape and dtype.
    """
    pad = preprocessing.pad
    if not pad and not preprocessing.flip:
        return images
    around = [(0, 0), (pad, pad), (pad, pad), (0, 0)]
    padded = jnp.pad(images, around, mode="reflect") if pad else images

    def one(image: jax.Array, example: jax.Array, epoch: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, epoch), example)
        limits = jnp.array([2 * pad + 1, 2 * pad + 1, 1 + preprocessing.flip], jnp.int32)
        row, column, mirrored = jax.random.randint(own, (3,), 0, limits, jnp.int32)
        crop = jax.lax.dynamic_slice(image, (row, column, jnp.zeros_like(row)), images.shape[1:])
        return jnp.where(mirrored, crop[:, ::-1], crop)

    return jax.vmap(one)(padded, examples, epochs)
