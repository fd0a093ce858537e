"""Pure functions of arrays: who fires where, and what that has to do with error.

A neuron is one entry of a tap beside the batch: of a map `[batch, height, width, channels]`, each
channel at each position.
"""

from __future__ import annotations

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from abflax.errors import InputError, require_same_shape
from abflax.losses import activation_indicator


def matching(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """ρ(T) = ρ(S), neuron by neuron; its mean is `abflax.metrics.activation_agreement`.

    Args:
      student: pre-activations or booleans, of any shape.
      teacher: the same shape.

    Returns:
      Booleans of that shape.

    Raises:
      ValueError: if the shapes differ.
    """
    student, teacher = jnp.asarray(student), jnp.asarray(teacher)
    require_same_shape("matching", student, teacher)
    return activation_indicator(student) == activation_indicator(teacher)


def by_channel(per_neuron: np.ndarray) -> np.ndarray:
    """The mean over positions, `[…, channels]` -> `[channels]`."""
    per_neuron = np.asarray(per_neuron)
    return per_neuron.mean(axis=tuple(range(per_neuron.ndim - 1)))


def by_class(per_example: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Averages over each class's examples, `[examples]` -> `[num_classes]`.

    A class without examples has NaN.

    Raises:
      ValueError: if there is not one label for each example.
    """
    per_example, labels = np.asarray(per_example, np.float64), np.asarray(labels)
    _require_pairs("by_class", per_example, labels)
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=per_example, minlength=num_classes)
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def dead_neurons(firing_rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which neurons never fire, and which always do: booleans of the rate's shape.

    On ReLU networks the first contribute nothing, the second are linear; neither has a boundary
    among the images.
    """
    firing_rate = np.asarray(firing_rate)
    return firing_rate == 0, firing_rate == 1


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorSplit:
    """Examples in groups of rising agreement, `[groups]` each.

    Attributes:
      agreement: the group's mean agreement.
      examples: how many there are.
      error: the share of them that is wrong.
      standard_error: of that share, √(p(1−p)/examples).
    """

    agreement: np.ndarray
    examples: np.ndarray
    error: np.ndarray
    standard_error: np.ndarray


def error_by_agreement(agreement: np.ndarray, wrong: np.ndarray, groups: int = 5) -> ErrorSplit:
    """How error splits by quantiles of agreement.

    The examples are sorted by their agreement (ties stay in order) and cut into groups whose
    sizes differ by one at most: the first holds those on which the activation patterns match
    worst, the last those on which they match best. It is a description and no cause: images that
    are hard for any network may be both; so the teacher's error belongs beside the student's.

    Args:
      agreement: `[examples]`, each example's share of matching neurons.
      wrong: booleans `[examples]`.
      groups: how many.

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
    """|s| / ‖∂s/∂x‖₂: how far the image is from the neuron's boundary s = 0, to first order.

    A ReLU network is linear between boundaries, so the distance is exact wherever the way to the
    boundary crosses none of the layers before; otherwise it is an estimate that may err to either
    side. A neuron that depends on nothing is infinitely far (0/0 included).

    Args:
      values: s, `[batch]`.
      gradients: ∂s/∂x, `[batch, …]`.

    Returns:
      `[batch]`, in the units of x.
    """
    squares = jnp.square(gradients).sum(axis=tuple(range(1, gradients.ndim)))
    constant = squares == 0
    return jnp.where(constant, jnp.inf, jnp.abs(values) / jnp.sqrt(jnp.where(constant, 1, squares)))


def pattern_digests(bits: np.ndarray) -> list[bytes]:
    """Computes sixteen bytes that identify each example's activation pattern.

    Two of 2¹⁴ different patterns have the same bytes with probability 2⁻¹⁰¹.

    Args:
      bits: `[batch, …]`, booleans, or bytes from `np.packbits`.
    """
    rows = np.ascontiguousarray(bits).reshape(len(bits), -1)
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def _require_pairs(what: str, values: np.ndarray, others: np.ndarray) -> None:
    if values.ndim != 1 or values.shape != others.shape:
        raise InputError(f"{what}: {values.shape} and {others.shape} should be [examples] both")
