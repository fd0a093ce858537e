"""The loss of knowledge review (Chen et al., CVPR 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from abflax.errors import require_same_shape
from abflax.losses.dtypes import at_least_float32
from abflax.losses.features import as_map

_SIDES = (4, 2, 1)


def hierarchical_context(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes (MSE₀ + Σ_k 2^−k · MSE_k)/(1 + Σ_k 2^−k), for each example.

    MSE₀ compares the maps themselves, and MSE₁, MSE₂, … their averages on 4×4, 2×2 and 1×1
    windows, without those of as many rows as the maps have, or more. Where the sides are no whole
    multiples the windows overlap: window i of n has the rows ⌊Hi/n⌋ to ⌈H(i + 1)/n⌉ − 1. This is
    the authors' published code.

    Args:
      student: S `[batch, height, width, channels]`, or `[batch, tokens, features]`: tokens are the
        rows of a map that is one position wide.
      teacher: T of the same shape.

    Returns:
      `[batch]`, at least float32.

    Raises:
      ValueError: if the shapes differ, or they are no feature maps.

    References:
      Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, section 3.4.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    require_same_shape("hierarchical_context", student, teacher)
    # Averages of the difference are the differences of the averages.
    difference = as_map("hierarchical_context", student - teacher)
    _, height, width, _ = difference.shape
    total, weight, share = _mean_square(difference), 1.0, 1.0
    for side in (side for side in _SIDES if side < height):
        rows, columns = (_windows(length, side, difference.dtype) for length in (height, width))
        pooled = jnp.einsum("ih,bhwc,jw->bijc", rows, difference, columns, precision="highest")
        share /= 2
        total, weight = total + share * _mean_square(pooled), weight + share
    return total / weight


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x), axis=(1, 2, 3))


def _windows(length: int, count: int, dtype: jnp.dtype) -> jax.Array:
    """Computes the matrix that averages `count` windows of a side, `[count, length]`."""
    matrix = np.zeros((count, length))
    for i in range(count):
        begin, end = length * i // count, -(-length * (i + 1) // count)
        matrix[i, begin:end] = 1 / (end - begin)
    return jnp.asarray(matrix, dtype)
