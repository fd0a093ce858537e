"""What every term is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from abflax.errors import InputError, unknown
from abflax.taps import Forward, depth_order


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of an objective: what it takes of the teacher, what it makes of the student.

    Subclasses are frozen dataclasses of their options. `targets` holds what one batch needs of
    the teacher and no more; no gradient flows into it, so it can be computed once and kept.

    Class attributes:
      transfers: True for a method's own transfer loss, which has a weight to be searched; False
        for the supervision by labels or logits.
      needs_teacher: False for a term that compares with nothing.
      needs_pullback: True for a term that uses `abflax.taps.Forward.pullback`.
      connects: what of the student goes through trained connectors before `loss` sees it: its
        "taps", to the teacher's widths; its "features", to logits over the teacher's classes; or
        None.
      positions: what is done where a layer's height and width differ between the networks:
        "same" refuses, "pooled" average-pools the larger map to the smaller before the term sees
        it, "free" leaves both alone.
    """

    transfers: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    needs_pullback: ClassVar[bool] = False
    connects: ClassVar[Literal["taps", "features"] | None] = None
    positions: ClassVar[Literal["same", "pooled", "free"]] = "same"

    def chosen(self, taps: Iterable[str]) -> tuple[str, ...]:
        """Which of a network's taps the term compares."""
        del taps
        return ()

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
    """A term that compares taps layer by layer: Σ_l w_l · layer_loss(S_l, layer_targets(T_l)).

    Subclasses define `layer_targets` and `layer_loss`, or override `targets` and `loss`.

    Attributes:
      layers: the taps compared; "last" is the deepest; None: all.
      layer_ratio: the weight of a layer relative to the next deeper one. Of L taps in all, the
        l-th has ratio^(L − l): the deepest has 1, and ½ gives ¼, ½, 1. A layer keeps its weight
        when others are left out.
    """

    transfers: ClassVar[bool] = True
    layers: tuple[str, ...] | None = None
    layer_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise InputError("layers must name at least one tap; leave it out for all")
        if not self.layer_ratio > 0:
            raise InputError(f"layer_ratio must be above 0, not {self.layer_ratio}")

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Computes the targets of one layer from the teacher's tap."""
        raise NotImplementedError

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Compares one layer, `[batch]`, given the student's tap (behind its connector)."""
        raise NotImplementedError

    def targets(self, teacher: Forward) -> Any:
        """Computes the targets of each chosen layer."""
        return {name: self.layer_targets(teacher.taps[name]) for name in self.chosen(teacher.taps)}

    def loss(self, student: Forward, targets: Any, labels: jax.Array) -> jax.Array:
        """Sums the layers' weighted losses."""
        del labels
        return summed(
            weight * self.layer_loss(student.taps[name], targets[name])
            for name, weight in self.layer_weights(student.taps).items()
        )

    def chosen(self, taps: Iterable[str]) -> tuple[str, ...]:
        """The chosen layers, the shallowest first. Raises `ValueError` for an unknown one."""
        names = depth_order(taps)
        if self.layers is None:
            return tuple(names)
        wanted = {names[-1] if layer == "last" and names else layer for layer in self.layers}
        for layer in wanted:
            if layer not in names:
                raise unknown("layer", layer, names)
        return tuple(depth_order(wanted))

    def layer_weights(self, taps: Iterable[str]) -> dict[str, float]:
        """Layer -> weight, of the chosen layers among all the taps of a network."""
        depth = {name: index for index, name in enumerate(depth_order(taps))}
        last = len(depth) - 1
        return {name: self.layer_ratio ** (last - depth[name]) for name in self.chosen(depth)}


def summed(losses: Iterable[jax.Array]) -> jax.Array:
    """The sum over the layers, in the losses' own dtype: the 0 that it begins with is weak."""
    return sum(losses, start=jnp.asarray(0.0))


def per_example(elementwise: jax.Array) -> jax.Array:
    """The sum over all but the batch dimension."""
    return elementwise.sum(axis=tuple(range(1, elementwise.ndim)))
