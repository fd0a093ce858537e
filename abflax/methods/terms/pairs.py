"""Terms that compare the relations between a batch's examples: SP, RKD, PKT and CC."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from abflax.errors import InputError
from abflax.losses import (
    correlation_congruence,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from abflax.methods.connectors import Pair
from abflax.methods.modules import Embeddings
from abflax.methods.terms.base import LayerTerm, Term, features_of
from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class SimilarityPreserving(LayerTerm):
    """Σ_l w_l · mean of (G_S − G_T)² over pairs of examples (Tung, Mori 2019).

    G are the normalized inner products of examples' taps; see `similarity_preserving`. The targets
    are the teacher's taps. RepDistiller compares outputs of blocks, here as everywhere it is the
    pre-activations behind them.
    """

    relates: ClassVar = "batch"
    positions: ClassVar = "free"
    layers: tuple[str, ...] | None = ("last",)

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Returns the teacher's tap."""
        return teacher

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Compares the similarities."""
        return similarity_preserving(student, targets)


@dataclasses.dataclass(frozen=True)
class RelationalDistillation(Term):
    """Distances, and angle_ratio times the angles, between examples' features (Park et al. 2019).

    See `relational_distance` and `relational_angle`. The targets are the teacher's features.

    Attributes:
      angle_ratio: >= 0; 2 in the authors' code, and in RepDistiller (25 and 50).
    """

    transfers: ClassVar[bool] = True
    relates: ClassVar = "batch"
    angle_ratio: float = 2.0

    def __post_init__(self) -> None:
        if not self.angle_ratio >= 0:
            raise InputError(f"angle_ratio must be at least 0, not {self.angle_ratio}")

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's features."""
        return features_of(teacher)

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Compares distances and angles."""
        del labels
        distance = relational_distance(features_of(student), targets)
        return distance + self.angle_ratio * relational_angle(features_of(student), targets)


@dataclasses.dataclass(frozen=True)
class ProbabilisticTransfer(Term):
    """The divergence of the distributions of examples' affinities (Passalis, Tefas 2018).

    See `probabilistic_transfer`. The targets are the teacher's features.
    """

    transfers: ClassVar[bool] = True
    relates: ClassVar = "batch"

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's features."""
        return features_of(teacher)

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Compares the affinities."""
        del labels
        return probabilistic_transfer(features_of(student), targets)


@dataclasses.dataclass(frozen=True)
class CorrelationCongruence(Term):
    """The products of neighbours' differences of embedded features (Peng et al. 2019).

    See `correlation_congruence`. Both embeddings are trained with the student. The targets are the
    teacher's features.

    Attributes:
      dimensions: of the embeddings, at least 1.
    """

    transfers: ClassVar[bool] = True
    relates: ClassVar = "batch"
    dimensions: int = 128

    def __post_init__(self) -> None:
        if self.dimensions < 1:
            raise InputError(f"dimensions must be at least 1, not {self.dimensions}")

    def module(self, pair: Pair) -> Embeddings:
        """Adds the embeddings."""
        assert pair.teacher is not None
        features_of(pair.student)
        return Embeddings(features_of(pair.teacher).shape[-1], self.dimensions, **pair.fields)

    def targets(self, teacher: Forward) -> jax.Array:
        """Returns the teacher's features."""
        return features_of(teacher)

    def loss(self, student: Forward, targets: jax.Array, labels: jax.Array) -> jax.Array:
        """Compares the embeddings."""
        del labels
        return correlation_congruence(features_of(student), targets)
