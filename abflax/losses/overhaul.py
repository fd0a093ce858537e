"""The overhaul of feature distillation (Heo et al., ICCV 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from abflax.errors import require_same_shape
from abflax.losses.dtypes import at_least_float32, require_broadcastable


def overhaul_margin(scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Computes each channel's margin: the mean of its negative pre-activations.

    They are taken for normal with mean β and standard deviation s = |γ|, as a batch norm of scale γ
    and bias β leaves them, so the margin is β − s·φ(β/s)/Φ(−β/s). Where at most one in a thousand
    is negative, Φ(−β/s) <= 0.001, it is −3s. This is the authors' published code, which fails for
    s = 0; here the margin is then min(β, 0).

    Args:
      scale: γ `[channels]`.
      bias: β `[channels]`.

    Returns:
      `[channels]`, <= 0, at least float32. No gradient flows through it.

    Raises:
      ValueError: if the shapes differ.

    References:
      Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, section 3.1.
    """
    scale, bias = jax.lax.stop_gradient((at_least_float32(scale), at_least_float32(bias)))
    require_same_shape("overhaul_margin", scale, bias)
    deviation = jnp.abs(scale)
    ratio = bias / jnp.maximum(deviation, jnp.finfo(scale.dtype).tiny)
    negative = norm.cdf(-ratio)
    mean = bias - deviation * norm.pdf(ratio) / jnp.maximum(negative, 1e-3)
    return jnp.where(negative > 1e-3, mean, -3 * deviation)


def overhaul_difference(student: jax.Array, teacher: jax.Array, margin: jax.Array) -> jax.Array:
    """Computes (S − t)² where S > t or t > 0, else 0, elementwise; t is max(T, margin).

    A student's neuron has to reach the teacher's value where it is positive; where it is not, it
    is enough to lie below, and nothing asks for less than the margin. This is the authors'
    published code, before its sum.

    Args:
      student: pre-activations S, of any shape.
      teacher: pre-activations T of the same shape.
      margin: <= 0, broadcast to that shape; see `overhaul_margin`.

    Returns:
      An array of that shape, >= 0, at least float32. Its gradient is 0 at S = t.

    Raises:
      ValueError: if the shapes differ, or the margin cannot be broadcast.

    References:
      Heo et al., ICCV 2019, equations (1), (2) and (5).
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    require_same_shape("overhaul_difference", student, teacher)
    require_broadcastable("overhaul_difference: a margin", margin, student.shape)
    target = jnp.maximum(teacher, margin)
    counts = (student > target) | (target > 0)
    return jnp.where(counts, jnp.square(student - target), 0.0)
