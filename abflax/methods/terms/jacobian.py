"""The term of Jacobian matching (Srinivas, Fleuret 2018)."""

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

    J is the gradient of the attention at one pixel with respect to the image. Both networks use
    the pixel where the teacher's attention is largest. The targets are the pixel, the Jacobian and
    the attention map of each layer.

    J costs one more backward pass per layer and network, of the sum over the batch. Where batch
    norms use the statistics of the batch, as the student's do, the J of an image also contains its
    (smaller) effect on the attention of the other images.

    Attributes:
      attention_share: α, the weight of the attention loss relative to the Jacobian loss. The
        attention loss is a mean over positions, which is small compared with the squared distance
        of two unit vectors. So the default is large.
    """

    needs_pullback: ClassVar[bool] = True
    positions: ClassVar = "pooled"
    attention_share: float = 100.0

    def targets(self, teacher: Forward) -> dict[str, Any]:
        """Computes the teacher's attention maps, their largest pixels and the Jacobians there."""
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
        """Sums the weighted distances of Jacobians and of attention maps over the layers."""
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
    """Computes ∂ attention of `layer` at `pixel` / ∂ image, `[batch, height, width, channels]`."""
    if forward.pullback is None:
        raise InputError("Jacobian matching needs run_model(…, pullback=True)")
    return forward.pullback({layer: attention_pixel_cotangent(forward.taps[layer], pixel)})
