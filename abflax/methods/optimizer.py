"""Optimizer settings as data, and the optax transformation that they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class PhaseSchedule:
    """Where a phase lies in its run, in optimisation steps.

    Attributes:
      start: the run's steps before the phase.
      steps: the phase's own.
      epochs_before, epochs: the same two in epochs.
      run_epochs: epochs of the whole run.
      steps_per_epoch: examples / batch size, as an exact fraction.
    """

    start: int
    steps: int
    epochs_before: int
    epochs: int
    run_epochs: int
    steps_per_epoch: Fraction

    @property
    def end(self) -> int:
        """The run's steps when the phase is over."""
        return self.start + self.steps

    @classmethod
    def single_step(cls) -> PhaseSchedule:
        """One step of one epoch: for a program that only evaluates."""
        return cls(0, 1, 0, 1, 1, Fraction(1))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """SGD with Nesterov momentum, a stepwise learning rate and L2 weight decay.

    Attributes:
      learning_rate: at the start of the run or phase.
      drops: shares of the epochs at which the rate is divided by `drop_factor`.
      resets: shares of the epochs at which the momentum is set to zero, as a rebuilt optimizer
        would have it.
      drop_factor: the divisor at each drop.
      of_run: whether the shares are of the whole run's epochs (and the phase continues the run's
        schedule) or of the phase's own.
      whole_epochs: whether a share is rounded up to whole epochs.
      momentum: Nesterov's.
      weight_decay: added to the gradient, times the weight, of every parameter that the phase
        trains.
    """

    learning_rate: float = 0.1
    drops: tuple[float, ...] = (0.3, 0.6, 0.8)
    resets: tuple[float, ...] = ()
    drop_factor: float = 5.0
    of_run: bool = False
    whole_epochs: bool = False
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def boundaries(self, shares: tuple[float, ...], phase: PhaseSchedule) -> tuple[int, ...]:
        """The phase's own step before which each share of the epochs is over.

        Negative where that was before the phase began.
        """
        total = phase.run_epochs if self.of_run else phase.epochs
        begin = 0 if self.of_run else phase.epochs_before
        steps = []
        for share in shares:
            epochs: int | Fraction = Fraction(str(share)) * total
            if self.whole_epochs:
                epochs = math.ceil(epochs)
            steps.append(math.floor((begin + epochs) * phase.steps_per_epoch) - phase.start)
        return tuple(steps)

    def schedule(self, phase: PhaseSchedule) -> Callable[[Any], jax.Array]:
        """The phase's own step (from 0) -> learning rate."""
        drops = self.boundaries(self.drops, phase)

        def rate(step: Any) -> jax.Array:
            passed = sum((step >= drop for drop in drops), start=jnp.zeros((), jnp.int32))
            return self.learning_rate / self.drop_factor ** passed.astype(jnp.result_type(float))

        return rate

    def transformation(
        self, phase: PhaseSchedule, trainable: Any | None = None
    ) -> optax.GradientTransformation:
        """The optax transformation of one phase.

        PyTorch's SGD to the letter: decay enters the gradient, the momentum buffer knows no
        learning rate, and parameters without a gradient are left alone.

        Args:
          phase: where the phase lies.
          trainable: a tree of booleans, which parameters the phase trains; None: all. The others
            get no decay, and no update where their gradient is zero.
        """
        momentum = optax.trace(decay=self.momentum, nesterov=True)
        if resets := self.boundaries(self.resets, phase):
            momentum = _reset(momentum, resets)
        sgd = optax.chain(
            optax.add_decayed_weights(self.weight_decay),
            momentum,
            optax.scale_by_learning_rate(self.schedule(phase)),
        )
        return sgd if trainable is None else optax.masked(sgd, trainable)


class _ResetState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # optax's word, which hides tuple.count
    inner: Any


def _reset(
    inner: optax.GradientTransformation, steps: tuple[int, ...]
) -> optax.GradientTransformation:
    """Sets the inner transformation's state to zero before each of the given steps."""

    def init(params: Any) -> _ResetState:
        return _ResetState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: _ResetState, params: Any = None) -> tuple[Any, _ResetState]:
        keep = jnp.all(state.count != jnp.asarray(steps))
        kept = jax.tree.map(lambda leaf: jnp.where(keep, leaf, 0), state.inner)
        updates, new = inner.update(updates, kept, params)
        return updates, _ResetState(state.count + 1, new)

    return optax.GradientTransformation(init, update)
