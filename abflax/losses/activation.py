"""Losses on activation boundaries: whether a neuron fires, not how strongly (Heo et al. 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import require_same_shape
from abflax.losses.dtypes import at_least_float32, real, require_broadcastable


def activation_indicator(x: jax.Array) -> jax.Array:
    """Computes whether each neuron fires: ρ(x) = 1 where x > 0, else 0.

    Args:
      x: pre-activations of any shape. A boolean array is already an indicator and is returned
        unchanged.

    Returns:
      Booleans of the same shape. ρ(0) = 0 and ρ(NaN) = 0.

    Raises:
      ValueError: if x is complex.

    References:
      Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
      Neurons, AAAI 2019, equation (2).
    """
    x = real(x)
    return x if x.dtype == jnp.bool_ else x > 0


def activation_transfer_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes where the two networks' indicators differ: |ρ(T) − ρ(S)|, elementwise.

    This is the loss that the method aims at. Its gradient is zero almost everywhere, so it is
    only a measure; training minimizes `activation_transfer_hinge` instead.

    Args:
      student: pre-activations S, or booleans, of any shape.
      teacher: pre-activations T, or booleans, of the same shape.

    Returns:
      An array of that shape: 0. where the indicators agree and 1. where they do not, in the
      student's dtype, at least float32.

    Raises:
      ValueError: if the shapes differ, or an array is complex.

    References:
      Heo et al., AAAI 2019, equation (3), before its norm over neurons.

    Examples:
      A neuron at exactly zero does not fire:

      >>> student, teacher = jnp.array([-2.0, 0.0, 0.5]), jnp.array([-9.0, 0.1, 7.0])
      >>> activation_transfer_loss(student, teacher).tolist()
      [0.0, 1.0, 0.0]
    """
    student = real(student)
    agree = indicators_agree("activation_transfer_loss", student, teacher)
    return jnp.logical_not(agree).astype(jnp.promote_types(student.dtype, jnp.float32))


def indicators_agree(what: str, student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes ρ(S) = ρ(T), elementwise booleans; the error messages begin with `what`."""
    student, teacher = real(student), real(teacher)
    require_same_shape(what, student, teacher)
    return activation_indicator(student) == activation_indicator(teacher)


def activation_transfer_hinge(
    student: jax.Array, teacher: jax.Array, margin: float | jax.Array = 1.0
) -> jax.Array:
    """Computes the trainable surrogate ρ(T)·σ(μ − S)² + (1 − ρ(T))·σ(μ + S)², elementwise.

    σ is the ReLU. The loss pushes a student's neuron to at least μ where the teacher's neuron
    fires, and to at most −μ where it does not. It is zero beyond the margin. No gradient flows
    into the teacher.

    Args:
      student: pre-activations S, of any shape.
      teacher: pre-activations T of the same shape, or their indicators as booleans.
      margin: μ, in units of pre-activation; an array is broadcast to the shape of S.

    Returns:
      An array of the student's shape, >= 0, in the student's dtype, at least float32. Its
      gradient is continuous: −2(μ − S) where the teacher fires and S < μ, 2(μ + S) where the
      teacher does not fire and S > −μ, else 0. (The paper's equation (5) misses the sign of the
      first case.)

    Raises:
      ValueError: if the shapes differ, the margin cannot be broadcast, or an array is complex.

    References:
      Heo et al., AAAI 2019, equation (4).

    Examples:
      The loss is zero only where the student is on the teacher's side by the margin:

      >>> student = jnp.array([-1.0, 0.0, 0.5, 1.0, 2.0])
      >>> activation_transfer_hinge(student, student > -9).tolist()  # the teacher fires
      [4.0, 1.0, 0.25, 0.0, 0.0]
      >>> activation_transfer_hinge(student, student > 9).tolist()  # the teacher does not fire
      [0.0, 1.0, 2.25, 4.0, 9.0]

      The loss is not reduced; the caller sums it:

      >>> loss = lambda student: activation_transfer_hinge(student, student > -9).sum()
      >>> jax.grad(loss)(student).tolist()
      [-4.0, -2.0, -1.0, 0.0, 0.0]
    """
    student, teacher = at_least_float32(student), real(teacher)
    require_same_shape("activation_transfer_hinge", student, teacher)
    require_broadcastable("activation_transfer_hinge: a margin", margin, student.shape)
    shortfall = jnp.where(activation_indicator(teacher), margin - student, margin + student)
    return jnp.square(jax.nn.relu(shortfall))
