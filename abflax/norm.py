"""Batch norm with the same numbers as Flax's, in fewer passes over the images.

Differentiated by hand a batch norm needs two sums backward, Σ g and Σ g·x̂ (Ioffe, Szegedy, ICML
2015); what autodiff makes of `nn.BatchNorm` needs four. And XLA's CPU backend sums anything over
the images at the speed of memory, but a product five to twelve times slower, which Σ x² and
Σ g·x̂ are.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class BatchNorm(nn.Module):
    """`nn.BatchNorm` over the last axis: its variables, its fast variance, its running averages.

    Differentiable in reverse mode, to any order; not in forward mode. The running averages are
    state, without gradients.

    Attributes:
      use_running_average: whether to normalise by the running averages and leave them alone.
      momentum: of the running averages, whose variance is the biased one.
      epsilon: added to the variance.
      dtype: of the result; None: that of inputs and parameters. Statistics have at least float32.
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
        """(x − mean) / √(variance + epsilon) · scale + bias, shaped as x, `[..., channels]`."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        dtype = nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.use_running_average:
            inverse = jax.lax.rsqrt(variance.value + self.epsilon)
            return ((x - mean.value) * (inverse * scale) + bias).astype(dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        y, *now = _normalised(x, scale, bias, self.epsilon, axis_name)
        if not self.is_initializing():
            for average, value in zip((mean, variance), now, strict=True):
                average.value = self.momentum * average.value + (1 - self.momentum) * value
        return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalised(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x by the statistics of its own batch, and these: mean and (biased) variance."""
    return _forward(x, scale, bias, epsilon, axis_name)[0]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> Any:
    count = math.prod(x.shape[:-1])
    mean, square = _averaged((_total(x) / count, _total_of_products(x, x) / count), axis_name)
    variance = jnp.maximum(0.0, square - mean * mean)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (x - mean) * (inverse * scale) + bias
    return (y, mean, variance), (x, mean, inverse, scale, bias)


def _backward(epsilon: float, axis_name: str | None, kept: Any, out: Any) -> Any:
    x, mean, inverse, scale, bias = kept
    g = out[0]
    normal = (x - mean) * inverse
    sums = _total(g), _total_of_products(g, normal)
    count = math.prod(x.shape[:-1])
    of_g, along = _averaged(tuple(total / count for total in sums), axis_name)
    to_x = (inverse * scale) * (g - of_g - normal * along)
    return to_x, sums[1].astype(scale.dtype), sums[0].astype(bias.dtype)


_normalised.defvjp(_forward, _backward)


def _averaged(values: Any, axis_name: str | None) -> Any:
    return values if axis_name is None else jax.lax.pmean(values, axis_name)


def _total(x: jax.Array) -> jax.Array:
    """Σ x over all axes but the last."""
    return jnp.sum(x, tuple(range(x.ndim - 1)))


def _total_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ x·y over all axes but the last."""

    def disguised(x: jax.Array, y: jax.Array) -> jax.Array:
        # The same numbers, but the compiler does not see that it sums a product.
        return _total(jnp.maximum(x * y, jnp.finfo(x.dtype).min))

    return jax.lax.platform_dependent(x, y, cpu=disguised, default=lambda x, y: _total(x * y))
