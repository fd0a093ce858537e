"""Optimizer settings as data, and the optax transformation that they stand for."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from abflax.errors import InputError, require_field_types, unknown

SCHEDULES = ("steps", "constant", "cosine")
"""How a learning rate may fall: by a factor at shares of the epochs, not at all, or to zero."""


@dataclasses.dataclass(frozen=True)
class PhaseSchedule:
    """Where a phase lies in its run, in optimisation steps.

    Attributes:
      start: the run's steps before the phase.
      steps: the phase's own.
      epochs_before: the run's epochs before the phase.
      epochs: the phase's own.
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
    """SGD with momentum, a stepwise learning rate and L2 weight decay.

    Attributes:
      learning_rate: at the start of the run or phase.
      drops: shares of the epochs at which the rate is divided by `drop_factor`.
      resets: shares of the epochs at which the momentum is set to zero, as a rebuilt optimizer
        would have it.
      drop_factor: the divisor at each drop.
      of_run: whether the shares are of the whole run's epochs (and the phase continues the run's
        schedule) or of the phase's own.
      whole_epochs: whether a share is rounded up to whole epochs.
      momentum: of the gradients' running sum.
      weight_decay: added to the gradient, times the weight, of every parameter that the phase
        trains.
      decay: in `SCHEDULES`. "steps": at the `drops`; "constant": the rate stays; "cosine": in the
        step t of T (those of the run where `of_run`, else of the phase) the rate is
        learning_rate · (1 + cos(π·t/T)) / 2 (Loshchilov, Hutter, ICLR 2017, without restarts).
      nesterov: whether the momentum is Nesterov's.

    Raises:
      ValueError: for a value that cannot be right.
    """

    learning_rate: float = 0.1
    drops: tuple[float, ...] = (0.3, 0.6, 0.8)
    resets: tuple[float, ...] = ()
    drop_factor: float = 5.0
    of_run: bool = False
    whole_epochs: bool = False
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay: str = "steps"
    nesterov: bool = True

    def __post_init__(self) -> None:
        require_field_types(self)
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be above 0, not {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be in [0, 1), not {self.momentum}")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay must be at least 0, not {self.weight_decay}")
        if self.decay not in SCHEDULES:
            raise unknown("schedule", self.decay, SCHEDULES)

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
        if self.decay == "constant":
            return lambda step: jnp.asarray(self.learning_rate, jnp.result_type(float))
        if self.decay == "cosine":
            before = phase.start if self.of_run else 0
            total = math.floor(phase.run_epochs * phase.steps_per_epoch)
            cosine = optax.cosine_decay_schedule(
                self.learning_rate, total if self.of_run else phase.steps
            )
            return lambda step: cosine(step + before)
        drops = self.boundaries(self.drops, phase)

        def rate(step: Any) -> jax.Array:
            passed = sum((step >= drop for drop in drops), start=jnp.zeros((), jnp.int32))
            return self.learning_rate / self.drop_factor ** passed.astype(jnp.result_type(float))

        return rate

    @property
    def endless(self) -> bool:
        """Whether a phase of any length makes the first steps of all longer ones."""
        constant = self.decay == "constant" or (self.decay == "steps" and not self.drops)
        return constant and not self.resets

    def begins(self, shorter: PhaseSchedule, longer: PhaseSchedule) -> bool:
        """Whether a shorter phase makes the first steps of a longer one: rates and resets."""
        rates = [np.asarray(self.schedule(each)(np.arange(shorter.steps))) for each in
                 (shorter, longer)]  # fmt: skip
        resets = [
            [step for step in self.boundaries(self.resets, each) if 0 <= step < shorter.steps]
            for each in (shorter, longer)
        ]
        return np.array_equal(rates[0], rates[1]) and resets[0] == resets[1]

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
        momentum = optax.trace(decay=self.momentum, nesterov=self.nesterov)
        if resets := self.boundaries(self.resets, phase):
            momentum = _reset(momentum, resets)
        sgd = optax.chain(
            optax.add_decayed_weights(self.weight_decay),
            momentum,
            optax.scale_by_learning_rate(self.schedule(phase)),
        )
        return sgd if trainable is None else optax.masked(sgd, trainable)


@dataclasses.dataclass(frozen=True)
class OwnOptimizer:
    """An optax transformation in place of the protocol's SGD.

    It sees the parameters {"student": …, "connectors": …}, and only those that the phase trains.

    Attributes:
      label: its name in records: "custom:" and a digest of its updates in a hundred steps of a tiny
        problem, to four digits.
      made: the transformation; None where it was read from a record.
    """

    label: str
    made: Any = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, transformation: Any) -> OwnOptimizer:
        """Labels a transformation. Raises `InputError` where it is none."""
        if not isinstance(transformation, optax.GradientTransformation):
            kind = type(transformation).__name__
            raise InputError(
                f"optimizer must be an optax.GradientTransformation, such as optax.adamw(1e-3), "
                f"not {kind}"
            )
        return cls(f"custom:{_digest_updates(transformation)}", transformation)

    def schedule(self, phase: PhaseSchedule) -> Callable[[Any], jax.Array]:
        """Its learning rate is not known from outside: NaN."""
        del phase
        return lambda step: jnp.asarray(jnp.nan)

    @property
    def endless(self) -> bool:
        """Returns True: its schedules count steps, whatever the length of the phase."""
        return True

    def begins(self, shorter: PhaseSchedule, longer: PhaseSchedule) -> bool:
        """Returns True: its schedules count steps, whatever the length of the phase."""
        del shorter, longer
        return True

    def transformation(
        self, phase: PhaseSchedule, trainable: Any | None = None
    ) -> optax.GradientTransformation:
        """The transformation of one phase; see `Optimizer.transformation`."""
        del phase
        made: optax.GradientTransformation = self.made
        return made if trainable is None else optax.masked(made, trainable)


def _digest_updates(transformation: optax.GradientTransformation) -> str:
    """Eight digits that tell two transformations apart by what they do to a tiny dense layer."""
    with jax.enable_x64(False):
        start = {"kernel": jnp.cos(jnp.arange(12.0)).reshape(4, 3), "bias": jnp.ones(3)}
        params = {"student": {"Dense_0": start}, "connectors": {}}

        def step(carry: Any, index: jax.Array) -> Any:
            params, state = carry
            gradients = jax.tree.map(
                lambda leaf: jnp.sin(index + jnp.arange(1.0, leaf.size + 1)).reshape(leaf.shape),
                params,
            )
            updates, state = transformation.update(gradients, state, params)
            sums = [jnp.abs(leaf).sum() for leaf in jax.tree.leaves(updates)]
            return (optax.apply_updates(params, updates), state), jnp.stack(sums)

        try:
            _, sums = jax.lax.scan(step, (params, transformation.init(params)), jnp.arange(100.0))
        except Exception:  # it wants other parameters, so it cannot be told from others of its kind
            return "other"
        digits = [f"{float(each):.3e}" for row in (0, 9, 99) for each in sums[row]]
    return hashlib.sha256(" ".join(digits).encode()).hexdigest()[:8]


class AverageState(NamedTuple):
    """The state of `track_average`: the average of the student's parameters."""

    average: Any


def track_average(decay: float) -> optax.GradientTransformation:
    """Follows the exponential moving average of the student's parameters, behind an optimizer.

    It begins with the phase's first parameters p₀: a₀ = p₀, aₜ = decay·aₜ₋₁ + (1 − decay)·pₜ. The
    updates pass unchanged.

    Args:
      decay: in (0, 1).
    """

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(jnp.array, params["student"]))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params["student"], updates["student"])
        return updates, AverageState(optax.incremental_update(new, state.average, 1 - decay))

    return optax.GradientTransformation(init, update)


def average_in(opt_state: Any) -> Any | None:
    """The average that `track_average` keeps in an optimizer's state; None: it keeps none."""
    is_chain = isinstance(opt_state, tuple) and opt_state
    return opt_state[-1].average if is_chain and isinstance(opt_state[-1], AverageState) else None


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
