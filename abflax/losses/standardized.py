"""Losses on logits or probabilities up to shift and scale: standardized logits, DIST."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_same_shape
from abflax.losses.classification import require_classes
from abflax.losses.dtypes import at_least_float32


def standardized_logits(logits: jax.Array) -> jax.Array:
    """Computes (x − mean x)/(s + 1e-7) for each example; s is its standard deviation.

    s² is divided by C − 1, for C classes, as in the authors' code. Where all of an example's
    logits are equal but for rounding, the result and its gradient are 0; theirs divides by 1e-7
    there, so that its gradient is of the order of 1e6.

    Args:
      logits: `[batch, classes]`.

    Returns:
      `[batch, classes]`, at least float32.

    Raises:
      ValueError: if there are fewer than two classes.

    References:
      Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
    """
    logits = at_least_float32(logits)
    require_classes("standardized_logits", logits)
    if logits.shape[-1] < 2:
        raise InputError("standardized_logits: a standard deviation needs two classes")
    deviation, norm, constant = _deviation(logits, axis=-1)
    scale = norm / jnp.sqrt(jnp.asarray(logits.shape[-1] - 1, logits.dtype)) + 1e-7
    return jnp.where(constant, 0.0, deviation / scale)


def correlation_distillation(
    student: jax.Array, teacher: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Computes τ²·(1 − ρ) between the networks' probabilities: for each example and each class.

    ρ is Pearson's correlation, with 1e-8 added to its denominator, of two rows (an example's
    probabilities) or two columns (a class's, over the batch) of softmax(S/τ) and softmax(T/τ). It
    is 0, with gradient 0, where a row or column is constant but for rounding.

    This is the authors' published code; their paper's listing has no τ². Their gradient at a
    constant row is of the order of 1e7.

    Args:
      student: logits S `[batch, classes]`.
      teacher: logits T of the same shape.
      temperature: τ > 0.

    Returns:
      Inter-class `[batch]` and intra-class `[classes]`, at least float32. The classes' numbers
      depend on the whole batch.

    Raises:
      ValueError: if the shapes differ, or are not `[batch, classes]`.

    References:
      Huang et al., Knowledge Distillation from a Stronger Teacher, NeurIPS 2022.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    require_same_shape("correlation_distillation", student, teacher)
    require_classes("correlation_distillation", student)
    if student.ndim != 2:
        raise InputError(
            f"correlation_distillation: logits are [batch, classes], not {student.shape}"
        )
    ours, theirs = (jax.nn.softmax(x / temperature) for x in (student, teacher))
    inter, intra = (1 - _correlation(ours, theirs, axis) for axis in (1, 0))
    return temperature**2 * inter, temperature**2 * intra


def _correlation(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Computes Pearson's correlation along an axis; 0, with gradient 0, for constants."""
    (x, x_norm, x_constant), (y, y_norm, y_constant) = (_deviation(z, axis) for z in (x, y))
    product = jnp.sum(x * y, axis=axis, keepdims=True)
    correlation = product / (x_norm * y_norm + 1e-8)
    return jnp.where(x_constant | y_constant, 0.0, correlation).squeeze(axis)


def _deviation(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes x − mean x, its norm, and where x is constant but for rounding or underflow.

    The norm of a constant is not used. The deviation of a constant is 0, with gradient 0.
    """
    deviation = x - x.mean(axis=axis, keepdims=True)
    largest, size = (jnp.max(jnp.abs(z), axis=axis, keepdims=True) for z in (deviation, x))
    limits = jnp.finfo(x.dtype)
    # Of smaller deviations the squares underflow, and the gradient of the norm is not finite.
    constant = largest <= jnp.maximum(8 * limits.eps * size, limits.tiny**0.5)
    deviation = jnp.where(constant, 0.0, deviation)
    norm = jnp.sqrt(
        jnp.sum(jnp.square(jnp.where(constant, 1.0, deviation)), axis=axis, keepdims=True)
    )
    return deviation, norm, constant
