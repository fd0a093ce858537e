"""Decoupled knowledge distillation (Zhao et al., CVPR 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from abflax.errors import InputError, require_same_shape
from abflax.losses.classification import past_the_end, require_labels
from abflax.losses.dtypes import at_least_float32


def decoupled_distillation(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> jax.Array:
    """Computes τ²·(α·TCKD + β·NCKD) for each example.

    TCKD is the divergence KL(T ‖ S) of the distributions (p, 1 − p), where p is the label's
    softmax probability at temperature τ. NCKD is the divergence of the softmaxes over the other
    classes alone. KD is TCKD + (1 − p_T)·NCKD.

    This is the authors' published form, τ² included. Two details differ, where they change no
    number but at extremes: the label is left out, where their code subtracts 1000 from its logit;
    and the logarithm of 1 − p is computed from the logits, where theirs is −∞ if 1 − p underflows.

    Args:
      student: logits S `[batch, classes]`.
      teacher: logits T of the same shape.
      labels: integers `[batch]` in `[0, classes)`.
      temperature: τ > 0.
      alpha: α, the weight of the label's class.
      beta: β, the weight of the others. With two classes NCKD is 0.

    Returns:
      `[batch]`, in nats, at least float32; NaN for a label outside the classes.

    Raises:
      ValueError: if the shapes differ, there are fewer than two classes, or the labels are not
        integers.

    References:
      Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, equation (7).
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    labels = jnp.asarray(labels)
    require_same_shape("decoupled_distillation", student, teacher)
    require_labels("decoupled_distillation", student, labels)
    labels = past_the_end(student, labels)
    classes = student.shape[-1]
    if classes < 2:
        raise InputError("decoupled_distillation: a label apart from others needs two classes")
    others = (labels[..., None] + jnp.arange(1, classes)) % classes

    def parts(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes log (p, 1 − p), and the log-softmax over the other classes."""
        logits = jax.nn.log_softmax(logits / temperature)
        rest = jnp.take_along_axis(logits, others, axis=-1)
        label = jnp.take_along_axis(logits, labels[..., None], axis=-1)
        total = jax.nn.logsumexp(rest, axis=-1, keepdims=True)
        return jnp.concatenate([label, total], axis=-1), rest - total

    (ours, our_rest), (theirs, their_rest) = parts(student), parts(teacher)
    divergence = optax.losses.kl_divergence_with_log_targets
    target, others_ = divergence(ours, theirs), divergence(our_rest, their_rest)
    return temperature**2 * (alpha * target + beta * others_)
