"""A convolution with the same numbers as XLA's and a faster backward pass on CPUs.

Use it as `nn.Conv(..., conv_general_dilated=convolve)`. XLA's CPU backend computes the kernel's
gradient as one matrix product whose inner dimension is batch × height × width. That is 4 to 10
times slower than the forward pass. A sum over chunks of the batch is nearly as fast as the forward
pass (32×32×16 channels, batch 128, two cores: 40 ms in one chunk, 8 ms in sixteen).

In a loop or a branch, XLA's CPU backend is fast for convolutions of NHWC and HWIO alone
(jax-ml/jax#12868). JAX's gradients have other orders of axes, and take 30 to 100 times as long
there. The gradients here are convolutions of NHWC and HWIO, with the same bits.

An unpadded 1×1 convolution is computed as a matrix product: on CPUs with any strides, on
accelerators without. There the other convolutions and their gradients are XLA's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_MOST_CHUNKS = 16
_FEWEST_POSITIONS = 512  # in a chunk; smaller ones are not faster, and take longer to compile

Static = tuple[tuple[int, ...], Any, Any]
"""The strides, padding and precision of a convolution."""


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **others: Any,
) -> jax.Array:
    """Computes `jax.lax.conv_general_dilated` of NHWC images, without dilation or groups.

    It is differentiable in reverse mode, to any order, but not in forward mode.

    Args:
      images: `[batch, height, width, channels]`.
      kernel: `[height, width, channels, features]`.
      strides: (rows, columns).
      padding: ((top, bottom), (left, right)), or "SAME".
      **others: the other arguments of `nn.Conv`; groups and dilation are checked, `precision` is
        used.
    """
    if not is_supported(images, others) or others.get("feature_group_count", 1) != 1:
        raise NotImplementedError("convolve is for two dimensions, without groups or dilation")
    static = static_arguments(images, kernel, strides, padding, others)
    if _is_pointwise(kernel.shape[:2], static) and static[0] == (1, 1):
        return _pointwise(images, kernel, static)
    return _convolve(images, kernel, static)


def is_supported(images: jax.Array, others: Mapping[str, Any]) -> bool:
    """Tells whether a convolution has two dimensions and no dilation."""
    dilations = (*others.get("lhs_dilation", ()), *others.get("rhs_dilation", ()))
    return images.ndim == 4 and all(dilation == 1 for dilation in dilations)


def static_arguments(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    others: Mapping[str, Any],
) -> Static:
    """Returns the strides, padding and precision, with "SAME" as numbers of pixels."""
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    return tuple(strides), tuple(map(tuple, padding)), others.get("precision")


def xla_convolution(
    images: jax.Array, kernel: jax.Array, static: Static, groups: int = 1, **dilation: Any
) -> jax.Array:
    """Computes XLA's convolution of NHWC images; `dilation` is `lhs_dilation` or `rhs_dilation`."""
    strides, padding, precision = static
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
        **dilation,
    )


def _of_sides(
    sides: Sequence[int],
    images: jax.Array,
    kernel: jax.Array,
    before: Sequence[int],
    precision: Any,
    *,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
) -> jax.Array:
    """Convolves with stride 1, padded above and on the left as told, to results of these sides."""
    padding = []
    for axis in (0, 1):
        image = (images.shape[1 + axis] - 1) * lhs_dilation[axis] + 1
        window = (kernel.shape[axis] - 1) * rhs_dilation[axis] + 1
        padding.append((before[axis], sides[axis] - 1 + window - image - before[axis]))
    static = (1, 1), padding, precision
    return xla_convolution(
        images, kernel, static, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation
    )


def _is_pointwise(sides: Sequence[int], static: Static) -> bool:
    """Tells whether the kernel is 1×1 and the images are not padded."""
    return tuple(sides) == (1, 1) and not any(map(any, static[1]))


def _pointwise(images: jax.Array, kernel: jax.Array, static: Static) -> jax.Array:
    """Computes an unpadded 1×1 convolution as a matrix product."""
    (rows, columns), _, precision = static
    images = images[:, ::rows, ::columns]
    # Without flattening, the gradient would copy its arguments.
    flat = images.reshape(math.prod(images.shape[:-1]), images.shape[-1])
    out = jnp.dot(flat, kernel[0, 0], precision=precision)
    return out.reshape(*images.shape[:-1], kernel.shape[-1])


def _plain(images: jax.Array, kernel: jax.Array, static: Static) -> jax.Array:
    """Computes XLA's convolution; on CPUs a matrix product if it is 1×1 and unpadded.

    On GPUs XLA 0.10.1 aborts when it compiles a strided slice before a matrix product
    (openxla/xla#47381), so strided 1×1 convolutions are not rewritten there.
    """
    convolution = functools.partial(xla_convolution, static=static)
    if not _is_pointwise(kernel.shape[:2], static):
        return convolution(images, kernel)
    return jax.lax.platform_dependent(
        images, kernel, cpu=lambda x, w: _pointwise(x, w, static), default=convolution
    )


# The convolution and its gradients with respect to images and kernel are three bilinear maps. The
# gradients of each map are the other two, so these three give the derivatives of every order.
# (Jacobian matching needs the second.)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: jax.Array, kernel: jax.Array, static: Static) -> jax.Array:
    return _plain(images, kernel, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _to_images(cotangent: jax.Array, kernel: jax.Array, static: Static, sides: Any) -> jax.Array:
    shape = (len(cotangent), *sides, kernel.shape[2])
    images = jax.ShapeDtypeStruct(shape, cotangent.dtype)

    def transposed(cotangent: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: _plain(x, kernel, static), images)(cotangent)[0]

    def channels_last(cotangent: jax.Array, kernel: jax.Array) -> jax.Array:
        strides, padding, precision = static
        before = [side - 1 - low for side, (low, _) in zip(kernel.shape, padding, strict=False)]
        turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        return _of_sides(sides, cotangent, turned, before, precision, lhs_dilation=strides)

    if _is_pointwise(kernel.shape[:2], static) or cotangent.size == 0:
        return transposed(cotangent, kernel)
    return jax.lax.platform_dependent(cotangent, kernel, cpu=channels_last, default=transposed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _to_kernel(images: jax.Array, cotangent: jax.Array, static: Static, sides: Any) -> jax.Array:
    shape = (*sides, images.shape[-1], cotangent.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, images.dtype)

    def transposed(images: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda w: _plain(images, w, static), kernel)(cotangent)[0]

    def channels_last(images: jax.Array, cotangent: jax.Array) -> jax.Array:
        strides, padding, precision = static
        images, cotangent = images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)
        before = [low for low, _ in padding]
        out = _of_sides(sides, images, cotangent, before, precision, rhs_dilation=strides)
        return out.transpose(1, 2, 0, 3)

    def in_chunks(images: jax.Array, cotangent: jax.Array) -> jax.Array:
        if _is_pointwise(sides, static) or cotangent.size == 0:
            return transposed(images, cotangent)
        chunks = math.gcd(len(images), _MOST_CHUNKS)
        while chunks > 1 and math.prod(cotangent.shape[:3]) < chunks * _FEWEST_POSITIONS:
            chunks //= 2
        pieces = zip(jnp.split(images, chunks), jnp.split(cotangent, chunks), strict=True)
        return functools.reduce(jnp.add, (channels_last(*piece) for piece in pieces))

    return jax.lax.platform_dependent(images, cotangent, cpu=in_chunks, default=transposed)


def _forward(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns the forward rule of a bilinear map: both arguments are residuals."""
    return lambda first, second, *static: (function(first, second, *static), (first, second))


_convolve.defvjp(
    _forward(_convolve),
    lambda static, arguments, cotangent: (
        _to_images(cotangent, arguments[1], static, arguments[0].shape[1:3]),
        _to_kernel(arguments[0], cotangent, static, arguments[1].shape[:2]),
    ),
)
_to_images.defvjp(
    _forward(_to_images),
    lambda static, sides, arguments, cotangent: (
        _convolve(cotangent, arguments[1], static),
        _to_kernel(cotangent, arguments[0], static, arguments[1].shape[:2]),
    ),
)
_to_kernel.defvjp(
    _forward(_to_kernel),
    lambda static, sides, arguments, cotangent: (
        _to_images(arguments[1], cotangent, static, arguments[0].shape[1:3]),
        _convolve(arguments[0], cotangent, static),
    ),
)
