"""Losses on spatial attention maps (Zagoruyko, Komodakis, ICLR 2017)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import require_same_shape
from abflax.losses.dtypes import at_least_float32
from abflax.losses.features import as_map, positions_pooled, unit_length


def attention_map(features: jax.Array) -> jax.Array:
    """Computes a(F) = vec(mean_c F²)/‖vec(mean_c F²)‖₂ for each example.

    Args:
      features: F `[batch, height, width, channels]`, or tokens `[batch, tokens, features]`.

    Returns:
      `[batch, height · width]` or `[batch, tokens]`, >= 0, at least float32. An all-zero F gives
      zeros, with gradient zero.

    Raises:
      ValueError: if F is not a feature map.

    References:
      Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1: F²_sum,
      normalized as in equation (2). After normalization the mean over the channels equals the
      sum.
    """
    features = as_map("attention_map", at_least_float32(features))
    batch, height, width, _ = features.shape
    energy = jnp.mean(jnp.square(features), axis=-1)
    return unit_length(energy.reshape(batch, height * width), axis=-1)


def attention_transfer(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes the mean over positions of (a(S) − a(T))² for each example; a is `attention_map`.

    If the two feature maps differ in height and width, the larger one is average-pooled to the
    smaller one's size before it is squared.

    Args:
      student: S `[batch, height, width, channels]` or `[batch, tokens, features]`.
      teacher: T `[batch, height', width', channels']` or `[batch, tokens', features']`, see
        `positions_pooled`; or the map a(T), `[batch, height · width]`.

    Returns:
      `[batch]`, at least float32.

    Raises:
      ValueError: as `positions_pooled`, or if the positions of S and a(T) differ.

    References:
      Zagoruyko, Komodakis, ICLR 2017, equation (2), with the squared norm and the mean over
      positions of their published code.
    """
    if jnp.ndim(teacher) == 2:
        student_map, teacher_map = attention_map(student), at_least_float32(teacher)
        require_same_shape("attention_transfer", student_map, teacher_map)
    else:
        student_map, teacher_map = map(attention_map, positions_pooled(student, teacher))
    return jnp.mean(jnp.square(student_map - teacher_map), axis=-1)
