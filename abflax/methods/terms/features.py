"""Terms that compare activations neuron by neuron: FitNets and l_p."""

from __future__ import annotations

import dataclasses

import jax

from abflax.errors import InputError
from abflax.losses import feature_difference
from abflax.methods.connectors import Connectors, Pair
from abflax.methods.terms.base import LayerTerm, per_example


@dataclasses.dataclass(frozen=True)
class FeatureDifference(LayerTerm):
    """Σ_l w_l · Σ_neurons |σ(T_l) − σ(r_l(S_l))|^p, for each example.

    FitNets (Romero et al. 2015) use p = 2 on the last layer. Heo et al. 2019, Table 7 compare
    p = 2, 1, ½ on all layers. The targets are the teacher's activations.

    Attributes:
      power: p > 0; see `abflax.losses.feature_difference` for p < 1.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise InputError(f"the power must be above 0, not {self.power}")

    def module(self, pair: Pair) -> Connectors:
        """Connects the layers."""
        return Connectors.between(pair)

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Computes the teacher's activations σ(T)."""
        return jax.nn.relu(teacher)

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Sums the differences over positions and neurons."""
        return per_example(feature_difference(student, targets, self.power))
