"""Losses on the relations between a batch's examples: SP, RKD, PKT and CC.

Each gives every example its share, so that the mean over the batch is the published value. A share
depends on the whole batch, and so the loss of a part of a batch is another loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_same_shape
from abflax.losses.dtypes import at_least_float32
from abflax.losses.features import unit_length


def similarity_preserving(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes Σ_j (G_S − G_T)²_ij / B for each example i of B.

    G is FFᵀ, its rows divided by their ℓ2 norm, where F holds an example in each row, as a vector.
    The form is that of the RepDistiller collection, which the authors verified. (torchdistill 1.1
    divides the rows by their ℓ1 norm.) An all-zero row stays zero, with gradient 0.

    Args:
      student: S `[batch, …]`.
      teacher: T `[batch, …]`; only the batch is the same.

    Returns:
      `[batch]`, at least float32.

    Raises:
      ValueError: if the batches differ or have fewer than two examples, or an array has no
        features.

    References:
      Tung, Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, equations (1) to (4).
    """
    ours, theirs = (
        unit_length(_inner(x, x), axis=1) for x in _rows("similarity_preserving", student, teacher)
    )
    return jnp.mean(jnp.square(ours - theirs), axis=1)


def relational_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes mean_j h(d_S − d_T)_ij for each example i, over all j of the batch.

    d_ij is ‖f_i − f_j‖ (at least 1e-6, and 0 for i = j) over its mean over all i ≠ j, through which
    the gradient passes. h is the smooth ℓ1 loss: ½x² for |x| < 1, else |x| − ½. This is the
    authors' published code. The gradient of the distance of two equal examples is 0.

    Args:
      student: S `[batch, …]`.
      teacher: T `[batch, …]`; only the batch is the same.

    Returns:
      `[batch]`, at least float32.

    Raises:
      ValueError: if the batches differ or have fewer than two examples, or an array has no
        features.

    References:
      Park et al., Relational Knowledge Distillation, CVPR 2019, equations (5) to (8).
    """
    ours, theirs = map(_distances, _rows("relational_distance", student, teacher))
    return jnp.mean(_smooth_l1(ours - theirs), axis=1)


def relational_angle(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes mean_jk h(⟨e_ij, e_ik⟩_S − ⟨e_ij, e_ik⟩_T) for each example i.

    e_ij is (f_j − f_i)/‖f_j − f_i‖, and j, k are all examples of the batch; h is as in
    `relational_distance`. This is the authors' published code; but where two examples are equal,
    e_ij and its gradient are 0, and theirs is of the order of 1e11. The memory is batch² · (batch +
    features).

    Args:
      student: S `[batch, …]`.
      teacher: T `[batch, …]`; only the batch is the same.

    Returns:
      `[batch]`, at least float32.

    Raises:
      ValueError: if the batches differ or have fewer than two examples, or an array has no
        features.

    References:
      Park et al., CVPR 2019, equations (9) to (11).
    """
    ours, theirs = map(_angles, _rows("relational_angle", student, teacher))
    return jnp.mean(_smooth_l1(ours - theirs), axis=(1, 2))


def probabilistic_transfer(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes mean_j P_T·log((P_T + 1e-7)/(P_S + 1e-7))_ij for each example i.

    P_ij is (u_iᵀu_j + 1)/2 over its sum over j, with u = f/(‖f‖ + 1e-7). This is the authors'
    published code: the diagonal is in, and the loss is a mean, where the paper sums over i ≠ j. An
    all-zero f gives u = 0, with gradient 0, where theirs is of the order of 1e7.

    Args:
      student: S `[batch, …]`.
      teacher: T `[batch, …]`; only the batch is the same.

    Returns:
      `[batch]`, at least float32.

    Raises:
      ValueError: if the batches differ or have fewer than two examples, or an array has no
        features.

    References:
      Passalis, Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV
      2018.
    """
    ours, theirs = map(_affinities, _rows("probabilistic_transfer", student, teacher))
    return jnp.mean(theirs * jnp.log((theirs + 1e-7) / (ours + 1e-7)), axis=1)


def correlation_congruence(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes B/(B − 1) · Σ_d δ_i·δ_(i+1) for each example i of B but the last, whose share is 0.

    δ is |S − T|, elementwise. The pairs are neighbours in the batch, so their order matters. This
    is the code that the authors gave to the RepDistiller collection; the paper compares kernel
    matrices of the two networks instead.

    Args:
      student: S `[batch, dimensions]`, after an embedding.
      teacher: T of the same shape, after an embedding of its own.

    Returns:
      `[batch]`, at least float32. The gradient at S = T is 0.

    Raises:
      ValueError: if the shapes differ, or there are fewer than two examples.

    References:
      Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019.
    """
    student, teacher = _rows("correlation_congruence", student, teacher)
    require_same_shape("correlation_congruence", student, teacher)
    batch = len(student)
    difference = student - teacher
    difference = jnp.sign(difference) * difference  # of jnp.abs, the gradient at 0 would be 1
    pairs = jnp.sum(difference[:-1] * difference[1:], axis=1)
    return jnp.pad(pairs, (0, 1)) * (batch / (batch - 1))


def _rows(what: str, student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both arrays as `[batch, features]`, at least float32."""
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    for x in (student, teacher):
        if x.ndim < 2 or not x.size:
            raise InputError(f"{what}: features are [batch, …], not {x.shape}")
    if len(student) != len(teacher):
        raise InputError(f"{what}: the batch sizes of {student.shape} and {teacher.shape} differ")
    if len(student) < 2:
        raise InputError(f"{what}: a pair needs two examples")
    return student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    # Accelerators multiply float32 matrices in lower precision by default.
    return jnp.einsum("...id,...jd->...ij", x, y, precision="highest")


def _distances(x: jax.Array) -> jax.Array:
    """Computes the distances of all pairs over their mean over different examples."""
    # Of differences, not of inner products: those cancel for examples that are near each other.
    squared = jnp.sum(jnp.square(x[:, None] - x), axis=-1)
    different = 1 - jnp.eye(len(x), dtype=x.dtype)
    distances = jnp.sqrt(jnp.maximum(squared, 1e-12)) * different
    return distances / (distances.sum() / (len(x) * (len(x) - 1)))


def _angles(x: jax.Array) -> jax.Array:
    """Computes the cosines ⟨e_ij, e_ik⟩, `[batch, batch, batch]`."""
    directions = unit_length(x - x[:, None], axis=-1)
    return _inner(directions, directions)


def _smooth_l1(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size < 1, 0.5 * jnp.square(x), size - 0.5)


def _affinities(x: jax.Array) -> jax.Array:
    """Computes the cosines of all pairs, moved to [0, 1] and divided by the sums of their rows."""
    # Of smaller features the squares underflow, and the gradient of the norm is not finite.
    least = jnp.finfo(x.dtype).tiny ** 0.5
    vanishes = jnp.all(jnp.abs(x) <= least, axis=1, keepdims=True)
    norm = jnp.linalg.norm(jnp.where(vanishes, 1.0, x), axis=1, keepdims=True)
    unit = x * jnp.where(vanishes, 0.0, 1 / (norm + 1e-7))
    affinities = (_inner(unit, unit) + 1) / 2
    return affinities / affinities.sum(axis=1, keepdims=True)
