"""Augmentation and normalisation on the device; pure functions of images and keys."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_field_types


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a data set's images go through before a network sees them.

    Attributes:
      mean, std: per channel (or one for all), in the units of the stored pixels.
      pad: reflect-padding before a random crop back to the original size, in pixels.
      flip: whether half of the images are mirrored left to right.
      views: how many of its crops and flips an image ever shows; None: all of them.

    Raises:
      ValueError: if there are fewer views than that.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pad: int = 0
    flip: bool = False
    views: int | None = None

    def __post_init__(self) -> None:
        require_field_types(self)
        if not self.mean or not self.std or min(self.std) <= 0 or self.pad < 0:
            raise InputError(f"mean and std need entries, std above 0 and pad at least 0: {self}")
        if self.views is not None and not 1 <= self.views <= self.all_views:
            raise InputError(
                f"an image has {self.all_views} views (crops and flips), so there cannot be "
                f"{self.views}"
            )

    @property
    def all_views(self) -> int:
        """(2·pad + 1)² crops, each mirrored or not if `flip`."""
        return (2 * self.pad + 1) ** 2 * (1 + self.flip)

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


def normalize(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
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
      preprocessing: `pad`, `flip` and `views`.

    Returns:
      Images of the same shape and dtype.
    """
    if preprocessing.views is not None:
        chosen = draw_views(examples, epochs, key, preprocessing.views)
        return view(images, examples, chosen, preprocessing)
    limits = jnp.array(_limits(preprocessing), jnp.int32)

    def corner(example: jax.Array, epoch: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, epoch), example)
        return jax.random.randint(own, (3,), 0, limits, jnp.int32)

    return _crop(images, jax.vmap(corner)(examples, epochs), preprocessing)


def draw_views(examples: jax.Array, epochs: jax.Array, key: jax.Array, views: int) -> jax.Array:
    """Which of its views each example shows, `[batch]` in [0, views); arguments as `augment`'s."""

    def one(example: jax.Array, epoch: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, epoch), example)
        return jax.random.randint(own, (), 0, views, jnp.int32)

    return jax.vmap(one)(examples, epochs)


def view(
    images: jax.Array, examples: jax.Array, chosen: jax.Array, preprocessing: Preprocessing
) -> jax.Array:
    """The chosen views of some images.

    View v of an example is the v-th of a random order of all its crops and flips that depends on
    the example alone, so every run, whatever its seed, has the same ones.

    Args:
      images: `[batch, height, width, channels]`.
      examples: `[batch]`, each image's index in the data set.
      chosen: `[batch]`, the number of the view.
      preprocessing: `pad` and `flip`.
    """
    limits = _limits(preprocessing)

    def corner(example: jax.Array, chosen: jax.Array) -> jax.Array:
        order = jax.random.permutation(
            jax.random.fold_in(jax.random.key(0), example), preprocessing.all_views
        )
        return jnp.stack(jnp.unravel_index(order[chosen], limits)).astype(jnp.int32)

    return _crop(images, jax.vmap(corner)(examples, chosen), preprocessing)


def _limits(preprocessing: Preprocessing) -> tuple[int, int, int]:
    """How many rows, columns and mirrorings there are."""
    places = 2 * preprocessing.pad + 1
    return places, places, 1 + preprocessing.flip


def _crop(images: jax.Array, corners: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Each padded image from its (row, column), mirrored where the third number says so."""
    pad = preprocessing.pad
    if not pad and not preprocessing.flip:
        return images
    around = [(0, 0), (pad, pad), (pad, pad), (0, 0)]
    padded = jnp.pad(images, around, mode="reflect") if pad else images

    def one(image: jax.Array, corner: jax.Array) -> jax.Array:
        row, column, mirrored = corner
        crop = jax.lax.dynamic_slice(image, (row, column, jnp.zeros_like(row)), images.shape[1:])
        return jnp.where(mirrored, crop[:, ::-1], crop)

    return jax.vmap(one)(padded, corners)
