"""Losses on logits, one number per example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from abflax.errors import InputError, require_same_shape
from abflax.losses.dtypes import at_least_float32, require_broadcastable


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes −log softmax(logits)[label] for each example.

    Args:
      logits: `[..., classes]`.
      labels: integers `[...]` in `[0, classes)`.

    Returns:
      `[...]`, in nats, at least float32; NaN for a label outside the classes.

    Raises:
      ValueError: if the leading shapes differ, there is no class, or the labels are not integers.
    """
    logits, labels = at_least_float32(logits), jnp.asarray(labels)
    require_labels("cross_entropy", logits, labels)
    labels = past_the_end(logits, labels)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def knowledge_distillation(
    student: jax.Array, teacher: jax.Array, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """Computes KL(softmax(T/τ) ‖ softmax(S/τ)), summed over the classes, for each example.

    The factor τ² is not applied. (Hinton et al. multiply by it to keep the gradient's size
    independent of τ.) A method that uses it applies it itself.

    Args:
      student: logits S `[..., classes]`.
      teacher: logits T of the same shape.
      temperature: τ > 0; an array is broadcast to the shape of S.

    Returns:
      `[...]`, in nats, >= 0, at least float32.

    Raises:
      ValueError: if the shapes differ, the temperature cannot be broadcast, or there is no class.

    References:
      Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    require_same_shape("knowledge_distillation", student, teacher)
    require_classes("knowledge_distillation", student)
    require_broadcastable("knowledge_distillation: a temperature", temperature, student.shape)
    return optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)
    )


def require_classes(what: str, logits: jax.Array) -> None:
    """Raises `InputError` if an array is not `[..., classes]` with at least one class."""
    if logits.ndim < 1 or not logits.shape[-1]:
        raise InputError(f"{what}: logits are [..., classes], not {logits.shape}")


def require_labels(what: str, logits: jax.Array, labels: jax.Array) -> None:
    """Raises `InputError` unless there is one integer label for each row of logits."""
    require_classes(what, logits)
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"{what}: logits {logits.shape} need labels of shape {logits.shape[:-1]}, "
            f"not {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"{what}: labels are integers, not {labels.dtype}")


def past_the_end(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Replaces negative labels by the number of classes.

    As an index that gives NaN, where a negative one would count from the end.
    """
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    return jnp.where(labels < 0, logits.shape[-1], labels)
