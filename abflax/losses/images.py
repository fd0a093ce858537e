"""Losses of images that are made by a network's gradients, and not of the network."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_same_shape
from abflax.losses.classification import require_classes
from abflax.losses.dtypes import at_least_float32, require_broadcastable

_LEAST, _MOST = 0.01, 0.99  # the bounds of probabilities in the published competition


def batch_norm_statistics_loss(
    inputs: jax.Array, mean: jax.Array, variance: jax.Array
) -> jax.Array:
    """Computes ‖v − var x‖₂ + ‖m − mean x‖₂ of one batch norm.

    It says how far the inputs x are from the data that the network was trained on. Their statistics
    are over all axes but the last, the variance is the biased one.
    They relate all examples, so this is one number of the whole batch. Where a norm is 0, so is its
    gradient.

    Args:
      inputs: x `[batch, ..., channels]`, what the batch norm normalizes.
      mean: m `[channels]`, its running mean.
      variance: v `[channels]`, its running variance.

    Returns:
      A scalar, at least float32.

    Raises:
      ValueError: if the inputs have no batch, or the statistics are not `[channels]`.

    References:
      Yin et al., Dreaming to Distill, CVPR 2020, equation (4): norms, not their squares.
    """
    inputs, mean, variance = (at_least_float32(each) for each in (inputs, mean, variance))
    if inputs.ndim < 2 or not inputs.size:
        raise InputError(
            f"batch_norm_statistics_loss: inputs are [batch, ..., channels], not {inputs.shape}"
        )
    for statistic in (mean, variance):
        if statistic.shape != inputs.shape[-1:]:
            raise InputError(
                f"batch_norm_statistics_loss: statistics of shape {statistic.shape} do not fit "
                f"inputs {inputs.shape}"
            )
    axes = tuple(range(inputs.ndim - 1))
    return _norm(variance - jnp.var(inputs, axes)) + _norm(mean - jnp.mean(inputs, axes))


def total_variation(images: jax.Array, order: int = 2) -> jax.Array:
    """Adds up how much neighbouring pixels differ: to the right, below, and along both diagonals.

    Each of the four has the mean absolute difference for order 1, and for order 2 the square root
    of the sum of squares over the whole batch. Where that root is 0, so is its gradient.

    Args:
      images: `[batch, height, width, channels]`.
      order: 1 or 2.

    Returns:
      A scalar of the whole batch, at least float32; 0 for images of one colour.

    Raises:
      ValueError: if the shape is another, an image has a side of 1, or the order is neither.

    References:
      Yin et al., Dreaming to Distill, CVPR 2020, equation (3), and its published code.
    """
    images = at_least_float32(images)
    if images.ndim != 4 or not images.size or min(images.shape[1:3]) < 2:
        raise InputError(
            "total_variation: images are [batch, height, width, channels] with sides of 2 at "
            f"least, not {images.shape}"
        )
    if order not in (1, 2):
        raise InputError(f"total_variation: the order is 1 or 2 (an integer), not {order}")
    differences = (
        images[:, :, :-1] - images[:, :, 1:],
        images[:, :-1] - images[:, 1:],
        images[:, :-1, :-1] - images[:, 1:, 1:],
        images[:, :-1, 1:] - images[:, 1:, :-1],
    )
    if order == 1:
        # Not jnp.abs, whose gradient at 0 is not 0.
        signs = [jax.lax.stop_gradient(jnp.sign(each)) for each in differences]
        means = [jnp.mean(each * sign) for each, sign in zip(differences, signs, strict=True)]
        return jnp.stack(means).sum()
    return jnp.stack([_norm(each) for each in differences]).sum()


def agreement_of_logits(
    student: jax.Array, teacher: jax.Array, temperature: float | jax.Array = 3.0
) -> jax.Array:
    """Computes 1 − ½KL(M ‖ P) − ½KL(M ‖ Q): how much two networks agree, for each example.

    P and Q are softmax(S/τ) and softmax(T/τ), M is their mean, and then all three are clipped to
    [0.01, 0.99]. Images on which the two agree little teach the student most, so this is made
    small. The arguments of KL are the other way round than in the Jensen-Shannon divergence, as in
    the published code, which clips the mean over the batch to [0, 1] besides.

    Args:
      student: logits S `[..., classes]`.
      teacher: logits T of the same shape.
      temperature: τ > 0; an array is broadcast to the shape of S.

    Returns:
      `[...]`, about 1 and below, at least float32.

    Raises:
      ValueError: if the shapes differ, the temperature cannot be broadcast, or there is no class.

    References:
      Yin et al., Dreaming to Distill, CVPR 2020, equation (8), and its published code.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    require_same_shape("agreement_of_logits", student, teacher)
    require_classes("agreement_of_logits", student)
    require_broadcastable("agreement_of_logits: a temperature", temperature, student.shape)
    ours, theirs = (jax.nn.softmax(each / temperature) for each in (student, teacher))
    mean = (ours + theirs) / 2
    ours, theirs, mean = (jnp.clip(each, _LEAST, _MOST) for each in (ours, theirs, mean))
    divergence = mean * (2 * jnp.log(mean) - jnp.log(ours) - jnp.log(theirs))
    return 1 - jnp.sum(divergence, axis=-1) / 2


def _norm(x: jax.Array) -> jax.Array:
    """Computes ‖x‖₂ over all entries, with the gradient 0 at 0."""
    squares = jnp.sum(jnp.square(x))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
