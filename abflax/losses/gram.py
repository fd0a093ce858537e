"""Losses on the flow of the solution procedure between two layers (Yim et al., CVPR 2017)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_same_shape
from abflax.losses.dtypes import at_least_float32
from abflax.losses.features import positions_pooled


def gram_between(first: jax.Array, second: jax.Array) -> jax.Array:
    """Computes G = F₁ᵀF₂/(HW) for each example, with each tap F as an [HW, C] matrix.

    If the two taps differ in height and width, the larger one is average-pooled to the smaller
    one's size, H×W.

    Args:
      first: F₁ `[batch, height, width, C₁]` or `[batch, tokens, C₁]`, whose HW are the tokens.
      second: F₂ `[batch, height', width', C₂]` or `[batch, tokens', C₂]` of the same network, see
        `positions_pooled`.

    Returns:
      `[batch, C₁, C₂]`, at least float32.

    Raises:
      ValueError: as `positions_pooled`.

    References:
      Yim et al., A Gift from Knowledge Distillation, CVPR 2017, equation (1).
    """
    first, second = positions_pooled(first, second)
    positions = first.shape[1] * first.shape[2]
    # Accelerators multiply float32 matrices in lower precision by default.
    return jnp.einsum("bhwc,bhwd->bcd", first, second, precision="highest") / positions


def fsp(student_gram: jax.Array, teacher_gram: jax.Array) -> jax.Array:
    """Computes the mean over a Gram matrix of (G_S − G_T)², for each example.

    Args:
      student_gram: G_S `[batch, C₁, C₂]`, from `gram_between`.
      teacher_gram: G_T of the same shape.

    Returns:
      `[batch]`, at least float32.

    Raises:
      ValueError: if the shapes differ, or the arrays are not Gram matrices.

    References:
      Yim et al., CVPR 2017, equation (2), with a mean over the entries instead of the sum.
    """
    student_gram, teacher_gram = at_least_float32(student_gram), at_least_float32(teacher_gram)
    require_same_shape("fsp", student_gram, teacher_gram)
    if student_gram.ndim != 3 or not all(student_gram.shape[1:]):
        raise InputError(f"fsp: Gram matrices are [batch, C₁, C₂], not {student_gram.shape}")
    return jnp.mean(jnp.square(student_gram - teacher_gram), axis=(-2, -1))
