"""Compares the distributions of the channels' spatial patterns (Huang, Wang 2017)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import unknown
from abflax.losses.dtypes import at_least_float32
from abflax.losses.features import as_map, positions_pooled, unit_length

# Squared distances of unit vectors lie in [0, 4] and have errors of about 1e-7 in float32. With at
# least this bandwidth, rounding changes a kernel by at most about 1e-4, even for equal channels.
_SMALLEST_BANDWIDTH = 1e-3


def channel_patterns(features: jax.Array) -> jax.Array:
    """Divides each channel's map, as a vector over the positions, by its ℓ2 norm.

    Args:
      features: `[batch, height, width, channels]`, or tokens `[batch, tokens, features]`.

    Returns:
      `[batch, channels, height · width]` (of tokens `[batch, features, tokens]`), at least float32.
      An all-zero channel gives zeros, with gradient zero.

    Raises:
      ValueError: if `features` is not a feature map.

    References:
      Huang, Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017.
    """
    features = as_map("channel_patterns", at_least_float32(features))
    batch, height, width, channels = features.shape
    patterns = features.reshape(batch, height * width, channels).swapaxes(1, 2)
    return unit_length(patterns, axis=-1)


def neuron_selectivity(
    student: jax.Array, teacher: jax.Array, kernel: str = "polynomial"
) -> jax.Array:
    """Computes the squared MMD between the two networks' channel patterns, for each example.

    The loss is mean K(f, f') + mean K(g, g') − 2·mean K(f, g), over all pairs of the student's
    patterns f and the teacher's patterns g (`channel_patterns`). The kernel K is one of

    * `linear`: K(x, y) = xᵀy, which makes the loss ‖mean f − mean g‖²;
    * `polynomial`: K(x, y) = (xᵀy)², i.e. degree d = 2 and constant c = 0;
    * `gaussian`: K(x, y) = exp(−‖x − y‖²/(2σ²)), where σ² is the mean of ‖f − g‖² over the
      example's pairs (f, g), but at least 1e-3. No gradient flows through σ².

    The largest intermediate arrays are the taps and the Gram matrices `[batch, channels,
    channels]`. The linear kernel needs no Gram matrix.

    Args:
      student: S `[batch, height, width, channels]` or `[batch, tokens, features]`.
      teacher: T `[batch, height', width', channels']` or `[batch, tokens', features']`. The larger
        map is average-pooled to the smaller one's positions, see `positions_pooled`.
      kernel: `linear`, `polynomial` or `gaussian`.

    Returns:
      `[batch]`, >= 0 up to rounding, at least float32.

    Raises:
      ValueError: if the kernel is unknown, and as `positions_pooled`.

    References:
      Huang, Wang 2017. They set σ² to the mean squared distance of the pairs.
    """
    if kernel not in _MMD:
        raise unknown("kernel", kernel, _MMD)
    student, teacher = positions_pooled(student, teacher)
    return _MMD[kernel](channel_patterns(student), channel_patterns(teacher))


def _linear(f: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(f.mean(axis=1) - g.mean(axis=1)), axis=-1)


def _polynomial(f: jax.Array, g: jax.Array) -> jax.Array:
    return _discrepancy(*(jnp.square(_gram(*pair)) for pair in ((f, f), (g, g), (f, g))))


def _gaussian(f: jax.Array, g: jax.Array) -> jax.Array:
    within_f, within_g, across = (_squared_distances(*pair) for pair in ((f, f), (g, g), (f, g)))
    bandwidth = jax.lax.stop_gradient(across.mean(axis=(1, 2), keepdims=True))
    scale = -0.5 / jnp.maximum(bandwidth, _SMALLEST_BANDWIDTH)
    return _discrepancy(*(jnp.exp(scale * d) for d in (within_f, within_g, across)))


def _discrepancy(within_f: jax.Array, within_g: jax.Array, across: jax.Array) -> jax.Array:
    """Computes mean K(f, f') + mean K(g, g') − 2·mean K(f, g)."""
    within_f, within_g, across = (k.mean(axis=(1, 2)) for k in (within_f, within_g, across))
    return within_f + within_g - 2 * across


def _squared_distances(f: jax.Array, g: jax.Array) -> jax.Array:
    """Computes ‖f‖² + ‖g‖² − 2fᵀg for all pairs; no array has both channel axes and positions."""
    f_norms, g_norms = (jnp.sum(jnp.square(x), axis=-1) for x in (f, g))
    return f_norms[:, :, None] + g_norms[:, None, :] - 2 * _gram(f, g)


def _gram(f: jax.Array, g: jax.Array) -> jax.Array:
    # Accelerators multiply float32 matrices in lower precision by default.
    return jnp.einsum("bcp,bdp->bcd", f, g, precision="highest")


_MMD = {"linear": _linear, "polynomial": _polynomial, "gaussian": _gaussian}
