"""The term on activation boundaries (Heo et al. 2019)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from abflax.errors import InputError
from abflax.losses import activation_indicator, activation_transfer_hinge
from abflax.methods.connectors import Connectors, Pair
from abflax.methods.terms.base import LayerTerm, per_example
from abflax.metrics import activation_agreement
from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class ActivationBoundary(LayerTerm):
    """Σ_l w_l · Σ_neurons hinge(r_l(S_l), T_l), for each example (Heo et al. 2019, equation 4).

    r_l is the connector of layer l, and w_l is the layer's weight (see `LayerTerm`). The targets
    are one boolean for each of the teacher's neurons.

    Attributes:
      margin: μ > 0, in units of pre-activation.
    """

    margin: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.margin > 0:
            raise InputError(f"the margin must be above 0, not {self.margin}")

    def module(self, pair: Pair) -> Connectors:
        """Connects the layers."""
        return Connectors.between(pair)

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Computes the teacher's indicators as booleans."""
        return activation_indicator(teacher)

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Sums the hinge over positions and neurons."""
        return per_example(activation_transfer_hinge(student, targets, self.margin))

    def measures(self, student: Forward, targets: dict[str, jax.Array]) -> dict[str, Any]:
        """Measures the agreement of each layer."""
        agreement = {
            layer: activation_agreement(student.taps[layer], indicators)
            for layer, indicators in targets.items()
        }
        return {"agreement": agreement}
