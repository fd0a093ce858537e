"""A phase of a run, as data: the weighted terms of its objective, and its optimizer."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import reprlib
from typing import Any, ClassVar

import optax

from abflax.errors import InputError
from abflax.methods.optimizer import (
    Optimizer,
    OwnOptimizer,
    PhaseSchedule,
    track_average,
)
from abflax.methods.terms import Term
from abflax.methods.views import TARGET_DOMAIN
from abflax.methods.weights import Schedule, Weight


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training with one objective and one optimizer.

    Attributes:
      name: "initialise", "classify", or "joint" where one objective fills the whole run; any name
        for a phase of one's own.
      terms: (weight, term); the objective is their weighted sum, each a mean over the batch. A
        weight is a number, or a schedule such as `Ramp`.
      optimizer: rebuilt at the start of the phase; an `optax.GradientTransformation` will do.
      teacher_batch_statistics: whether the teacher's batch norms use the batch's statistics, and
        its running ones drift.
      ema: the decay of an exponential moving average of the student's weights, in (0, 1), which is
        evaluated and saved beside them; None: there is none.
      teacher: which of the run's teachers, from 0 (see `RunConfig.anchors`).

    Raises:
      ValueError: if the terms are no pairs of a weight and a term, or a term has a field that
        cannot be written as JSON.
    """

    name: str
    terms: tuple[tuple[Weight, Term], ...]
    optimizer: Optimizer | OwnOptimizer = Optimizer()
    teacher_batch_statistics: bool = False
    ema: float | None = None
    teacher: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a phase's name must be a word, not {reprlib.repr(self.name)}")
        if not isinstance(self.optimizer, Optimizer | OwnOptimizer):
            object.__setattr__(self, "optimizer", OwnOptimizer.of(self.optimizer))
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema is a decay between 0 and 1, such as 0.999, not {self.ema}")
        terms = tuple(map(_checked, self.terms)) if isinstance(self.terms, tuple | list) else ()
        if not terms:
            raise InputError(
                f"the terms of phase {self.name} must be pairs of a weight and a term, such as "
                "[(1.0, CrossEntropy())]"
            )
        object.__setattr__(self, "terms", terms)
        if self.trains_teacher and set(self.views) - {TARGET_DOMAIN}:
            raise InputError(f"phase {self.name} trains its teacher, so no view is made by it")

    @property
    def needs_teacher(self) -> bool:
        """Whether a term does."""
        return any(term.needs_teacher for _, term in self.terms)

    @property
    def needs_student(self) -> bool:
        """Whether a term does; else the student stays as it is."""
        return any(term.needs_student for _, term in self.terms)

    def transformation(
        self, schedule: PhaseSchedule, trainable: Any | None = None
    ) -> optax.GradientTransformation:
        """The optimizer's transformation, and the average behind it; see `Optimizer`."""
        optimizer = self.optimizer.transformation(schedule, trainable)
        return optimizer if self.ema is None else optax.chain(optimizer, track_average(self.ema))

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is trained along, from the weights that it is given with."""
        return any(term.trains_teacher for _, term in self.terms)

    @property
    def views(self) -> tuple[str, ...]:
        """The views that its terms read."""
        return tuple(dict.fromkeys(term.view for _, term in self.terms if term.view is not None))

    def as_json(self) -> dict[str, Any]:
        """All that the phase optimizes, as plain JSON values: what a run's hash and record hold.

        Fields at their defaults are left out, so that one that is added later changes no hash.
        """
        optimizer = self.optimizer
        settings = _given(optimizer)
        if isinstance(optimizer, OwnOptimizer):
            settings = {"optax": optimizer.label}
        found = {
            **({"teacher": self.teacher} if self.teacher else {}),
            "name": self.name,
            "terms": [
                [
                    weight.as_json() if isinstance(weight, Schedule) else weight,
                    type(term).__name__,
                    _given(term),
                ]
                for weight, term in self.terms
            ],
            "optimiser": settings,
            "teacher_batch_statistics": self.teacher_batch_statistics,
        }
        return found if self.ema is None else found | {"ema": self.ema}


@dataclasses.dataclass(frozen=True)
class RecordedPhase:
    """A phase as a record has it: it can be read and named, but not trained.

    The classes of its terms need not be at hand.

    Attributes:
      text: what `Phase.as_json` gives, as JSON.
    """

    text: str
    needs_teacher: ClassVar[bool] = False
    trains_teacher: ClassVar[bool] = False
    teacher_batch_statistics: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The phase's name."""
        return str(self.as_json()["name"])

    def as_json(self) -> dict[str, Any]:
        """All that the phase optimizes; see `Phase.as_json`."""
        found: dict[str, Any] = json.loads(self.text)
        return found


def _checked(pair: Any) -> tuple[Weight, Term]:
    """A weight and a term, the weight a float or a schedule."""
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Term):
        raise InputError(
            f"a phase's term must be a pair of a weight and a Term, not {reprlib.repr(pair)}"
        )
    weight, term = pair
    for given in (each for each in pair if isinstance(each, Term | Schedule)):
        if unseen := _unseen(given):
            raise InputError(
                f"{type(given).__name__} keeps {unseen[0]}, by which it is not compared: terms and "
                "schedules are frozen dataclasses (@dataclasses.dataclass(frozen=True)), whose "
                "fields are all that they hold"
            )
    if not isinstance(weight, Schedule):
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise InputError(
                f"the weight of {type(term).__name__} must be a finite number or a Ramp, not "
                f"{reprlib.repr(weight)}"
            )
        weight = float(weight)
    try:
        hash(term), json.dumps(_given(term), allow_nan=False)
    except (TypeError, ValueError):
        raise InputError(
            f"the fields of {type(term).__name__} must be numbers, words or tuples of them: they "
            "are written into the run's record, and name it"
        ) from None
    return weight, term


def _unseen(given: Any) -> list[str]:
    """What an object holds besides the fields that it is compared by, and cached properties."""
    compared = {field.name for field in dataclasses.fields(given) if field.compare}
    kind = type(given)
    return [
        name
        for name in sorted(vars(given).keys() - compared)
        if not isinstance(getattr(kind, name, None), functools.cached_property)
    ]


def _given(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    found = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
