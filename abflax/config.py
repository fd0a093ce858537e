"""What a run is: the configuration whose hash names it, and what it runs on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from typing import Any

from abflax.errors import InputError, unknown
from abflax.methods import METHODS
from abflax.settings import require_types

PRECISIONS = ("float32", "bfloat16", "float64")
"""What a run's networks may compute in."""


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Each source of randomness, so that one can be varied alone.

    A teacher that was trained with its student's `weights` seed began from the same weights
    wherever the two have layers of one name and shape: give teachers a seed of their own.

    Attributes:
      weights: the student's initial weights and the connectors'.
      order: the order of the examples.
      augmentation: crops and flips, and students' dropout.
      subset: which examples, where only a share of the training data is used.
    """

    weights: int = 0
    order: int = 0
    augmentation: int = 0
    subset: int = 0

    def __post_init__(self) -> None:
        require_types(self)
        if min(dataclasses.astuple(self)) < 0:
            raise InputError(f"seeds must be whole numbers >= 0: {self}")

    @classmethod
    def all(cls, seed: int) -> Seeds:
        """The same seed for everything."""
        return cls(seed, seed, seed, seed)


NO_TEST = "none"
"""In place of the held-out data's name, where there are none."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that changes a run's numbers, and nothing else.

    Attributes:
      dataset: name of the training data.
      student: name of the student's architecture, and where it is tapped if it was told.
      teacher: name of the teacher and what identifies its weights; None: there is none.
      test: name of the held-out data; None: the test split of `dataset`; `NO_TEST`: there is none.
      views: how many of an image's crops and flips are ever shown; None: all, as in the paper.
      method, protocol, setting: see `abflax.methods`.
      options: the method's options, sorted by name.
      epochs: of initialise and classify; a joint phase has their sum.
      batch_size: examples per step, over all devices.
      fraction: share of the training data used, class-balanced.
      per_class: examples of each class used, all of it where a class has fewer; None: all.
      evaluate_every: epochs between evaluations; the ends of phases are always evaluated.
      seeds: see `Seeds`.
      precision: of the networks' computation; parameters, statistics and losses are float32 (or
        float64).
    """

    dataset: str
    student: str
    teacher: str | None = None
    method: str = "activation-boundary"
    protocol: str = "paper"
    setting: str = "cifar"
    options: tuple[tuple[str, Any], ...] = ()
    epochs: tuple[int, int] = (20, 100)
    batch_size: int = 128
    fraction: float = 1.0
    evaluate_every: int = 1
    seeds: Seeds = Seeds()
    precision: str = "float32"
    test: str | None = None
    views: int | None = None
    per_class: int | None = None

    def __post_init__(self) -> None:
        require_types(self)
        if min(self.epochs) < 0 or sum(self.epochs) < 1:
            raise InputError(
                f"epochs must be two numbers >= 0, initialise + classify, and not both 0; "
                f"not {self.epochs}"
            )
        for name in ("batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.fraction <= 1:
            raise InputError(
                f"the fraction of the training data must be in (0, 1], not {self.fraction}"
            )
        if self.per_class is not None and self.per_class < 1:
            raise InputError(f"per_class must be at least 1, not {self.per_class}")
        if self.per_class is not None and self.fraction != 1:
            raise InputError("give a fraction of the training data or examples per_class, not both")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        self.phases()

    def phases(self) -> tuple[Any, ...]:
        """The method's phases. Raises `ValueError` for an unknown method, protocol or option."""
        make = METHODS[self.method]
        return make(protocol=self.protocol, setting=self.setting, **dict(self.options))

    @property
    def lengths(self) -> dict[str, int]:
        """The epochs of a phase, by its name."""
        initialise, classify = self.epochs
        return {"initialise": initialise, "classify": classify, "joint": initialise + classify}

    @property
    def lesson(self) -> dict[str, Any]:
        """What runs have in common that are taught together (`distill`'s `abreast`): the batches,
        the teacher, and the epochs while it drifts, so that it says the same to all."""
        names = ("dataset", "fraction", "per_class", "views", "batch_size", "test", "teacher",
                 "precision")  # fmt: skip
        lesson: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in ("order", "augmentation", "subset"):
            lesson[f"the seed of {name}"] = getattr(self.seeds, name)
        phases = self.phases()
        lengths = [self.lengths[phase.name] for phase in phases]
        lesson["the epochs in which the teacher's statistics drift"] = tuple(
            (end - length, end)
            for phase, length, end in zip(
                phases, lengths, itertools.accumulate(lengths), strict=True
            )
            if phase.teacher_batch_statistics and length
        )
        return lesson

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords with which `abflax.distill` makes this run, of its networks and data."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("dataset", "student", "teacher", "test"):
            del given[name]
        return given | dict(given.pop("options"))

    def as_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> RunConfig:
        """The inverse of `as_json`: what a record's `config` says."""
        tuples = {name: _as_tuples(given[name]) for name in ("options", "epochs")}
        return cls(**{**given, **tuples, "seeds": Seeds(**given["seeds"])})

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of SHA-256 over all that changes a number.

        Method, protocol, setting and options enter as the phases that they stand for: the same
        objective under another spelling is the same run (but that layers count as they are named:
        "last" is not "layer3"), and a constant that changes in a protocol makes another. Other
        fields enter where they differ from their defaults, so that one that is added later changes
        no hash; defaults therefore never change.
        """
        given: dict[str, Any] = {"phases": [phase.described() for phase in self.phases()]}
        plain = self.as_json()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            spelt_out = field.name in ("method", "protocol", "setting", "options")
            if not spelt_out and (field.default is dataclasses.MISSING or value != field.default):
                given[field.name] = plain[field.name]
        text = json.dumps(given, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _as_tuples(value: Any) -> Any:
    """JSON's lists are tuples here, at every depth."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Resources:
    """What changes a run's speed and safety, but none of its numbers, so not its name.

    Attributes:
      devices: how many of each process's devices; None: all.
      steps_per_dispatch: None: 1 on CPUs; on accelerators 100, of photographs 8.
      checkpoint_seconds: the longest time between two checkpoints; every evaluation makes one
        too.
      keep_targets: ask the teacher once for each of the `views`, and keep what it said.
      tensorboard: write the history as TensorBoard events too, beside the record.
      workers: processes that decode photographs; None: one a core, 16 at most.
    """

    devices: int | None = None
    steps_per_dispatch: int | None = None
    checkpoint_seconds: float = 60.0
    keep_targets: bool = False
    tensorboard: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        require_types(self)
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers must be at least 1, not {self.workers}")
        if self.steps_per_dispatch is not None and self.steps_per_dispatch < 1:
            raise InputError(
                f"steps_per_dispatch must be at least 1, not {self.steps_per_dispatch}"
            )
