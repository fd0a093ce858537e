"""What every term is."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from abflax.taps import Forward


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of an objective: what it takes of the teacher, what it makes of the student.

    Subclasses are frozen dataclasses of their options. `targets` holds what one batch needs of
    the teacher and no more; no gradient flows into it, so it can be computed once and kept.

    Class attributes:
      needs_teacher: False for a term that compares with nothing.
      connects: True for a term whose student taps go through connectors before `loss` sees them.
    """

    needs_teacher: ClassVar[bool] = True
    connects: ClassVar[bool] = False

    def targets(self, teacher: Forward) -> Any:
        """A pytree of arrays with a leading batch dimension."""
        raise NotImplementedError

    def loss(self, student: Forward, targets: Any, labels: jax.Array) -> jax.Array:
        """One number an example, `[batch]`; the step takes the mean over the batch."""
        raise NotImplementedError

    def measures(self, student: Forward, targets: Any) -> dict[str, Any]:
        """What training shows besides the loss: a (nested) dict of scalars."""
        del student, targets
        return {}


@dataclasses.dataclass(frozen=True)
class LayerTerm(Term):
    """A term that compares taps, layer by layer, and adds them up with a weight each.

    Attributes:
      layers: the taps compared; None: all.
      layer_ratio: the weight of a layer relative to the next deeper one. Of L taps in all, the
        l-th has ratio^(L − l): the deepest has 1, and ½ gives ¼, ½, 1. A layer keeps its weight
        when others are left out.
    """

    layers: tuple[str, ...] | None = None
    layer_ratio: float = 1.0

    def layer_weights(self, taps: dict[str, jax.Array]) -> dict[str, float]:
        """layer -> weight, of the chosen layers among all the taps of a network."""
        depth = {name: index for index, name in enumerate(sorted(taps))}
        chosen = self.layers if self.layers is not None else tuple(depth)
        return {name: self.layer_ratio ** (len(depth) - 1 - depth[name]) for name in chosen}


def per_example(elementwise: jax.Array) -> jax.Array:
    """The sum over all but the batch dimension."""
    return elementwise.sum(axis=tuple(range(1, elementwise.ndim)))
