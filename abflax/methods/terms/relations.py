"""Terms that compare statistics of a layer: Gram matrices, attention maps, channel patterns."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import ClassVar

import jax

from abflax.losses import (
    attention_map,
    attention_transfer,
    fsp,
    gram_between,
    neuron_selectivity,
)
from abflax.methods.connectors import Connectors, Pair
from abflax.methods.terms.base import LayerTerm, summed
from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class FlowOfSolution(LayerTerm):
    """Mean squared difference of the Gram matrices between consecutive layers (Yim et al. 2017).

    G = F₁ᵀF₂/(HW) for each pair of consecutive chosen layers. A pair has the weight of its deeper
    layer. If only one layer is chosen, G = FᵀF/(HW); this goes beyond Yim et al., and the
    single-layer columns of Heo et al. 2019, Table 6 need it. The student's taps pass through
    connectors first. The targets are the teacher's Gram matrices.
    """

    positions: ClassVar = "free"

    def module(self, pair: Pair) -> Connectors:
        """Connects the layers."""
        return Connectors.between(pair)

    def targets(self, teacher: Forward) -> dict[str, jax.Array]:
        """Computes the teacher's Gram matrices."""
        return self._grams(teacher)

    def loss(self, student: Forward, targets: dict[str, jax.Array], labels: jax.Array) -> jax.Array:
        """Sums the weighted differences of Gram matrices."""
        del labels
        weights, grams = self.layer_weights(student.taps), self._grams(student)
        return summed(weights[name] * fsp(grams[name], targets[name]) for name in grams)

    def _grams(self, forward: Forward) -> dict[str, jax.Array]:
        """Computes {deeper layer of a pair: Gram matrix `[batch, channels, channels]`}."""
        chosen = self.chosen(forward.taps)
        pairs = list(pairwise(chosen)) or [(chosen[0], chosen[0])]
        return {
            second: gram_between(forward.taps[first], forward.taps[second])
            for first, second in pairs
        }


@dataclasses.dataclass(frozen=True)
class AttentionTransfer(LayerTerm):
    """Σ_l w_l · mean over positions of (a(T_l) − a(S_l))² (Zagoruyko, Komodakis 2017).

    a(F) = vec(mean_c F²)/‖vec(mean_c F²)‖₂. The targets are the teacher's attention maps.
    """

    positions: ClassVar = "pooled"

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Computes the teacher's attention map."""
        return attention_map(teacher)

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Compares the attention maps."""
        return attention_transfer(student, targets)


@dataclasses.dataclass(frozen=True)
class NeuronSelectivity(LayerTerm):
    """Σ_l w_l · squared MMD of the channels' spatial patterns (Huang, Wang 2017).

    The targets are the teacher's taps.

    Attributes:
      kernel: "linear", "polynomial" or "gaussian".
    """

    positions: ClassVar = "pooled"
    kernel: str = "polynomial"

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Returns the teacher's tap."""
        return teacher

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Compares the channels' patterns."""
        return neuron_selectivity(student, targets, self.kernel)
