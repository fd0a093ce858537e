"""A phase of a run, as data: the weighted terms of its objective, and its optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any

from abflax.methods.optimizer import Optimizer
from abflax.methods.terms import Term


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with one objective and one optimizer.

    Attributes:
      name: "initialise", "classify", or "joint" where one objective fills the whole run.
      terms: (weight, term); the objective is their weighted sum, each a mean over the batch.
      optimizer: rebuilt at the start of the phase.
      teacher_batch_statistics: whether the teacher's batch norms use the batch's statistics, and
        its running ones drift.
      teacher: which of the run's teachers, from 0 (see `RunConfig.anchors`).
    """

    name: str
    terms: tuple[tuple[float, Term], ...]
    optimizer: Optimizer
    teacher_batch_statistics: bool = False
    teacher: int = 0

    @property
    def needs_teacher(self) -> bool:
        """Whether a term does."""
        return any(term.needs_teacher for _, term in self.terms)

    @property
    def views(self) -> tuple[str, ...]:
        """The views that its terms read."""
        return tuple(dict.fromkeys(term.view for _, term in self.terms if term.view is not None))

    def as_json(self) -> dict[str, Any]:
        """All that the phase optimizes, as plain JSON values: what a run's hash and record hold.

        Fields at their defaults are left out, so that one that is added later changes no hash.
        """
        which = {"teacher": self.teacher} if self.teacher else {}
        return which | {
            "name": self.name,
            "terms": [[weight, type(t).__name__, _given(t)] for weight, t in self.terms],
            "optimiser": _given(self.optimizer),
            "teacher_batch_statistics": self.teacher_batch_statistics,
        }


def _given(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    found = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
