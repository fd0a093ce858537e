"""Augments and normalizes images on the device, by pure functions of images and keys."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from abflax.errors import InputError, brief, require_field_types


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The normalization and augmentation of a data set's images.

    Attributes:
      mean: per channel (or one for all), in the units of the stored pixels.
      std: the standard deviation, likewise.
      pad: reflection padding before a random crop back to the original size, in pixels.
      flip: whether half of the images are mirrored left to right.
      views: how many of its crops and flips each image uses; None: all of them.

    Raises:
      ValueError: if a value is out of range, or there are fewer crops and flips than `views`.
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
        """The number of crops and flips of an image: (2·pad + 1)², and twice that if `flip`."""
        return (2 * self.pad + 1) ** 2 * (1 + self.flip)

    @property
    def shown_views(self) -> int:
        """The number of views that are shown: `views`, or all."""
        return self.all_views if self.views is None else self.views

    def require_fits(self, image_shape: tuple[int, ...]) -> None:
        """Raises `InputError` if images of that shape cannot be preprocessed."""
        height, width, channels = image_shape
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise InputError(f"{name} has {len(values)} entries for {channels} channels")
        if self.pad >= min(height, width):
            raise InputError(
                f"images of {height}×{width} are too small for reflection padding by {self.pad}"
            )


Augment = Callable[[jax.Array, jax.Array], jax.Array]
"""(key, images) -> images: floating `[batch, height, width, channels]`, in stored units."""


@dataclasses.dataclass(frozen=True)
class OwnAugmentation:
    """An augmentation of one's own, behind crops and flips and before the normalization.

    Attributes:
      label: its name in records: "custom:" and a digest of what it makes of four images, to four
        digits.
      made: the function; None where it was read from a record.
    """

    label: str
    made: Augment | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, function: Any) -> OwnAugmentation:
        """Labels a function. Raises `InputError` where it is none."""
        if not callable(function):
            raise InputError(
                f"augment is a function (key, images) -> images, not {brief(function)}"
            )
        return cls(f"custom:{_digest_images(function)}", function)

    def require_fits(self, batch_size: int, image_shape: tuple[int, ...]) -> None:
        """Raises `InputError` if it cannot augment such a batch, or is no pure function."""
        if self.made is None:
            raise InputError(f"augment {self.label} is the label in a record: give the function")
        key = jax.random.key(0)
        images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.result_type(float))
        try:
            # A new function each time, since JAX remembers what it has traced.
            first, second = (
                jax.jit(functools.partial(self.made)).lower(key, images) for _ in range(2)
            )
            made = first.out_info
        except Exception as error:
            reason = next(iter(str(error).splitlines()), repr(error))[:200]
            raise InputError(f"augment fails on images {images.shape}: {reason}") from error
        shape, dtype = (getattr(made, name, None) for name in ("shape", "dtype"))
        if shape != images.shape or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise InputError(
                f"augment must return floating images {images.shape}, as it is given them, not "
                f"{dtype} {shape}"
            )
        if first.as_text() != second.as_text():
            raise InputError(
                "augment is another function each time it is compiled: draw all that is random "
                "in it from its key, by jax.random"
            )


def _digest_images(function: Augment) -> str:
    """Eight digits that tell two augmentations apart by what they make of four small images."""
    with jax.enable_x64(False):
        images = 127.5 + 127.5 * jnp.cos(jnp.arange(4.0 * 32 * 32 * 3)).reshape(4, 32, 32, 3)
        weights = jnp.sin(jnp.arange(1.0, 32 * 32 * 3 + 1))
        try:
            rows = function(jax.random.key(0), images).reshape(4, -1)
            sums = [*jnp.abs(rows).sum(axis=1), *(rows * weights).sum(axis=1)]
        except Exception:  # it wants other images, so it cannot be told from others of its kind
            return "other"
        digits = [f"{float(each):.3e}" for each in sums]
    return hashlib.sha256(" ".join(digits).encode()).hexdigest()[:8]


def normalize(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Computes (pixel − mean) / std of images `[..., height, width, channels]` of any dtype.

    The result has the default floating dtype: float32, or float64 under x64.
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
    """Crops and flips images at random, as a function of (key, epoch, example) alone.

    The result does not depend on the number of devices or on the other images of the batch.

    Args:
      images: `[batch, height, width, channels]`.
      examples: `[batch]`, each image's index in the data set.
      epochs: `[batch]`, each image's epoch.
      key: the run's augmentation key.
      preprocessing: `pad`, `flip` and `views`.

    Returns:
      Images of the same shape and dtype.
    """
    chosen = draw_views(examples, epochs, key, preprocessing)
    return view(images, examples, chosen, preprocessing)


def draw_views(
    examples: jax.Array, epochs: jax.Array, key: jax.Array, preprocessing: Preprocessing
) -> jax.Array:
    """Draws the number of a view for each example, `[batch]` in [0, `shown_views`).

    The arguments are as for `augment`.
    """
    limits = _limits(preprocessing)

    def one(example: jax.Array, epoch: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, epoch), example)
        if preprocessing.views is not None:
            return jax.random.randint(own, (), 0, preprocessing.views, jnp.int32)
        corner = jax.random.randint(own, (3,), 0, jnp.array(limits, jnp.int32), jnp.int32)
        return (corner[0] * limits[1] + corner[1]) * limits[2] + corner[2]

    return jax.vmap(one)(examples, epochs)


def view(
    images: jax.Array, examples: jax.Array, chosen: jax.Array, preprocessing: Preprocessing
) -> jax.Array:
    """Crops and flips images to the chosen views.

    Where all are shown, they are numbered by row, column and mirroring. If `views` limits them, an
    example's first ones are taken in a random order, which depends on the example alone. So runs
    with different seeds have the same views.

    Args:
      images: `[batch, height, width, channels]`.
      examples: `[batch]`, each image's index in the data set.
      chosen: `[batch]`, the number of the view.
      preprocessing: `pad`, `flip` and `views`.

    Returns:
      Images of the same shape and dtype.
    """
    limits = _limits(preprocessing)

    def corner(example: jax.Array, chosen: jax.Array) -> jax.Array:
        if preprocessing.views is not None:
            own = jax.random.fold_in(jax.random.key(0), example)
            chosen = jax.random.permutation(own, preprocessing.all_views)[chosen]
        return jnp.stack(jnp.unravel_index(chosen, limits)).astype(jnp.int32)

    return _crop(images, jax.vmap(corner)(examples, chosen), preprocessing)


def _limits(preprocessing: Preprocessing) -> tuple[int, int, int]:
    """Returns the number of rows, columns and mirrorings of the crops."""
    positions = 2 * preprocessing.pad + 1
    return positions, positions, 1 + preprocessing.flip


def _crop(images: jax.Array, corners: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Crops each padded image at its (row, column); mirrors it if the third number is 1."""
    pad = preprocessing.pad
    if not pad and not preprocessing.flip:
        return images
    padding = [(0, 0), (pad, pad), (pad, pad), (0, 0)]
    padded = jnp.pad(images, padding, mode="reflect") if pad else images

    def one(image: jax.Array, corner: jax.Array) -> jax.Array:
        row, column, mirrored = corner
        crop = jax.lax.dynamic_slice(image, (row, column, jnp.zeros_like(row)), images.shape[1:])
        return jnp.where(mirrored, crop[:, ::-1], crop)

    return jax.vmap(one)(padded, corners)
