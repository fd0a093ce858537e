"""A depthwise convolution with the same numbers as XLA's, but faster on CPUs.

Use it as `nn.Conv(..., feature_group_count=channels, conv_general_dilated=depthwise)`. XLA's CPU
backend runs grouped convolutions at under 1 GFLOP/s, and their gradients even slower. So on CPUs
this is a sum of shifted slices times weights. The gradient for the images shifts and adds. The
gradient for the kernel sums products of slices image by image; one sum over positions and images
would be several times slower. Accelerators use XLA's grouped convolution.
`python -m experiments.bench --sections depthwise` measures both.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from abflax.models.convolution import Static, is_supported, static_arguments, xla_convolution


def depthwise(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **others: Any,
) -> jax.Array:
    """Computes `jax.lax.conv_general_dilated` of NHWC images with one kernel for each channel.

    The arguments and derivatives are as for `convolution.convolve`, but the kernel is `[height,
    width, 1, channels]`. `precision` is used where XLA convolves.
    """
    channels, groups = images.shape[-1], others.get("feature_group_count", 1)
    if not is_supported(images, others) or kernel.shape[2:] != (1, channels) or groups != channels:
        raise NotImplementedError(
            "depthwise is for two dimensions and one kernel for each channel, without dilation"
        )
    static = static_arguments(images, kernel, strides, padding, others)
    return _depthwise(images, kernel, static)


def convolved(images: jax.Array, kernel: jax.Array, static: Static) -> jax.Array:
    """Computes XLA's grouped convolution; `static` is (strides, padding, precision)."""
    return xla_convolution(images, kernel, static, images.shape[-1])


def sliced(images: jax.Array, kernel: jax.Array, static: Static) -> jax.Array:
    """Computes the same by shifted slices, summed in at least float32."""
    wide = jnp.promote_types(images.dtype, jnp.float32)
    weights = kernel.astype(wide).reshape(-1, kernel.shape[-1])
    slices = _slices(images.astype(wide), kernel.shape[:2], static)
    products = (part * weight for part, weight in zip(slices, weights, strict=True))
    return functools.reduce(jnp.add, products).astype(images.dtype)


def convolved_gradients(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, static: Static
) -> tuple[jax.Array, jax.Array]:
    """Computes XLA's gradients of `convolved`, for images and kernel."""
    _, pullback = jax.vjp(functools.partial(convolved, static=static), images, kernel)
    return pullback(cotangent)


def sliced_gradients(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, static: Static
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of `sliced`, for images and kernel, without a convolution."""
    wide = jnp.promote_types(images.dtype, jnp.float32)
    size, cotangent = kernel.shape[:2], cotangent.astype(wide)
    weights = kernel.astype(wide).reshape(-1, kernel.shape[-1])

    def accumulate(sums: list[jax.Array], example: Any) -> tuple[list[jax.Array], None]:
        image, gradient = example
        slices = _slices(image[None].astype(wide), size, static)
        return [total + part[0] * gradient for total, part in zip(sums, slices, strict=True)], None

    start = [jnp.zeros(cotangent.shape[1:], wide)] * len(weights)
    sums, _ = jax.lax.scan(accumulate, start, (images, cotangent))
    to_kernel = jnp.stack([total.sum(axis=(0, 1)) for total in sums])
    to_images = _shifted_back(cotangent, weights, images.shape, size, static)
    return to_images.astype(images.dtype), to_kernel.reshape(kernel.shape).astype(kernel.dtype)


def _shifted_back(
    cotangent: jax.Array,
    weights: jax.Array,
    shape: tuple[int, ...],
    size: tuple[int, ...],
    static: Static,
) -> jax.Array:
    """Adds the products at the positions of their slices: the transpose of `_slices`."""
    strides, padding, _ = static
    padded = [side + sum(pads) for side, pads in zip(shape[1:3], padding, strict=True)]
    total = zero = jnp.zeros((), cotangent.dtype)
    for weight, corner in zip(weights, itertools.product(*map(range, size)), strict=True):
        margins = [
            (first, side - first - stride * (count - 1) - 1, stride - 1)
            for first, side, stride, count in zip(
                corner, padded, strides, cotangent.shape[1:3], strict=True
            )
        ]
        total = total + jax.lax.pad(cotangent * weight, zero, [(0, 0, 0), *margins, (0, 0, 0)])
    (top, _), (left, _) = padding
    return total[:, top : top + shape[1], left : left + shape[2]]


def _slices(images: jax.Array, size: tuple[int, ...], static: Static) -> Iterator[jax.Array]:
    """Yields the pixels by which each entry of a kernel of that size is multiplied, row by row."""
    strides, padding, _ = static
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    sides, steps = padded.shape, (1, *strides, 1)
    for row, column in itertools.product(*map(range, size)):
        # The kernel's corner moves over the positions where the whole kernel fits.
        limits = (sides[1] - size[0] + 1 + row, sides[2] - size[1] + 1 + column)
        yield jax.lax.slice(padded, (0, row, column, 0), (sides[0], *limits, sides[3]), steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(images: jax.Array, kernel: jax.Array, static: Static) -> jax.Array:
    return _by_platform(sliced, convolved, images, kernel, static=static)


def _by_platform(on_cpu: Any, elsewhere: Any, *arrays: jax.Array, static: Static) -> Any:
    return jax.lax.platform_dependent(
        *arrays,
        cpu=functools.partial(on_cpu, static=static),
        default=functools.partial(elsewhere, static=static),
    )


_depthwise.defvjp(
    lambda images, kernel, static: (_depthwise(images, kernel, static), (images, kernel)),
    lambda static, arguments, cotangent: _by_platform(
        sliced_gradients, convolved_gradients, *arguments, cotangent, static=static
    ),
)
