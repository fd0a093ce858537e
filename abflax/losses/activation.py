"""Activation boundaries: whether a neuron fires, not how strongly (Heo et al., AAAI 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import require_same_shape
from abflax.losses.dtypes import at_least_float32, real, require_spreads


def activation_indicator(x: jax.Array) -> jax.Array:
    """Whether each neuron fires: ρ(x) = 1 where x > 0, else 0.

    Args:
      x: pre-activations of any shape. A boolean array is an indicator already and is returned
        as it is.

    Returns:
      Booleans of the same shape. ρ(0) = 0, and NaN does not fire.

    Raises:
      ValueError: for complex numbers.

    References:
      Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
      Neurons, AAAI 2019, equation (2).
    """
    x = real(x)
    return x if x.dtype == jnp.bool_ else x > 0


def activation_transfer_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Where the two networks' indicators differ: |ρ(T) − ρ(S)|, elementwise.

    The ideal loss of the method. Its gradient is zero almost everywhere, so it measures; what
    trains is `activation_transfer_hinge`.

    Args:
      student: pre-activations S, or booleans, of any shape.
      teacher: pre-activations T, or booleans, of the same shape.

    Returns:
      An array of that shape, 0. where the indicators agree and 1. where they do not, in the
      student's dtype, float32 at least.

    Raises:
      ValueError: if the shapes differ, or for complex numbers.

    References:
      Heo et al., AAAI 2019, equation (3), before its norm over neurons.

    Examples:
      A neuron at exactly zero does not fire:

      >>> student, teacher = jnp.array([-2.0, 0.0, 0.5]), jnp.array([-9.0, 0.1, 7.0])
      >>> activation_transfer_loss(student, teacher).tolist()
      [0.0, 1.0, 0.0]
    """
    student, teacher = real(student), real(teacher)
    require_same_shape("activation_transfer_loss", student, teacher)
    differs = activation_indicator(student) != activation_indicator(teacher)
    return differs.astype(jnp.promote_types(student.dtype, jnp.float32))


def activation_transfer_hinge(
    student: jax.Array, teacher: jax.Array, margin: float | jax.Array = 1.0
) -> jax.Array:
    """The trainable stand-in: ρ(T)·σ(μ − S)² + (1 − ρ(T))·σ(μ + S)², elementwise.

    σ is the ReLU. A student's neuron is pushed to at least μ where the teacher's fires, and to
    at most −μ where it does not; beyond the margin nothing pushes. No gradient flows into the
    teacher.

    Args:
      student: pre-activations S, of any shape.
      teacher: pre-activations T of the same shape, or booleans already taken from them.
      margin: μ, in units of pre-activation; an array spreads over S.

    Returns:
      An array of the student's shape, >= 0, in the student's dtype, float32 at least. Its
      gradient is continuous: −2(μ − S) where the teacher fires and S < μ, 2(μ + S) where it
      does not and S > −μ, else 0. (The paper's equation (5) drops the sign of the first.)

    Raises:
      ValueError: if the shapes differ, a margin does not spread, or for complex numbers.

    References:
      Heo et al., AAAI 2019, equation (4).

    Examples:
      The right side costs something too until the margin is reached, and then nothing:

      >>> student = jnp.array([-1.0, 0.0, 0.5, 1.0, 2.0])
      >>> activation_transfer_hinge(student, student > -9).tolist()  # the teacher fires
      [4.0, 1.0, 0.25, 0.0, 0.0]
      >>> activation_transfer_hinge(student, student > 9).tolist()  # it does not
      [0.0, 1.0, 2.25, 4.0, 9.0]

      It is not reduced, so the objective's sum is the caller's:

      >>> loss = lambda student: activation_transfer_hinge(student, student > -9).sum()
      >>> jax.grad(loss)(student).tolist()
      [-4.0, -2.0, -1.0, 0.0, 0.0]
    """
    student, teacher = at_least_float32(student), real(teacher)
    require_same_shape("activation_transfer_hinge", student, teacher)
    require_spreads("activation_transfer_hinge: a margin", margin, student.shape)
    shortfall = jnp.where(activation_indicator(teacher), margin - student, margin + student)
    return jnp.square(jax.nn.relu(shortfall))
