"""Terms of factor transfer: the paraphraser's own, and the student's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from abflax.errors import InputError
from abflax.losses import factor_transfer
from abflax.losses.dtypes import at_least_float32
from abflax.methods.connectors import Pair
from abflax.methods.modules import Paraphrasers, Translators
from abflax.methods.terms.base import LayerTerm


@dataclasses.dataclass(frozen=True)
class _FactorTerm(LayerTerm):
    positions: ClassVar = "pooled"
    layers: tuple[str, ...] | None = ("last",)
    rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate > 0:
            raise InputError(f"rate must be above 0, not {self.rate}")

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Returns the teacher's tap."""
        return teacher

    def _channels(self, pair: Pair) -> tuple[tuple[str, int, int], ...]:
        return tuple((name, width, max(1, int(self.rate * width))) for name, width in pair.widths)


@dataclasses.dataclass(frozen=True)
class Paraphrasing(_FactorTerm):
    """Σ_l w_l · mean (T_l − P_l(T_l))², for each example (Kim, Park, Kwak 2018, equation (1)).

    It trains the paraphrasers P_l alone, in a phase before that of `FactorTransfer`; the student
    stays as it is. The targets are the teacher's taps. The authors' code has |T − P(T)|.

    Attributes:
      rate: channels of the factors, as a share of the teacher's; rounded down.
    """

    transfers: ClassVar[bool] = False
    needs_student: ClassVar[bool] = False

    def module(self, pair: Pair) -> Paraphrasers:
        """Adds the paraphrasers."""
        return Paraphrasers(self._channels(pair), **pair.fields)

    def layer_loss(self, student: jax.Array, targets: Any) -> jax.Array:
        """Compares the teacher's tap with what was made of its factor."""
        del student
        teacher = at_least_float32(targets["teacher"])
        difference = teacher - at_least_float32(targets["paraphrased"])
        return jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))


@dataclasses.dataclass(frozen=True)
class FactorTransfer(_FactorTerm):
    """Σ_l w_l · factor_transfer(translator_l(S_l), factor of T_l), for each example (Kim et al.).

    The factor is what the first half of the paraphraser makes of the teacher's tap; the phase
    before must have trained it (`Paraphrasing`), and it stays as it is. The translator is trained
    with the student. The targets are the teacher's taps. The authors compare outputs of blocks;
    here as everywhere it is the pre-activations behind them.

    Attributes:
      rate: as in `Paraphrasing`.
      channels_averaged: whether the loss is RepDistiller's; see `abflax.losses.factor_transfer`.
    """

    channels_averaged: bool = False

    def module(self, pair: Pair) -> Translators:
        """Adds the translators, and the paraphrasers' first halves."""
        return Translators(self._channels(pair), **pair.fields)

    def first_weights(
        self, drawn: dict[str, Any], teacher: Any, before: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Takes the paraphrasers of the phase before.

        Raises:
          ValueError: if it has not trained them.
        """
        del teacher
        paraphrasers = {name: before.get(name) for name in drawn if name.endswith("_paraphraser")}
        if None in paraphrasers.values():
            raise InputError(
                "factor transfer needs a paraphraser: give the phase before it the term "
                "Paraphrasing, and at least one epoch"
            )
        return drawn | paraphrasers

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Compares the factors."""
        return factor_transfer(student, targets, self.channels_averaged)
