"""Compares taps neuron by neuron, and helps all losses on feature maps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_same_shape
from abflax.losses.dtypes import at_least_float32

_SMOOTHING = 1e-3  # ε of `feature_difference` for p < 1, in units of pre-activation


def feature_difference(student: jax.Array, teacher: jax.Array, power: float = 2.0) -> jax.Array:
    """Computes |σ(T) − σ(S)|^p, elementwise; smoothed at 0 for p < 1.

    σ is the ReLU. With d = σ(T) − σ(S):

    * p >= 1: exactly |d|^p. The gradient at d = 0 is 0, also for p = 1.
    * p < 1: (d² + ε²)^(p/2) − ε^p with ε = 1e-3, because the gradient of |d|^p is unbounded near
      0. The value lies between |d|^p − ε^p and |d|^p, and is 0 at d = 0. The gradient in d is
      p·d·(d² + ε²)^(p/2 − 1). It is continuous, 0 at d = 0, and below p·ε^(p−1) everywhere. It
      equals the gradient of |d|^p times (1 + ε²/d²)^(p/2 − 1).

    Args:
      student: pre-activations S, of any shape.
      teacher: pre-activations T of the same shape.
      power: p > 0, a Python number.

    Returns:
      An array of that shape, >= 0, at least float32.

    Raises:
      ValueError: if the shapes differ, or p is not above 0.

    References:
      p = 2: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, equation (3), before
      its sum.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    require_same_shape("feature_difference", student, teacher)
    if not power > 0:
        raise InputError(f"feature_difference: the power must be above 0, not {power}")
    difference = jax.nn.relu(teacher) - jax.nn.relu(student)
    if power == 2:
        return jnp.square(difference)
    if power >= 1:
        # The gradient of jnp.abs at 0 would be 1.
        return (jnp.sign(difference) * difference) ** power
    # Equals the formula above, without its cancellation near 0.
    growth = jnp.expm1(power / 2 * jnp.log1p(jnp.square(difference / _SMOOTHING)))
    return _SMOOTHING**power * growth


def positions_pooled(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Average-pools the larger of two feature maps to the height and width of the smaller.

    Args:
      student: `[batch, height, width, channels]` or `[batch, tokens, features]`.
      teacher: likewise, with channels of its own. The sides of one are whole multiples of the
        other's; see `common_sides`.

    Returns:
      Both maps, with the smaller height and width, at least float32. Tokens are returned as
      `[batch, tokens, 1, features]`, and so is a map that is compared with them.

    Raises:
      ValueError: if an array is not a feature map, the batch sizes differ, or neither can be pooled
        to the other.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    for features in (student, teacher):
        as_map("positions_pooled", features)
    if student.shape[0] != teacher.shape[0]:
        raise InputError(
            f"positions_pooled: the batch sizes of {student.shape} and {teacher.shape} differ"
        )
    sides = common_sides(student.shape[1:-1], teacher.shape[1:-1])
    if sides is None:
        raise InputError(
            f"positions_pooled: of {student.shape} and {teacher.shape}, neither's height and width "
            "are whole multiples of the other's"
        )
    if teacher.shape[1:-1] == sides:
        student = pooled_to(student, sides)
    else:
        teacher = pooled_to(teacher, sides)
    return as_map("positions_pooled", student), as_map("positions_pooled", teacher)


def as_map(what: str, features: jax.Array) -> jax.Array:
    """Returns a tap as a feature map: tokens are the positions of a map that is one wide.

    All losses and terms on maps see `[batch, tokens, features]` as `[batch, tokens, 1, features]`.
    Raises `InputError` for other shapes than these and `[batch, height, width, channels]`.
    """
    if features.ndim == 3 and features.shape[1] and features.shape[2]:
        return features[:, :, None, :]
    if features.ndim != 4 or not all(features.shape[1:]):
        raise InputError(
            f"{what}: a feature map is [batch, tokens, features] or [batch, height, width, "
            f"channels], not {features.shape}{', which is empty' * (features.ndim in (3, 4))}"
        )
    return features


def common_sides(ours: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...] | None:
    """Finds the positions to which the larger of two taps is pooled.

    Args:
      ours: (height, width), or (tokens,).
      theirs: likewise.

    Returns:
      Those of the smaller one, where the other's are whole multiples of them. As many tokens as a
      map has positions: (tokens,), because the map is then read row by row. None: neither can be
      pooled to the other.
    """
    if {len(ours), len(theirs)} == {1, 2}:
        return (math.prod(ours),) if math.prod(ours) == math.prod(theirs) else None
    if len(ours) != len(theirs) or not ours:
        return None
    if _divides(theirs, ours):
        return theirs
    return ours if _divides(ours, theirs) else None


def require_feature_map(what: str, features: jax.Array) -> None:
    """Raises `InputError` if an array is not `[batch, height, width, channels]`."""
    if features.ndim != 4 or not all(features.shape[1:]):
        empty = ", which is empty" if features.ndim == 4 else ""
        raise InputError(
            f"{what}: a feature map is [batch, height, width, channels], not {features.shape}"
            f"{empty}"
        )


def unit_length(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Computes x/‖x‖₂ along `axis`; where x is all zero, the result and its gradient are 0.

    x is first divided by its largest entry, so that squares neither overflow nor underflow. If
    all entries are below the smallest normal number, x counts as zero. NaN and infinity give NaN.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    vanishes = largest < jnp.finfo(x.dtype).tiny
    # JAX differentiates both branches of a `where`, so the unused one must be finite too.
    scaled = jnp.where(vanishes, 1.0, x / jnp.where(vanishes, 1.0, largest))
    norm = jnp.sqrt(jnp.sum(jnp.square(scaled), axis=axis, keepdims=True))
    return jnp.where(vanishes, 0.0, scaled / norm)


def _divides(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Tells whether the sides of `large` are whole multiples of those of `small`."""
    return all(
        0 < ours <= theirs and theirs % ours == 0 for ours, theirs in zip(small, large, strict=True)
    )


def pooled_to(features: jax.Array, sides: tuple[int, ...]) -> jax.Array:
    """Average-pools a tap to (height, width), or to (tokens,).

    Neighbouring tokens are averaged. The positions of a map are tokens row by row.
    """
    if len(sides) == 2:
        return average_pooled(features, sides)
    tokens = features.reshape(len(features), -1, 1, features.shape[-1])
    return average_pooled(tokens, (*sides, 1))[:, :, 0]


def average_pooled(features: jax.Array, sides: tuple[int, ...]) -> jax.Array:
    """Averages non-overlapping windows down to `sides`, by a reshape, which is fast on CPUs."""
    batch, height, width, channels = features.shape
    rows, columns = sides
    blocks = (batch, rows, height // rows, columns, width // columns, channels)
    return features.reshape(blocks).mean(axis=(2, 4))
