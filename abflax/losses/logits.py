"""Compares logits as numbers (Srinivas, Fleuret, ICML 2018)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import require_same_shape
from abflax.losses.classification import require_classes
from abflax.losses.dtypes import at_least_float32


def centred_logits_difference(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes ((S − mean S) − (T − mean T))², elementwise; the means are over the classes.

    A constant added to all logits of an example changes neither its probabilities nor this loss.

    Args:
      student: logits S `[..., classes]`.
      teacher: logits T of the same shape.

    Returns:
      An array of that shape, at least float32.

    Raises:
      ValueError: if the shapes differ, or there is no class.

    References:
      Srinivas, Fleuret, Knowledge Transfer with Jacobian Matching, ICML 2018.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    require_same_shape("centred_logits_difference", student, teacher)
    require_classes("centred_logits_difference", student)
    difference = student - teacher
    return jnp.square(difference - jnp.mean(difference, axis=-1, keepdims=True))
