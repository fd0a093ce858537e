"""A batch norm with the same numbers as Flax's, but fewer passes over the images.

A hand-written backward pass needs two sums over the images, Σ g and Σ g·x̂ (Ioffe, Szegedy, ICML
2015); the automatic derivative of `nn.BatchNorm` needs four. XLA's CPU backend also computes sums
of products, such as Σ x² and Σ g·x̂, several times slower than plain sums, which this code avoids
(jaxlib 0.10.1; 32×32×32 channels, batch 128, one core: 4 ms instead of 9 ms).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class BatchNorm(nn.Module):
    """`nn.BatchNorm` over the last axis, with the published networks' momentum.

    It computes (x − m)/√(v + ε) · scale + bias with m = mean x and v = max(0, mean x² − m²). The
    means are over all axes but the last (and over devices). The running averages are updated to
    momentum · old + (1 − momentum) · new, without gradients. Variables and numbers are those of
    `nn.BatchNorm`.

    It is differentiable in reverse mode, to any order, but not in forward mode. With several
    devices, the gradients of scale and bias are not averaged over the devices; the caller averages
    all gradients.

    Attributes:
      use_running_average: whether to normalize by the running averages and not update them.
      momentum: of the running averages; the running variance is the biased one.
      epsilon: added to the variance.
      dtype: of the result; None: that of inputs and parameters. Statistics are at least float32.
      param_dtype: of the parameters.
      axis_name: the mapped axis over which statistics are averaged; None: this device alone.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x `[..., channels]`; returns an array of the same shape."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        dtype = nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        if self.use_running_average:
            inverse = jax.lax.rsqrt(variance.value + self.epsilon)
            return ((_wide(x) - mean.value) * (inverse * scale) + bias).astype(dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        y, *statistics = _normalized(x, scale, bias, self.epsilon, axis_name)
        if not self.is_initializing():
            for average, value in zip((mean, variance), statistics, strict=True):
                average.value = self.momentum * average.value + (1 - self.momentum) * value
        return y.astype(dtype)


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> Any:
    """Computes (x normalized by the batch, its mean, its biased variance), and the residuals."""
    wide, count = _wide(x), math.prod(x.shape[:-1])
    sums = _total(wide), _total_of_products(wide, wide)
    mean, square = _averaged(tuple(total / count for total in sums), axis_name)
    variance = jnp.maximum(0.0, square - mean * mean)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (wide - mean) * (inverse * scale) + bias
    return (y, mean, variance), (x, mean, variance, inverse, scale, bias)


def _backward(epsilon: float, axis_name: str | None, residuals: Any, cotangents: Any) -> Any:
    """Computes ∂x = scale/σ · (g − mean g − x̂ · mean(g·x̂)), ∂scale = Σ g·x̂, ∂bias = Σ g.

    If rounding makes the variance negative, it is set to 0 and is constant: mean(g·x̂) drops out.
    """
    x, mean, variance, inverse, scale, bias = residuals
    g = cotangents[0]
    normal, count = (_wide(x) - mean) * inverse, math.prod(x.shape[:-1])
    sums = _total(g), _total_of_products(g, normal)
    mean_g, mean_gx = _averaged(tuple(total / count for total in sums), axis_name)
    to_x = (inverse * scale) * (g - mean_g - normal * jnp.where(variance > 0, mean_gx, 0.0))
    return to_x.astype(x.dtype), sums[1].astype(scale.dtype), sums[0].astype(bias.dtype)


_normalized = jax.custom_vjp(lambda *arguments: _forward(*arguments)[0], nondiff_argnums=(3, 4))
_normalized.defvjp(_forward, _backward)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _averaged(values: Any, axis_name: str | None) -> Any:
    return values if axis_name is None else jax.lax.pmean(values, axis_name)


def _total(x: jax.Array) -> jax.Array:
    """Computes Σ x over all axes but the last."""
    return jnp.sum(x, tuple(range(x.ndim - 1)))


def _total_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes Σ x·y over all axes but the last."""

    def on_cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        # The maximum changes nothing but −∞. It hides the product from XLA's slow reduction.
        return _total(jnp.maximum(x * y, jnp.finfo(x.dtype).min))

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=lambda x, y: _total(x * y))
