"""What a run is: the configuration whose hash names it, and the resources it runs on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from abflax.errors import InputError, require_field_types, require_instances, unknown
from abflax.methods import METHODS, Phase

PRECISIONS = ("float32", "bfloat16", "float64")
"""What a run's networks may compute in."""

NO_TEST = "none"
"""The value of `RunConfig.test` for a run without held-out data."""


MOST = 1_000_000
"""The largest number of epochs, of examples in a batch, and of steps in a dispatch."""


@dataclasses.dataclass(frozen=True)
class Seeds:
    """One seed for each source of randomness, so that each can be varied alone.

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
        require_field_types(self)
        if not all(0 <= seed < 2**32 for seed in dataclasses.astuple(self)):
            raise InputError(f"seeds must be whole numbers from 0 to 2³² − 1: {self}")

    @classmethod
    def all(cls, seed: int) -> Seeds:
        """The same seed for everything."""
        return cls(seed, seed, seed, seed)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that changes a run's numbers, and nothing else.

    Attributes:
      dataset: name of the training data.
      student: name of the student's architecture, with its tap paths where they were given.
      teacher: name of the teacher, which identifies its weights; None: there is none.
      method: a name in `abflax.methods.METHODS`, or several joined by "+".
      protocol: a name in `abflax.methods.PROTOCOLS`: the choices that papers leave open.
      setting: of the protocol: "cifar", or "transfer" for a teacher of other classes.
      options: the method's options, fields of its terms, sorted by name.
      epochs: of the initialise and the classify phase; a joint phase has their sum.
      batch_size: examples a step, over all devices.
      fraction: share of the training data used, class-balanced, in (0, 1].
      evaluate_every: epochs between evaluations; the ends of phases are always evaluated.
      seeds: see `Seeds`.
      precision: of the networks' computation, in `PRECISIONS`; parameters, statistics and losses
        are float32 (or float64).
      test: name of the held-out data; None: the test split of `dataset`; `NO_TEST`: none.
      views: how many of an image's crops and flips are ever shown; None: all, as in the paper.
      per_class: examples of each class used, all of it where a class has fewer; None: all.

    Raises:
      ValueError: for a value that cannot be right.
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
        require_field_types(self)
        if min(self.epochs) < 0 or sum(self.epochs) < 1:
            raise InputError(
                f"epochs must be two numbers >= 0, initialise + classify, and not both 0; "
                f"not {self.epochs}"
            )
        if sum(self.epochs) > MOST:
            raise InputError(f"there can be {MOST:,} epochs at most, not {sum(self.epochs):,}")
        for name in ("batch_size", "evaluate_every"):
            _require_count(name, getattr(self, name))
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

    @classmethod
    def create(cls, **settings: Any) -> RunConfig:
        """A configuration whose settings may be fields or options of the method.

        Args:
          **settings: fields of `RunConfig`, and fields of the method's terms (`margin`, `layers`,
            `temperature`, …) or `transfer_weight`, which become its `options`. An integer for
            `seeds` stands for all four.

        Raises:
          ValueError: for a name that is neither, with the near matches; or a wrong value.

        Example:
          >>> RunConfig.create(dataset="digits", student="wrn10-1", margin=2.0).options
          (('margin', 2.0),)
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"options"}
        own = {name: value for name, value in settings.items() if name in fields}
        options = {name: _plain(value) for name, value in settings.items() if name not in fields}
        if type(own.get("seeds")) is int:
            own["seeds"] = Seeds.all(own["seeds"])
        return cls(**own, options=tuple(sorted(options.items())))

    def replace(self, **settings: Any) -> RunConfig:
        """This configuration with some settings changed, as `create` takes them.

        Another method starts without the options of this one.
        """
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        require_instances({"method": (settings.get("method", self.method), str)})
        same_method = settings.get("method", self.method) == self.method
        options = dict(self.options) if same_method else {}
        del given["options"]
        return self.create(**given | options | settings)

    def phases(self) -> tuple[Phase, ...]:
        """The method's phases. Raises `ValueError` for an unknown method, protocol or option."""
        make = METHODS[self.method]
        return make(protocol=self.protocol, setting=self.setting, **dict(self.options))

    @property
    def needs_teacher(self) -> bool:
        """Whether one of the method's terms compares with a teacher."""
        return any(phase.needs_teacher for phase in self.phases())

    @property
    def phase_epochs(self) -> Mapping[str, int]:
        """Phase name -> its epochs."""
        initialise, classify = self.epochs
        return {"initialise": initialise, "classify": classify, "joint": initialise + classify}

    @property
    def group_key(self) -> dict[str, Any]:
        """What runs trained in one program have in common: batches, teacher, drift of the teacher.

        The teacher's running statistics drift in the phases in which it uses batch statistics.
        """
        names = ("dataset", "fraction", "per_class", "views", "batch_size", "test", "teacher",
                 "precision")  # fmt: skip
        key: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in ("order", "augmentation", "subset"):
            key[f"the seed of {name}"] = getattr(self.seeds, name)
        phases = self.phases()
        lengths = [self.phase_epochs[phase.name] for phase in phases]
        ends = itertools.accumulate(lengths)
        key["the epochs in which the teacher's statistics drift"] = tuple(
            (end - length, end)
            for phase, length, end in zip(phases, lengths, ends, strict=True)
            if phase.teacher_batch_statistics and length
        )
        return key

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with which `abflax.distill` trains this run, given its networks and data."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("dataset", "student", "teacher", "test", "options"):
            del given[name]
        return given | dict(self.options)

    def as_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> RunConfig:
        """The inverse of `as_json`: the configuration in a record's `config`."""
        tuples = {name: _as_tuples(given[name]) for name in ("options", "epochs")}
        return cls(**{**given, **tuples, "seeds": Seeds(**given["seeds"])})

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of SHA-256 over all that changes a number.

        Method, protocol, setting and options are replaced by the phases that they stand for: the
        same objective under another name is the same run (except that layers count as they are
        named: "last" is not "layer3"), and a constant that changes in a protocol makes another.
        Other fields count only where they differ from their defaults, so a field that is added
        later changes no hash. Defaults therefore never change.
        """
        given: dict[str, Any] = {"phases": [phase.as_json() for phase in self.phases()]}
        plain = self.as_json()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            in_phases = field.name in ("method", "protocol", "setting", "options")
            if not in_phases and (field.default is dataclasses.MISSING or value != field.default):
                given[field.name] = plain[field.name]
        text = json.dumps(given, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _require_count(name: str, value: int) -> None:
    """Checks a number of things before memory is asked for them."""
    if value < 1:
        raise InputError(f"{name} must be at least 1, not {value}")
    if value > MOST:
        raise InputError(f"{name} must be at most {MOST:,}, not {value:,}")


def _plain(value: Any) -> Any:
    """A NumPy or JAX scalar as Python's own number."""
    is_scalar = isinstance(value, np.generic | jax.Array) and value.ndim == 0
    return value.item() if is_scalar else value


def _as_tuples(value: Any) -> Any:
    """JSON's lists as tuples, at every depth."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Resources:
    """What changes a run's speed and safety, but none of its numbers, so not its name.

    Attributes:
      devices: how many of each process's devices; None: all.
      steps_per_dispatch: optimization steps that one call of the compiled program makes; None: 1 on
        CPUs, 100 on accelerators, 8 there for images that are decoded as they are needed.
      checkpoint_seconds: the longest time between two checkpoints; every evaluation saves one too.
      cache_targets: compute the teacher's targets once for each of the `views`, and keep them.
      tensorboard: write the history as TensorBoard events too, beside the record.
      workers: processes that decode images; None: one a core, 16 at most.
    """

    devices: int | None = None
    steps_per_dispatch: int | None = None
    checkpoint_seconds: float = 60.0
    cache_targets: bool = False
    tensorboard: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        require_field_types(self)
        for name in ("workers", "steps_per_dispatch"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
