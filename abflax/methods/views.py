"""Views: images made from a batch and the teacher, left of the targets, for terms that read them.

A view is a function of (teacher, images, labels, keys) that makes as many images. The teacher's
targets and the student's pass on them are then those of any images. A term names the view that it
reads (`Term.view`), and finds the two networks' passes in `Forward.views`. `TARGET_DOMAIN` is a
view too: images of another data set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from abflax.errors import InputError

Apply = Callable[[jax.Array], jax.Array]
"""A network with its weights, in evaluation mode: images -> logits."""


def boundary_samples(
    teacher: Apply,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    steps: int = 10,
    step_size: float = 0.3,
    bound: float = 2.5,
) -> jax.Array:
    """Moves images to the teacher's decision boundary with another class each.

    For the class t that `draw_other_class` draws, and the label y, x becomes
    clip(x + η·(T_y − T_t + 1e-4)·g/‖g‖₂, −b, b), g = ∇(T_t − T_y), up to `steps` times, as long as
    the teacher's answer is y. An example that the teacher gets wrong stays as it is.

    The teacher is asked, with gradients, until no example moves: about three times with the shipped
    wrn16-2 on CIFAR-10, `steps` times with one that is flat. On CPUs XLA is slow for convolutions'
    gradients in this loop, unless they are `abflax.models.convolution.convolve`.

    Args:
      teacher: normalized images -> logits `[batch, classes]`, in evaluation mode.
      images: normalized, `[batch, height, width, channels]`.
      labels: integers `[batch]`.
      key: one for all, or an array of keys `[batch]`.
      steps: at most.
      step_size: η.
      bound: b, of normalized pixels.

    Returns:
      Images of the same shape. No gradient flows through them.

    Raises:
      ValueError: if the labels are not `[batch]`.

    References:
      Heo, Lee, Yun, Choi, Knowledge Distillation with Adversarial Samples Supporting Decision
      Boundary, AAAI 2019, equation (5), with the constants of its published code.
    """
    if labels.shape != images.shape[:1]:
        raise InputError(f"images {images.shape} need labels [batch], not {labels.shape}")
    images = jax.lax.stop_gradient(images)
    keys = key if key.ndim else jax.random.split(key, len(images))
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    uniform = jax.vmap(lambda each: jax.random.uniform(each, dtype=dtype))(keys)
    others = draw_other_class(teacher(images), uniform)

    # A loop that may end at any step has no gradient, so the weights of a teacher that trains are
    # constants here. Of the same function JAX would remember the weights: `partial` is a new one.
    asked, weights = jax.closure_convert(functools.partial(teacher), images)
    weights = jax.lax.stop_gradient(weights)

    def move(state: tuple[int, jax.Array, Any]) -> tuple[int, jax.Array, Any]:
        count, images, _ = state
        moved = boundary_step(
            lambda x: asked(x, *weights), images, labels, others, step_size, bound
        )
        return count + 1, moved, jnp.any(moved != images)

    start = 0, images, jnp.any(images == images)  # True, and on each device its own
    return jax.lax.while_loop(lambda at: (at[0] < steps) & at[2], move, start)[1]


def boundary_step(
    teacher: Apply,
    images: jax.Array,
    labels: jax.Array,
    others: jax.Array,
    step_size: float = 0.3,
    bound: float = 2.5,
) -> jax.Array:
    """Makes one step of `boundary_samples` towards the classes `others`."""

    def difference(images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = teacher(images)
        rows = jnp.arange(len(logits))
        lead = logits[rows, labels] - logits[rows, others]
        return -lead.sum(), (lead, jnp.argmax(logits, axis=-1) == labels)

    gradient, (lead, inside) = jax.grad(difference, has_aux=True)(images)
    squares = jnp.sum(jnp.square(gradient), axis=(1, 2, 3))
    factor = jnp.where(inside, step_size * (lead + 1e-4), 0)
    factor = factor * jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
    moved = jnp.clip(images + factor[:, None, None, None] * gradient, -bound, bound)
    moved = jnp.where(inside[:, None, None, None], moved, images)
    return jax.lax.stop_gradient(moved.astype(images.dtype))


def draw_other_class(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws a class other than the best, with the probabilities of the softmax.

    It is the first class, from the second likeliest on, at which the sum of the probabilities
    reaches that share of their total.

    Args:
      logits: `[batch, classes]`.
      uniform: numbers in [0, 1), `[batch]`.

    Returns:
      Integers `[batch]`.
    """
    order = jnp.argsort(-logits, axis=-1)[:, 1:]
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
    sums = jnp.cumsum(probabilities, axis=-1)
    reached = sums >= uniform[:, None] * sums[:, -1:]
    return jnp.take_along_axis(order, jnp.argmax(reached, axis=-1)[:, None], axis=-1)[:, 0]


def boundary_base(
    student: jax.Array, teacher: jax.Array, labels: jax.Array, size: int
) -> jax.Array:
    """Chooses the examples whose boundary samples teach: both networks are right on them.

    Of more than `size`, those on which Σ_{c ≠ label} (softmax(T)_c − softmax(S)_c)² is largest.

    Args:
      student: logits S `[batch, classes]`.
      teacher: logits T of the same shape.
      labels: integers `[batch]`.
      size: the most that are chosen.

    Returns:
      Booleans `[batch]`.
    """
    right = (jnp.argmax(student, axis=-1) == labels) & (jnp.argmax(teacher, axis=-1) == labels)
    squares = jnp.square(jax.nn.softmax(teacher) - jax.nn.softmax(student))
    others = jnp.arange(student.shape[-1]) != labels[:, None]
    score = jnp.where(right, jnp.sum(jnp.where(others, squares, 0), axis=-1), -1)
    rank = jnp.argsort(jnp.argsort(-score))
    return right & (rank < size)


TARGET_DOMAIN = "target-domain"
"""The view that is no function of the batch: a batch of the unlabelled images of `target_data`."""

VIEWS: Mapping[str, Callable[[Apply, jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "boundary": boundary_samples,
}
"""Name -> a view: (teacher, images, labels, a key for each example) -> images."""
