"""Agreement and error, as pure functions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from abflax.errors import InputError
from abflax.losses.activation import indicators_agree
from abflax.losses.classification import require_labels
from abflax.losses.dtypes import real

Metric = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits `[batch, classes]`, labels `[batch]`) -> a number or boolean for each example."""


def activation_agreement(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes the share of neurons whose indicators agree: 1 − mean |ρ(T) − ρ(S)|.

    Args:
      student: pre-activations or booleans, of any shape; every entry is one neuron on one
        example.
      teacher: the same of the teacher, of the same shape.

    Returns:
      A scalar in [0, 1]. Two independent fair coins have an agreement of 0.5.

    Raises:
      ValueError: if the shapes differ, or there is no neuron.

    Examples:
      >>> float(activation_agreement(jnp.array([-1.0, 2, 0, 3]), jnp.array([-5.0, 1, 1, 9])))
      0.75
    """
    agree = indicators_agree("activation_agreement", student, teacher)
    if agree.size == 0:
        raise InputError("activation_agreement: there are no neurons to compare")
    return jnp.mean(agree, dtype=jnp.result_type(float))


def misclassified(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes for each example whether the largest logit is not the label's.

    Args:
      logits: `[..., classes]`. If several logits are largest, the first one counts.
      labels: integers `[...]`.

    Returns:
      Booleans `[...]`.

    Raises:
      ValueError: if the leading shapes differ, there is no class, or the labels are not integers.
    """
    logits, labels = real(logits), jnp.asarray(labels)
    require_labels("misclassified", logits, labels)
    return jnp.argmax(logits, axis=-1) != labels
