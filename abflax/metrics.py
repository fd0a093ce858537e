"""Agreement and error, pure functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_same_shape
from abflax.losses.activation import activation_indicator
from abflax.losses.classification import require_labels
from abflax.losses.dtypes import real


def activation_agreement(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The share of neurons on whose indicator two networks agree: 1 − mean |ρ(T) − ρ(S)|.

    Args:
      student: pre-activations or booleans, of any shape; every entry is one neuron on one
        example.
      teacher: the same shape.

    Returns:
      A scalar in [0, 1]; two independent coins agree on a half.

    Raises:
      ValueError: if the shapes differ, or there is no neuron.

    Examples:
      >>> float(activation_agreement(jnp.array([-1.0, 2, 0, 3]), jnp.array([-5.0, 1, 1, 9])))
      0.75
    """
    student, teacher = real(student), real(teacher)
    require_same_shape("activation_agreement", student, teacher)
    if student.size == 0:
        raise InputError("activation_agreement: there is no neuron to agree on")
    agrees = activation_indicator(student) == activation_indicator(teacher)
    return jnp.mean(agrees, dtype=jnp.result_type(float))


def misclassified(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the largest logit is not the label's, for each example.

    Args:
      logits: `[..., classes]`. Of equal largest logits the first counts.
      labels: integers `[...]`.

    Returns:
      Booleans `[...]`.

    Raises:
      ValueError: if the leading shapes differ, there is no class, or the labels are no integers.
    """
    logits, labels = real(logits), jnp.asarray(labels)
    require_labels("misclassified", logits, labels)
    return jnp.argmax(logits, axis=-1) != labels
