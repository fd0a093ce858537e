"""A depthwise convolution with the same numbers, faster on CPUs.

`nn.Conv(..., feature_group_count=channels, conv_general_dilated=depthwise)`. XLA's CPU backend
runs grouped convolutions, and more so their gradients, at under 1 GFLOP/s. There a depthwise one
is a sum of shifted slices times weights; its gradient for the images shifts and adds, that for the
kernel sums products of slices, accumulated image by image (a sum over positions and images at once
is several times slower). No convolution is inside. Accelerators keep XLA's own.
`python -m experiments.bench --sections depthwise` measures both.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_Static = tuple[tuple[int, ...], tuple[tuple[int, int], ...], Any]


def depthwise(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **others: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for NHWC images with one HWIO kernel for each channel.

    Differentiable in reverse mode, to any order; not in forward mode.

    Args:
      images: `[batch, height, width, channels]`.
      kernel: `[height, width, 1, channels]`.
      strides: (rows, columns).
      padding: ((top, bottom), (left, right)).
      **others: what `nn.Conv` passes besides: groups and dilation are checked, `precision` is
        used where XLA convolves.
    """
    channels = images.shape[-1]
    dilated = {*others.get("lhs_dilation", ()), *others.get("rhs_dilation", ())} - {1}
    if (
        images.ndim != 4
        or kernel.shape[2:] != (1, channels)
        or others.get("feature_group_count", 1) != channels
        or dilated
    ):
        raise NotImplementedError(
            "depthwise knows one kernel for each channel, no dilation, and two dimensions"
        )
    return _depthwise(
        images, kernel, (tuple(strides), tuple(map(tuple, padding)), others.get("precision"))
    )


def convolved(images: jax.Array, kernel: jax.Array, static: _Static) -> jax.Array:
    """XLA's grouped convolution; `static` is (strides, padding, precision)."""
    strides, padding, precision = static
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=images.shape[-1],
        precision=precision,
    )


def sliced(images: jax.Array, kernel: jax.Array, static: _Static) -> jax.Array:
    """The same by shifted slices, summed in float32 at least."""
    wide = jnp.promote_types(images.dtype, jnp.float32)
    weights = kernel.astype(wide).reshape(-1, kernel.shape[-1])
    shifted = _slices(images.astype(wide), kernel.shape[:2], static)
    products = (each * weight for each, weight in zip(shifted, weights, strict=True))
    return functools.reduce(jnp.add, products).astype(images.dtype)


def convolved_gradients(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, static: _Static
) -> tuple[jax.Array, jax.Array]:
    """XLA's own gradients of `convolved`, for images and kernel."""
    _, pullback = jax.vjp(functools.partial(convolved, static=static), images, kernel)
    return pullback(cotangent)


def sliced_gradients(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, static: _Static
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `sliced`, for images and kernel, without a convolution."""
    wide = jnp.promote_types(images.dtype, jnp.float32)
    size, cotangent = kernel.shape[:2], cotangent.astype(wide)
    weights = kernel.astype(wide).reshape(-1, kernel.shape[-1])

    def accumulate(
        sums: tuple[jax.Array, ...], one: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, ...], None]:
        image, own = one
        shifted = _slices(image[None].astype(wide), size, static)
        return tuple(total + each[0] * own for total, each in zip(sums, shifted, strict=True)), None

    start = (jnp.zeros(cotangent.shape[1:], wide),) * len(weights)
    sums, _ = jax.lax.scan(accumulate, start, (images, cotangent))
    to_kernel = jnp.stack([each.sum(axis=(0, 1)) for each in sums])
    to_images = _shifted_back(cotangent, weights, images.shape, size, static)
    return to_images.astype(images.dtype), to_kernel.reshape(kernel.shape).astype(kernel.dtype)


def _shifted_back(
    cotangent: jax.Array,
    weights: jax.Array,
    shape: tuple[int, ...],
    size: tuple[int, ...],
    static: _Static,
) -> jax.Array:
    """Each product put back to where its slice was taken, summed: the transpose of `_slices`."""
    strides, padding, _ = static
    padded = [side + sum(around) for side, around in zip(shape[1:3], padding, strict=True)]
    zero = jnp.zeros((), cotangent.dtype)
    total = jnp.zeros((), cotangent.dtype)
    for weight, corner in zip(weights, itertools.product(*map(range, size)), strict=True):
        places = [
            (first, side - first - stride * (taken - 1) - 1, stride - 1)
            for first, side, stride, taken in zip(
                corner, padded, strides, cotangent.shape[1:3], strict=True
            )
        ]
        total = total + jax.lax.pad(cotangent * weight, zero, [(0, 0, 0), *places, (0, 0, 0)])
    (top, _), (left, _) = padding
    return total[:, top : top + shape[1], left : left + shape[2]]


def _slices(images: jax.Array, size: tuple[int, ...], static: _Static) -> Iterator[jax.Array]:
    """For each entry of a kernel of that size, what it is multiplied with, row by row."""
    strides, padding, _ = static
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    sides, steps = padded.shape, (1, *strides, 1)
    for row, column in itertools.product(*map(range, size)):
        # How far the kernel's corner may go is how much is left beside it.
        limits = (sides[1] - size[0] + 1 + row, sides[2] - size[1] + 1 + column)
        yield jax.lax.slice(padded, (0, row, column, 0), (sides[0], *limits, sides[3]), steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(images: jax.Array, kernel: jax.Array, static: _Static) -> jax.Array:
    return jax.lax.platform_dependent(
        images,
        kernel,
        cpu=functools.partial(sliced, static=static),
        default=functools.partial(convolved, static=static),
    )


def _forward(
    images: jax.Array, kernel: jax.Array, static: _Static
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _depthwise(images, kernel, static), (images, kernel)


def _backward(
    static: _Static, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=functools.partial(sliced_gradients, static=static),
        default=functools.partial(convolved_gradients, static=static),
    )


_depthwise.defvjp(_forward, _backward)
