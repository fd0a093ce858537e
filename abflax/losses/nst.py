"""Neuron selectivity transfer: which positions each channel likes (Huang, Wang 2017)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import unknown
from abflax.losses.dtypes import at_least_float32
from abflax.losses.features import positions_pooled, require_feature_map, unit_length

# Squared distances of unit vectors lie in [0, 4] and are known to some 1e-7 in float32: with this
# bandwidth at least, rounding changes a kernel by some 1e-4 at most, however alike all channels.
_SMALLEST_BANDWIDTH = 1e-3


def channel_patterns(features: jax.Array) -> jax.Array:
    """Each channel's map as a vector over the positions, divided by its ℓ2 norm.

    Args:
      features: `[batch, height, width, channels]`.

    Returns:
      `[batch, channels, height · width]`, float32 at least. An all-zero channel gives zeros,
      with gradient zero.

    Raises:
      ValueError: if it is no feature map.

    References:
      Huang, Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017.
    """
    features = at_least_float32(features)
    require_feature_map("channel_patterns", features)
    batch, height, width, channels = features.shape
    patterns = features.reshape(batch, height * width, channels).swapaxes(1, 2)
    return unit_length(patterns, axis=-1)


def neuron_selectivity(
    student: jax.Array, teacher: jax.Array, kernel: str = "polynomial"
) -> jax.Array:
    """The squared MMD between the two networks' channel patterns, for each example.

    mean K(f, f') + mean K(g, g') − 2·mean K(f, g), over all pairs of the student's patterns f
    and the teacher's g (`channel_patterns`), with the kernel

    * `linear`: K(x, y) = xᵀy, so that the whole is ‖mean f − mean g‖²;
    * `polynomial`: K(x, y) = (xᵀy)², i.e. degree d = 2 and constant c = 0;
    * `gaussian`: K(x, y) = exp(−‖x − y‖²/(2σ²)), where σ² is the mean of ‖f − g‖² over the
      example's pairs (f, g), 1e-3 at least. No gradient flows through σ².

    Nothing larger than the taps and the Gram matrices `[batch, channels, channels]` is made; the
    linear kernel makes no Gram matrix.

    Args:
      student: S `[batch, height, width, channels]`.
      teacher: T `[batch, height', width', channels']`; the map that is larger in height and
        width is average-pooled to the smaller, see `positions_pooled`.
      kernel: `linear`, `polynomial` or `gaussian`.

    Returns:
      `[batch]`, >= 0 up to rounding, float32 at least.

    Raises:
      ValueError: for an unknown kernel, and as `positions_pooled`.

    References:
      Huang, Wang 2017. For σ² they take the mean squared distance of the pairs.
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
    """Mean K(f, f') + mean K(g, g') − 2·mean K(f, g)."""
    within_f, within_g, across = (k.mean(axis=(1, 2)) for k in (within_f, within_g, across))
    return within_f + within_g - 2 * across


def _squared_distances(f: jax.Array, g: jax.Array) -> jax.Array:
    """‖f‖² + ‖g‖² − 2fᵀg for all pairs, which never has a position axis beside both channels'."""
    f_norms, g_norms = (jnp.sum(jnp.square(x), axis=-1) for x in (f, g))
    return f_norms[:, :, None] + g_norms[:, None, :] - 2 * _gram(f, g)


def _gram(f: jax.Array, g: jax.Array) -> jax.Array:
    # "highest": accelerators multiply float32 matrices in less than float32 by default.
    return jnp.einsum("bcp,bdp->bcd", f, g, precision="highest")


_MMD = {"linear": _linear, "polynomial": _polynomial, "gaussian": _gaussian}
