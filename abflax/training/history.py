"""The history of a run: how far it has come, and where its phases and evaluations are."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from abflax.config import RunConfig
from abflax.errors import InputError
from abflax.methods import Phase, PhaseSchedule
from abflax.methods.weights import Schedule

_GREW = 1000.0  # times
_SMALL = 1e-3  # a loss that begins lower has room to grow


@dataclasses.dataclass
class TrainHistory:
    """How far a run has come, and its results so far: the JSON part of its checkpoints.

    Attributes:
      step: steps of the run that have been made.
      phase: index of the phase that the last of them belongs to.
      entries: one for each evaluation; see `abflax.training.record`.
      seconds: phase -> time spent on it, over all sittings.
      group_size: the most runs that were trained in one program with it, itself included.
      counted: steps since the last evaluation.
      sums: the sums of their metrics.
      losses: phase -> the loss of its first step, and the highest of any.
      position: where a loader's next batch is, as text; None: it follows from the step, or is not
        known.
      restarts: the steps at which another pass over a loader began, since its position was not
        known when the run was resumed.
      connectors: the digest of those that were kept last.
      anchors: epoch -> the digest of the student that was kept after it.
      grown_from: the name of the shorter run whose end this one began with; None: there is none.
    """

    step: int = 0
    phase: int = 0
    entries: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    group_size: int = 1
    counted: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    position: str | None = None
    restarts: list[int] = dataclasses.field(default_factory=list)
    connectors: str | None = None
    anchors: dict[str, str] = dataclasses.field(default_factory=dict)
    grown_from: str | None = None

    def add(self, metrics: dict[str, np.ndarray], count: int) -> None:
        """Adds up the first `count` steps of metrics, `[steps]` each, in order."""
        for index in range(count):
            for name, values in metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + float(values[index])
        self.counted += count

    def add_losses(self, phase: str, losses: np.ndarray) -> None:
        """Takes note of the losses of a phase's next steps, `[steps]`."""
        if len(losses):
            first, highest = self.losses.get(phase, [float(losses[0])] * 2)
            self.losses[phase] = [first, max(highest, float(losses.max()))]

    def describe_growth(self) -> str:
        """One sentence, if the loss of a phase has ever grown a thousandfold; else ""."""
        grown = [
            f"in phase {phase} the loss grew from {first:.3g} to {highest:.3g}"
            for phase, (first, highest) in self.losses.items()
            if highest > _GREW * max(first, _SMALL)
        ]
        return f"{' and '.join(grown)}: is the learning rate too high?" if grown else ""

    def take_means(self) -> dict[str, Any]:
        """Returns the mean metrics since the last evaluation, and starts counting anew."""
        means = {name: value / self.counted for name, value in self.sums.items()}
        self.counted, self.sums = 0, {}
        nested = unflatten_dict(means, sep="/")
        loss, norm = nested.pop("loss"), nested.pop("gradient_norm")
        return {"loss": loss, "gradient_norm": norm, "training": nested}

    def add_time(self, phase: str, began: float) -> float:
        """Adds the time since `began` to the phase's seconds, and returns now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - began
        return now


def phases_and_schedules(
    config: RunConfig, examples: int
) -> tuple[list[Phase], list[PhaseSchedule]]:
    """The phases that have steps, and where each lies in the run.

    Raises:
      ValueError: if a phase has epochs, but fewer examples than one batch.
    """
    per_epoch = Fraction(examples, config.batch_size)
    phases, schedules, before = [], [], 0
    for phase in config.phases:
        after = before + config.phase_epochs[phase.name]
        start, end = int(before * per_epoch), int(after * per_epoch)
        if after > before and end == start:
            raise InputError(
                f"{after - before} epochs of {examples} examples are less than one batch of "
                f"{config.batch_size}, so phase {phase.name} would have no step"
            )
        if end > start:
            phases.append(phase)
            schedules.append(
                PhaseSchedule(
                    start, end - start, before, after - before, sum(config.epochs), per_epoch
                )
            )
        before = after
    return phases, schedules


def begins(shorter: RunConfig, longer: RunConfig, examples: int) -> bool:
    """Whether all steps of a run are the first steps of one with more epochs.

    The phases before the last have as many steps in both, and in all its steps the learning rates
    and the weights of terms are the same: so with a constant schedule or an optimizer that was
    given, and weights that are numbers or do not depend on the phase's length.
    """
    if sum(shorter.epochs) >= sum(longer.epochs):
        return False
    phases, ours = phases_and_schedules(shorter, examples)
    others, theirs = phases_and_schedules(longer, examples)
    if phases != others[: len(phases)]:
        return False
    *before, last = zip(phases, ours, theirs, strict=False)
    return (
        all(our.steps == their.steps for _, our, their in before)
        and last[1].steps <= last[2].steps
        and all(phase.optimizer.begins(our, their) for phase, our, their in (*before, last))
        and all(_same_weights(*each) for each in (*before, last))
    )


def _same_weights(phase: Phase, shorter: PhaseSchedule, longer: PhaseSchedule) -> bool:
    """Whether the weights of a phase's terms are the same in all steps of the shorter."""

    def weights(span: PhaseSchedule) -> list[jax.Array]:
        schedules = [weight for weight, _ in phase.terms if isinstance(weight, Schedule)]
        at = lambda step: [each(step, span.steps_per_epoch, span.epochs) for each in schedules]  # noqa: E731
        return jax.vmap(at)(jnp.arange(shorter.steps)) if schedules else []

    return all(map(np.array_equal, weights(shorter), weights(longer)))


def anchor_epochs(epochs: Iterable[int], count: int) -> set[int]:
    """The epochs among those that are nearest to `count` equal parts of the last.

    Raises:
      ValueError: if the same one is the nearest to two parts.
    """
    epochs = sorted(epochs)
    wanted = [Fraction(epochs[-1] * part, count) for part in range(1, count + 1)]
    found = {min(epochs, key=lambda epoch: abs(epoch - each)) for each in wanted}
    if len(found) < count:
        raise InputError(
            f"{count} anchors are asked for of a run of {epochs[-1]} epochs that is evaluated "
            f"{len(epochs)} times, which gives {len(found)}: evaluate it more often "
            "(evaluate_every), or keep fewer (keep_anchors)"
        )
    return found


def evaluation_steps(
    config: RunConfig, schedules: list[PhaseSchedule], examples: int
) -> dict[int, int]:
    """Step of the run -> epoch, for each evaluation; ends of phases included."""
    ends = {each.epochs_before + each.epochs for each in schedules}
    steps: dict[int, int] = {}
    for epoch in range(1, sum(config.epochs) + 1):
        step = int(epoch * Fraction(examples, config.batch_size))
        # Where a step spans several epochs, the end of a phase gives it its name.
        if epoch in ends or (epoch % config.evaluate_every == 0 and steps.get(step, 0) not in ends):
            steps[step] = epoch
    return {step: epoch for step, epoch in steps.items() if step > 0}
