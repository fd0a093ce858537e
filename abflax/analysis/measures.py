"""Relates activation patterns to errors, by pure functions of arrays.

A neuron is one entry of a tap: in a map `[batch, height, width, channels]`, each channel at each
position is a neuron.
"""

from __future__ import annotations

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from abflax.errors import InputError
from abflax.losses.activation import indicators_agree


def matching(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes ρ(T) = ρ(S), elementwise.

    Both arguments are pre-activations or booleans, of the same shape; the result is boolean. Its
    mean is `abflax.metrics.activation_agreement`.

    Raises:
      ValueError: if the shapes differ.
    """
    return indicators_agree("matching", student, teacher)


def by_channel(per_neuron: np.ndarray) -> np.ndarray:
    """Averages over positions, `[…, channels]` -> `[channels]`."""
    per_neuron = np.asarray(per_neuron)
    return per_neuron.mean(axis=tuple(range(per_neuron.ndim - 1)))


def by_class(per_example: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Averages over each class's examples, `[examples]` -> `[num_classes]`.

    The average of a class without examples is NaN.

    Raises:
      ValueError: if there is not one label for each example.
    """
    per_example, labels = np.asarray(per_example, np.float64), np.asarray(labels)
    _require_pairs("by_class", per_example, labels)
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=per_example, minlength=num_classes)
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def dead_neurons(firing_rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the neurons that never fire, and those that always fire.

    In a ReLU network the former contribute nothing and the latter are linear. Neither has a
    boundary among the images.

    Args:
      firing_rate: the share of examples on which each neuron fires.

    Returns:
      Two boolean arrays of the shape of `firing_rate`.
    """
    firing_rate = np.asarray(firing_rate)
    return firing_rate == 0, firing_rate == 1


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorSplit:
    """The error in groups of examples with increasing agreement; arrays `[groups]`.

    Attributes:
      agreement: the mean agreement of each group.
      examples: the number of examples.
      error: the share p of wrong predictions.
      standard_error: of that share, √(p(1−p)/examples).
    """

    agreement: np.ndarray
    examples: np.ndarray
    error: np.ndarray
    standard_error: np.ndarray


def error_by_agreement(agreement: np.ndarray, wrong: np.ndarray, groups: int = 5) -> ErrorSplit:
    """Computes the error by quantiles of agreement.

    The examples are sorted by agreement (ties stay in order) and cut into groups whose sizes
    differ by at most one. The first group has the lowest agreement, the last the highest.
    A correlation does not show a cause: on images that are hard for any network both the error may
    be high and the agreement low. So compare with the teacher's error.

    Args:
      agreement: `[examples]`, each example's share of matching neurons.
      wrong: booleans `[examples]`.
      groups: the number of groups.

    Raises:
      ValueError: if the shapes differ, or there are fewer examples than groups.
    """
    agreement, wrong = np.asarray(agreement, np.float64), np.asarray(wrong)
    _require_pairs("error_by_agreement", agreement, wrong)
    if not 1 <= groups <= len(agreement):
        raise InputError(f"{len(agreement)} examples cannot make {groups} groups")
    parts = np.array_split(np.argsort(agreement, kind="stable"), groups)
    examples = np.array([len(part) for part in parts])
    error = np.array([wrong[part].mean() for part in parts])
    return ErrorSplit(
        agreement=np.array([agreement[part].mean() for part in parts]),
        examples=examples,
        error=error,
        standard_error=np.sqrt(error * (1 - error) / examples),
    )


def first_order_distance(values: jax.Array, gradients: jax.Array) -> jax.Array:
    """Computes |s| / ‖∂s/∂x‖₂, the image's distance to the boundary s = 0, to first order.

    A ReLU network is linear between boundaries. So the distance is exact if the path to the
    boundary crosses no boundary of the layers before; else it may be too large or too small. The
    distance is infinite where the gradient is zero.

    Args:
      values: the pre-activations s of one neuron, `[batch]`.
      gradients: ∂s/∂x, `[batch, …]`.

    Returns:
      `[batch]`, in the units of x.
    """
    squares = jnp.square(gradients).sum(axis=tuple(range(1, gradients.ndim)))
    constant = squares == 0
    return jnp.where(constant, jnp.inf, jnp.abs(values) / jnp.sqrt(jnp.where(constant, 1, squares)))


def pattern_digests(bits: np.ndarray) -> list[bytes]:
    """Computes sixteen bytes that identify each example's activation pattern, a row of bits.

    The bits are booleans `[batch, …]`, or bytes from `np.packbits`. Two of 2¹⁴ different patterns
    have the same bytes with probability 2⁻¹⁰¹.
    """
    rows = np.ascontiguousarray(bits).reshape(len(bits), -1)
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def _require_pairs(what: str, values: np.ndarray, others: np.ndarray) -> None:
    if values.ndim != 1 or values.shape != others.shape:
        raise InputError(f"{what}: {values.shape} and {others.shape} should be [examples] both")
