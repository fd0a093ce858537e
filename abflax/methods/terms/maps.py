"""Terms that compare maps after modules of their own: VID, the overhaul, knowledge review."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from abflax.losses import hierarchical_context, overhaul_difference, variational_information
from abflax.methods.connectors import Connectors, Pair
from abflax.methods.modules import Fusion, Regressors
from abflax.methods.terms.base import LayerTerm, features_of, per_example, summed
from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class VariationalInformation(LayerTerm):
    """Σ_l w_l · variational_information(r_l(S_l), T_l), for each example (Ahn et al. 2019).

    r_l are three 1×1 convolutions; they and the variances are trained with the student. The targets
    are the teacher's taps. RepDistiller compares outputs of blocks; here as everywhere it is the
    pre-activations behind them.
    """

    positions: ClassVar = "pooled"

    def module(self, pair: Pair) -> Regressors:
        """Adds the regressors and variances."""
        return Regressors(pair.widths, **pair.fields)

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Returns the teacher's tap."""
        return teacher

    def layer_loss(self, student: jax.Array, targets: Any) -> jax.Array:
        """Computes the likelihood of the teacher's tap."""
        log_scale = targets["log_scale"][0]  # the same for all examples
        return variational_information(student, targets["teacher"], log_scale)


@dataclasses.dataclass(frozen=True)
class OverhaulDifference(LayerTerm):
    """Σ_l w_l · Σ_neurons overhaul_difference(r_l(S_l), T_l), for each example (Heo et al. 2019).

    r_l is a connector, also where the widths are equal. The targets are the teacher's taps. The
    margin of a channel is the mean of its negative pre-activations in the batch, as the authors
    have it for networks without batch norm; their CIFAR code computes it from the scale and bias of
    the teacher's batch norms (`overhaul_margin`), and leaves these on the batch's statistics.
    """

    relates: ClassVar = "batch"

    def module(self, pair: Pair) -> Connectors:
        """Connects all layers."""
        return Connectors.between(pair, equal=True)

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Returns the teacher's tap."""
        return teacher

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Sums the differences over positions and neurons."""
        axes = tuple(range(targets.ndim - 1))
        negative = targets < 0
        count = jnp.maximum(negative.sum(axis=axes), 1)
        margin = jnp.where(negative, targets, 0).sum(axis=axes) / count
        return per_example(overhaul_difference(student, targets, margin))


@dataclasses.dataclass(frozen=True)
class KnowledgeReview(LayerTerm):
    """Σ_l w_l · hierarchical_context(fused S_l, T_l), for each example (Chen et al. 2021).

    The student's layers are fused with its deeper ones (`Fusion`); the features count as the
    deepest layer. The targets are the teacher's taps and features. The authors' student gives the
    outputs of its blocks; here as everywhere it is the pre-activations behind them.
    """

    positions: ClassVar = "pooled"

    def module(self, pair: Pair) -> Fusion:
        """Fuses the layers."""
        assert pair.teacher is not None
        middle = min(512, features_of(pair.student).shape[-1])
        features = ("features", features_of(pair.teacher).shape[-1])
        return Fusion((*pair.widths, features), middle, **pair.fields)

    def targets(self, teacher: Forward) -> dict[str, jax.Array]:
        """Returns the teacher's taps and features."""
        taps = {name: teacher.taps[name] for name in self.chosen(teacher.taps)}
        return taps | {"features": features_of(teacher)[:, None, None, :]}

    def loss(self, student: Forward, targets: Any, labels: jax.Array) -> jax.Array:
        """Sums the weighted losses of the layers, and that of the features."""
        del labels
        taps = {name: tap for name, tap in student.taps.items() if name != "features"}
        weights = self.layer_weights(taps) | {"features": 1.0}
        return summed(
            weight * hierarchical_context(student.taps[name], targets[name])
            for name, weight in weights.items()
        )
