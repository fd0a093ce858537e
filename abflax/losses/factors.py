"""The loss of factor transfer (Kim, Park, Kwak, NeurIPS 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import require_same_shape
from abflax.losses.attention import attention_map
from abflax.losses.dtypes import at_least_float32
from abflax.losses.features import as_map, unit_length


def factor_transfer(
    student: jax.Array, teacher: jax.Array, channels_averaged: bool = False
) -> jax.Array:
    """Computes the mean of |v(S) − v(T)| for each example.

    v(F) is vec F/‖vec F‖₂, as in the paper and its authors' code. The RepDistiller collection has
    another: the mean over the channels of F², vec and ℓ2 norm, which is `attention_map`. An
    all-zero F gives v(F) = 0, with gradient 0.

    Args:
      student: the student's factor S `[batch, height, width, channels]` or `[batch, tokens,
        features]`.
      teacher: the teacher's factor T of the same shape.
      channels_averaged: whether v(F) is the collection's.

    Returns:
      `[batch]`, >= 0, at least float32. The gradient at v(S) = v(T) is 0.

    Raises:
      ValueError: if the shapes differ, or they are no feature maps.

    References:
      Kim, Park, Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer,
      NeurIPS 2018, equation (3) with p = 1.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    require_same_shape("factor_transfer", student, teacher)
    as_map("factor_transfer", student)  # raises

    def vector(factor: jax.Array) -> jax.Array:
        if channels_averaged:
            return attention_map(factor)
        return unit_length(factor.reshape(len(factor), -1), axis=1)

    difference = vector(student) - vector(teacher)
    # Of jnp.abs, the gradient at 0 would be 1.
    return jnp.mean(jnp.sign(difference) * difference, axis=1)
