"""Weights of terms: numbers, and schedules that change them over a phase."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from abflax.errors import InputError, require_field_types


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A weight that changes over a phase; subclasses are frozen dataclasses."""

    def __call__(self, step: Any, steps_per_epoch: Fraction, epochs: int = 1) -> jax.Array:
        """Computes the weight at a step of the phase.

        Args:
          step: from 0; it may be traced.
          steps_per_epoch: examples / batch size.
          epochs: of the phase.
        """
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in values if value != field.default}


@dataclasses.dataclass(frozen=True)
class Ramp(Schedule):
    """A term's weight that moves from `start` to `end` over the first epochs of a phase.

    In the phase's e-th epoch (from 1) it is start + (end − start)·min(e / epochs, 1): constant
    within an epoch, as in the published code of decoupled distillation and of knowledge review,
    whose min(epoch / 20, 1) is `Ramp(0.0, 1.0, 20)`.

    Attributes:
      start: the weight before the first epoch, so it is never quite used.
      end: the weight from the epoch with that number on.
      epochs: how many epochs the ramp takes, at least 1; None: those of the phase, times `share`.
      share: in (0, 1].

    Raises:
      ValueError: for a value that is no finite number, or no whole number of epochs.

    Examples:
      >>> [float(Ramp(0.0, 2.0, 4)(step, Fraction(3, 2))) for step in (0, 1, 2, 3, 40)]
      [0.5, 0.5, 1.0, 1.5, 2.0]
      >>> [float(Ramp(2.0, 0.0, share=0.5)(step, Fraction(1), epochs=8)) for step in range(5)]
      [1.5, 1.0, 0.5, 0.0, 0.0]
    """

    start: float
    end: float
    epochs: int | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        require_field_types(self)
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"a ramp takes at least 1 epoch, not {self.epochs}")
        if not 0 < self.share <= 1 or (self.epochs is not None and self.share != 1):
            raise InputError(f"a ramp takes a share in (0, 1] of the phase, or epochs: {self}")
        for name in ("start", "end", "share"):  # 1 and 1.0 are the same run
            object.__setattr__(self, name, float(getattr(self, name)))

    def __call__(self, step: Any, steps_per_epoch: Fraction, epochs: int = 1) -> jax.Array:
        """Computes the weight at a step of the phase; see `Schedule`."""
        length = self.share * epochs if self.epochs is None else self.epochs
        share = jnp.minimum(_epoch(step, steps_per_epoch, math.ceil(length)), length) / length
        return self.start + (self.end - self.start) * share.astype(jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class Progressive(Schedule):
    """The weights of progressive distillation between two domains (Nguyen-Meidine et al. 2020).

    β = start·(end / start)^((e − 1) / epochs) in the e-th epoch (from 1) of the phase's, and at the
    i-th of the n steps of an epoch γ = 2 / (1 + exp(−10·i / n)) − 1. The paper's β goes from 0.1 to
    0.9 in 400 epochs.

    Attributes:
      of: "student": the weight is β; "teacher": it is 1 − β; "discrepancy": it is (1 − β)·γ.
      start: β at the start, in (0, 1).
      end: β at the end, in (0, 1).

    Raises:
      ValueError: for a value that cannot be right.

    Examples:
      >>> [round(float(Progressive("student")(step, Fraction(1), epochs=2)), 6) for step in (0, 1)]
      [0.1, 0.3]
    """

    of: str
    start: float = 0.1
    end: float = 0.9

    def __post_init__(self) -> None:
        require_field_types(self)
        if self.of not in ("student", "teacher", "discrepancy"):
            raise InputError(f"progressive weights are of student, teacher or discrepancy: {self}")
        if not (0 < self.start < 1 and 0 < self.end < 1):
            raise InputError(f"β must stay between 0 and 1: {self}")

    def __call__(self, step: Any, steps_per_epoch: Fraction, epochs: int = 1) -> jax.Array:
        """Computes the weight at a step of the phase; see `Schedule`."""
        dtype = jnp.result_type(float)
        epoch = _epoch(step, steps_per_epoch, epochs)
        beta = self.start * (self.end / self.start) ** ((epoch - 1).astype(dtype) / epochs)
        if self.of == "student":
            return beta
        if self.of == "teacher":
            return 1 - beta
        examples, batch = steps_per_epoch.numerator, steps_per_epoch.denominator
        part = jnp.asarray(step * batch % examples + batch, dtype) / examples  # i / n
        return (1 - beta) * (2 / (1 + jnp.exp(-10 * part)) - 1)


Weight = float | Schedule
"""What a term is multiplied by: a number, or one that changes with the epochs."""


def _epoch(step: Any, steps_per_epoch: Fraction, most: int) -> jax.Array:
    """The epoch of a step, from 1; at most one more than `most`."""
    over = math.ceil(most * steps_per_epoch)  # beyond it the product could overflow
    step = jnp.minimum(step, over)
    return 1 + step * steps_per_epoch.denominator // steps_per_epoch.numerator
