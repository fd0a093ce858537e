"""Jacobian matching (Srinivas, Fleuret 2018)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from abflax.errors import InputError
from abflax.losses import (
    attention_map,
    attention_pixel_cotangent,
    attention_transfer,
    jacobian_difference,
    largest_attention_pixel,
)
from abflax.methods.terms.base import LayerTerm
from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class JacobianMatching(LayerTerm):
    """Σ_l w_l · (‖J_T/‖J_T‖ − J_S/‖J_S‖‖² + α · attention transfer).

    J is the gradient, with respect to the image, of the attention at the pixel where the teacher's
    is largest; the same pixel for both networks. One backward pass more per layer and network,
    through the same forward pass, of the sum over the batch: where batch norms use the batch's
    statistics, as the student's do, an image's J holds its (smaller) share in the attention of the
    others too. Targets: pixel, Jacobian and attention map of each layer.

    Attributes:
      attention_share: α, the weight of the attention loss beside the Jacobian's. Its mean over
        positions is small beside a squared distance of unit vectors, hence the large default.
    """

    needs_pullback: ClassVar[bool] = True
    positions: ClassVar = "pooled"
    attention_share: float = 100.0

    def targets(self, teacher: Forward) -> dict[str, Any]:
        """Returns the teacher's attention maps and normalized input-gradients."""
        targets = {}
        for name in self.chosen(teacher.taps):
            pixel = largest_attention_pixel(teacher.taps[name])
            targets[name] = {
                "pixel": pixel,
                "jacobian": _jacobian(teacher, name, pixel),
                "attention": attention_map(teacher.taps[name]),
            }
        return targets

    def loss(self, student: Forward, targets: dict[str, Any], labels: jax.Array) -> jax.Array:
        """Sums the weighted distances of input-gradients, and of attention maps."""
        del labels
        total = jnp.asarray(0.0)
        for name, weight in self.layer_weights(student.taps).items():
            target = targets[name]
            jacobian = _jacobian(student, name, target["pixel"])
            total += weight * (
                jacobian_difference(jacobian, target["jacobian"])
                + self.attention_share * attention_transfer(student.taps[name], target["attention"])
            )
        return total


def _jacobian(forward: Forward, layer: str, pixel: jax.Array) -> jax.Array:
    """∂ attention of `layer` at `pixel` / ∂ image, `[batch, height, width, channels]`."""
    if forward.pullback is None:
        raise InputError("Jacobian matching needs run_model(…, pullback=True)")
    return forward.pullback({layer: attention_pixel_cotangent(forward.taps[layer], pixel)})
