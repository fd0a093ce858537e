"""Variational information distillation (Ahn et al., CVPR 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import require_same_shape
from abflax.losses.dtypes import at_least_float32, require_broadcastable


def variational_information(mean: jax.Array, teacher: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Computes the mean over positions and channels of ½·((μ − T)²/σ² + log σ²), for each example.

    It is the negative log-likelihood of the teacher's map, without its constant, under normal
    distributions of mean μ, a function of the student's map, and variance σ² = softplus(log_scale)
    + 1e-5. The form is that of the RepDistiller collection. (mdistiller never trains log_scale.)

    Args:
      mean: μ `[batch, …, channels]`.
      teacher: T of the same shape.
      log_scale: `[channels]`, what is trained for the variances.

    Returns:
      `[batch]`, of any sign, at least float32.

    Raises:
      ValueError: if the shapes differ, or log_scale cannot be broadcast to the channels.

    References:
      Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019, equations
      (5) and (6).
    """
    mean, teacher = at_least_float32(mean), at_least_float32(teacher)
    require_same_shape("variational_information", mean, teacher)
    require_broadcastable("variational_information: a log_scale", log_scale, mean.shape[-1:])
    variance = jax.nn.softplus(at_least_float32(log_scale)) + 1e-5
    loss = 0.5 * (jnp.square(mean - teacher) / variance + jnp.log(variance))
    return jnp.mean(loss, axis=tuple(range(1, loss.ndim)))
