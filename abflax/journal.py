"""How far a run has come, and where its phases and evaluations lie."""

from __future__ import annotations

import dataclasses
import time
from fractions import Fraction
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from abflax.config import RunConfig
from abflax.errors import InputError
from abflax.optim import Span
from abflax.phase import Phase


@dataclasses.dataclass
class Journal:
    """How far a run has come, and what it has to tell: the JSON part of its checkpoints.

    Attributes:
      step: steps of the run made so far.
      phase: index of the phase that the last of them belonged to.
      history: see `abflax.record`.
      seconds: phase -> time spent on it, over all sittings.
      abreast: how many runs were trained in one program with it, itself included, at most.
      counted, sums: steps since the last evaluation, and the sums of their metrics.
    """

    step: int = 0
    phase: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    abreast: int = 1
    counted: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, metrics: dict[str, np.ndarray], count: int) -> None:
        """Adds up the first `count` steps of metrics, `[steps]` each, in order."""
        for index in range(count):
            for name, values in metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + float(values[index])
        self.counted += count

    def means(self) -> dict[str, Any]:
        """Their means as an entry of the history has them; the count begins anew."""
        means = {name: value / self.counted for name, value in self.sums.items()}
        self.counted, self.sums = 0, {}
        nested = unflatten_dict(means, sep="/")
        loss, norm = nested.pop("loss"), nested.pop("gradient_norm")
        return {"loss": loss, "gradient_norm": norm, "training": nested}

    def clock(self, phase: str, began: float) -> float:
        """Adds the time since `began` to the phase's seconds, and returns now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - began
        return now


def phases_and_spans(config: RunConfig, examples: int) -> tuple[list[Phase], list[Span]]:
    """The phases that have steps, and where each lies in the run."""
    per_epoch = Fraction(examples, config.batch_size)
    phases, spans, before = [], [], 0
    for phase in config.phases():
        after = before + config.lengths[phase.name]
        start, end = int(before * per_epoch), int(after * per_epoch)
        if after > before and end == start:
            raise InputError(
                f"{after - before} epochs of {examples} examples are less than one batch of "
                f"{config.batch_size}, so phase {phase.name} would have no step"
            )
        if end > start:
            phases.append(phase)
            spans.append(
                Span(start, end - start, before, after - before, sum(config.epochs), per_epoch)
            )
        before = after
    return phases, spans


def evaluation_steps(config: RunConfig, spans: list[Span], examples: int) -> dict[int, int]:
    """step of the run -> epoch, for each evaluation; ends of phases included."""
    ends = {span.epochs_before + span.epochs for span in spans}
    steps = {}
    for epoch in range(1, sum(config.epochs) + 1):
        if epoch in ends or epoch % config.evaluate_every == 0:
            steps[int(epoch * Fraction(examples, config.batch_size))] = epoch
    return {step: epoch for step, epoch in steps.items() if step > 0}
