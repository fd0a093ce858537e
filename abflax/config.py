"""What a run is: the configuration whose hash names it, and the resources it runs on."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np

from abflax.data import OwnAugmentation
from abflax.errors import (
    InputError,
    UnknownNameError,
    brief,
    require_field_types,
    require_instances,
    unknown,
)
from abflax.methods import METHODS, Phase
from abflax.methods.optimizer import OwnOptimizer
from abflax.methods.phase import RecordedPhase

PRECISIONS = ("float32", "bfloat16", "float64")
"""What a run's networks may compute in."""

NO_TEST = "none"
"""The value of `RunConfig.test` for a run without held-out data."""


OWN = "own"
"""The value of `RunConfig.method` for phases that were given themselves, not by a name."""


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
      method: a name in `abflax.methods.METHODS`, or several joined by "+"; `create`, `replace` and
        `abflax.distill` take a list of `abflax.methods.Phase` too.
      protocol: a name in `abflax.methods.PROTOCOLS`: the choices that papers leave open.
      setting: of the protocol: "cifar", or "transfer" for a teacher of other classes.
      options: the method's options, fields of its terms, sorted by name.
      epochs: of the initialise and the classify phase; a single phase has their sum. As many
        numbers as there are phases where these were given themselves.
      batch_size: examples a step, over all devices.
      fraction: share of the training data used, class-balanced, in (0, 1].
      evaluate_every: epochs between evaluations; the ends of phases are always evaluated.
      seeds: see `Seeds`.
      precision: of the networks' computation, in `PRECISIONS`; parameters, statistics and losses
        are float32 (or float64).
      test: name of the held-out data; None: the test split of `dataset`; `NO_TEST`: none.
      views: how many of an image's crops and flips are ever shown; None: all, as in the paper.
      per_class: examples of each class used, all of it where a class has fewer; None: all.
      own_phases: the phases that were given as the method; None: it has a name.
      learning_rate: where every phase begins; None: the protocol's.
      weight_decay: of every phase; None: the protocol's.
      momentum: of every phase, Nesterov's; None: the protocol's.
      schedule: of the learning rate, a name in `abflax.methods.SCHEDULES`: "constant", or "cosine"
        down to 0; None: the protocol's.
      ema: the decay of an exponential moving average of the student's weights, such as 0.999, which
        is evaluated and saved beside them; None: there is none.
      optimizer: an optax transformation in place of the protocol's SGD; None: it stays.
      target_data: name of the unlabelled images of another domain, for methods that learn from them
        too; None: there are none.
      anchors: names of the teachers before `teacher`, checkpoints of its own training, each
        followed for an equal share of the epochs (Jin et al., ICCV 2019); None: there are none.
      augment: a pure function (key, images) -> images of each batch, after the crops and flips of
        the data's preprocessing and before its normalization; None: there is none.

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
    epochs: tuple[int, ...] = (20, 100)
    batch_size: int = 128
    fraction: float = 1.0
    evaluate_every: int = 1
    seeds: Seeds = Seeds()
    precision: str = "float32"
    test: str | None = None
    views: int | None = None
    per_class: int | None = None
    own_phases: tuple[Phase | RecordedPhase, ...] | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None
    schedule: str | None = None
    ema: float | None = None
    optimizer: OwnOptimizer | None = None
    anchors: tuple[str, ...] | None = None
    augment: OwnAugmentation | None = None
    target_data: str | None = None

    def __post_init__(self) -> None:
        require_field_types(self)
        if self.own_phases is None:
            if len(self.epochs) != 2 or min(self.epochs) < 0 or sum(self.epochs) < 1:
                raise InputError(
                    f"epochs must be two numbers >= 0, initialise + classify, and not both 0; "
                    f"not {self.epochs}"
                )
        else:
            self._require_own_phases(self.own_phases)
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
        _ = self.phases  # refuses an unknown method, protocol or option here, not at first use

    def __getstate__(self) -> dict[str, Any]:
        """Returns the fields alone: copies and pickles work out phases and hash themselves."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _require_own_phases(self, phases: tuple[Phase | RecordedPhase, ...]) -> None:
        """Raises `InputError` where phases that were given do not go with the other settings."""
        names = [phase.name for phase in phases]
        if given := self._optimizer_settings():
            raise InputError(
                f"the method's phases were given, so {given[0]} is said in them: Phase(…, "
                "optimizer=…, ema=…)"
            )
        if not names or len(set(names)) < len(names):
            raise InputError(f"a method needs one phase or more, each with its name; not {names}")
        if self.options:
            raise InputError(
                f"the method's phases were given, so {self.options[0][0]} is said in their terms"
            )
        counts = len(names) in (1, len(self.epochs))
        if not counts or min(self.epochs, default=0) < 0 or sum(self.epochs) < 1:
            raise InputError(
                f"epochs must be a number >= 0 for each of the phases {', '.join(names)}, and not "
                f"all 0; not {self.epochs}"
            )

    def _optimizer_settings(self) -> list[str]:
        return [name for name in _OF_OPTIMIZER if getattr(self, name) is not None]

    @classmethod
    def create(cls, **settings: Any) -> RunConfig:
        """A configuration whose settings may be fields or options of the method.

        Args:
          **settings: fields of `RunConfig`, and fields of the method's terms (`margin`, `layers`,
            `temperature`, …) or `transfer_weight`, which become its `options`. An integer for
            `seeds` stands for all four. A list of phases as `method` becomes `own_phases`. An
            `optimizer` may be an `optax.GradientTransformation`, `augment` a function.

        Raises:
          ValueError: for a name that is neither, with the near matches; or a wrong value.

        Example:
          >>> RunConfig.create(dataset="digits", student="wrn10-1", margin=2.0).options
          (('margin', 2.0),)
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"options"}
        plain = {name: _plain(value) for name, value in settings.items()}
        own = {name: value for name, value in plain.items() if name in fields}
        options = {name: value for name, value in plain.items() if name not in fields}
        if type(own.get("seeds")) is int:
            own["seeds"] = Seeds.all(own["seeds"])
        _require_kinds(own)
        if isinstance(own.get("method"), list | tuple):
            if wrong := [each for each in own["method"] if not isinstance(each, Phase)]:
                raise InputError(
                    "a method is a name or a list of phases, such as [Phase('joint', terms)]; one "
                    f"of them is {brief(wrong[0])}"
                )
            own["own_phases"], own["method"] = tuple(own["method"]), OWN
        elif own.get("method", OWN) != OWN:
            own["own_phases"] = None
        if not isinstance(own.get("optimizer"), OwnOptimizer | None):
            own["optimizer"] = OwnOptimizer.of(own["optimizer"])
        if not isinstance(own.get("augment"), OwnAugmentation | None):
            own["augment"] = OwnAugmentation.of(own["augment"])
        try:
            return cls(**own, options=tuple(sorted(options.items())))
        except UnknownNameError as error:
            # The method has no such option: a setting may be meant.
            known = [*error.near, *fields]
            nearest = difflib.get_close_matches(error.name, known, n=1, cutoff=0.8)
            if error.name in options and fields.intersection(nearest):
                raise unknown("setting", error.name, fields) from None
            raise

    def replace(self, **settings: Any) -> RunConfig:
        """This configuration with some settings changed, as `create` takes them.

        Another method starts without the options of this one.
        """
        given = self.__getstate__()
        require_instances({"method": (settings.get("method", self.method), str | list | tuple)})
        same_method = settings.get("method", self.method) == self.method
        options = dict(self.options) if same_method else {}
        del given["options"]
        return self.create(**given | options | settings)

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The method's phases, for each of its teachers.

        An unknown method, protocol or option is refused when the configuration is made.
        """
        if self.own_phases is not None:
            return cast("tuple[Phase, ...]", self.own_phases)  # recorded ones are never trained
        make = METHODS[self.method]
        made = make(protocol=self.protocol, setting=self.setting, **dict(self.options))
        phases = tuple(self._with_own_optimizer(phase) for phase in made)
        if self.anchors is None:
            return phases
        return tuple(
            dataclasses.replace(phase, name=f"{phase.name} {index + 1}", teacher=index)
            for index in range(len(self.anchors) + 1)
            for phase in phases
        )

    def _with_own_optimizer(self, phase: Phase) -> Phase:
        """A phase of the protocol with the optimizer's settings that were given."""
        optimizer: Any = phase.optimizer
        given = {name: getattr(self, name) for name in self._optimizer_settings()}
        ema, own = given.pop("ema", None), given.pop("optimizer", None)
        if own is not None and given:
            raise InputError(
                f"{next(iter(given))} is a setting of the protocol's SGD, which the optimizer that "
                "was given replaces: say it there"
            )
        if "schedule" in given:
            given["decay"] = given.pop("schedule")
            given |= {} if given["decay"] == "steps" else {"drops": ()}
        numbers = {name: float(x) if name != "decay" else x for name, x in given.items()
                   if name != "drops"}  # fmt: skip
        optimizer = own or dataclasses.replace(optimizer, **given | numbers)
        return dataclasses.replace(phase, optimizer=optimizer, ema=ema)

    @property
    def needs_teacher(self) -> bool:
        """Whether one of the method's terms compares with a teacher."""
        return any(phase.needs_teacher for phase in self.phases)

    @property
    def phase_epochs(self) -> Mapping[str, int]:
        """Phase name -> its epochs."""
        if self.own_phases is not None:
            names = [phase.name for phase in self.own_phases]
            lengths = self.epochs if len(names) > 1 else (sum(self.epochs),)
            return dict(zip(names, lengths, strict=True))
        initialise, classify = self.epochs
        whole = {"initialise": initialise, "classify": classify, "joint": initialise + classify}
        if self.anchors is None:
            return whole
        count = len(self.anchors) + 1
        return {
            f"{name} {index + 1}": epochs * (index + 1) // count - epochs * index // count
            for name, epochs in whole.items()
            for index in range(count)
        }

    @property
    def group_key(self) -> dict[str, Any]:
        """What runs trained in one program have in common: batches, teacher, drift of the teacher.

        The teacher's running statistics drift in the phases in which it uses batch statistics.
        """
        names = ("dataset", "fraction", "per_class", "views", "batch_size", "test", "teacher",
                 "precision", "augment", "target_data")  # fmt: skip
        key: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in ("order", "augmentation", "subset"):
            key[f"the seed of {name}"] = getattr(self.seeds, name)
        phases = self.phases
        lengths = [self.phase_epochs[phase.name] for phase in phases]
        ends = itertools.accumulate(lengths)
        key["the epochs in which the teacher's statistics drift"] = tuple(
            (end - length, end, *(["and it is trained"] if phase.trains_teacher else []))
            for phase, length, end in zip(phases, lengths, ends, strict=True)
            if (phase.teacher_batch_statistics or phase.trains_teacher) and length
        )
        if self.anchors is not None:
            key["the anchors, and the epochs with each"] = (
                self.anchors,
                tuple((phase.teacher, n) for phase, n in zip(phases, lengths, strict=True)),
            )
        return key

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with which `abflax.distill` trains this run, given its networks and data."""
        given = self.__getstate__()
        for name in ("dataset", "student", "teacher", "test", "options", "anchors", "target_data"):
            del given[name]
        return given | dict(self.options)

    def as_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        plain = self.__getstate__()
        plain["seeds"] = dataclasses.asdict(self.seeds)
        if self.own_phases is not None:
            plain["own_phases"] = [phase.as_json() for phase in self.own_phases]
        if self.optimizer is not None:
            plain["optimizer"] = self.optimizer.label
        if self.augment is not None:
            plain["augment"] = self.augment.label
        return json.loads(json.dumps(plain))

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> RunConfig:
        """The inverse of `as_json`: the configuration in a record's `config`."""
        names = {"options", "epochs", "anchors"} & given.keys()
        read = {name: _as_tuples(given[name]) for name in names}
        read["seeds"] = Seeds(**given["seeds"])
        if (phases := given.get("own_phases")) is not None:
            read["own_phases"] = tuple(RecordedPhase(json.dumps(each)) for each in phases)
        if (label := given.get("optimizer")) is not None:
            read["optimizer"] = OwnOptimizer(label)
        if (label := given.get("augment")) is not None:
            read["augment"] = OwnAugmentation(label)
        return cls(**{**given, **read})

    @functools.cached_property
    def hash(self) -> str:
        """Twelve hexadecimal digits of SHA-256 over all that changes a number.

        Method, protocol, setting and options are replaced by the phases that they stand for: the
        same objective under another name is the same run (except that layers count as they are
        named: "last" is not "layer3"), and a constant that changes in a protocol makes another.
        Other fields count only where they differ from their defaults, so a field that is added
        later changes no hash. Defaults therefore never change.
        """
        given: dict[str, Any] = {"phases": [phase.as_json() for phase in self.phases]}
        plain = self.as_json()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            in_phases = field.name in _IN_PHASES
            if not in_phases and (field.default is dataclasses.MISSING or value != field.default):
                given[field.name] = plain[field.name]
        text = json.dumps(given, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


_OF_OPTIMIZER = ("learning_rate", "weight_decay", "momentum", "schedule", "ema", "optimizer")
_IN_PHASES = ("method", "protocol", "setting", "options", "own_phases", *_OF_OPTIMIZER)
"""The fields that a run's hash has as the phases that they stand for."""


def _require_count(name: str, value: int) -> None:
    """Checks a number of things before memory is asked for them."""
    if value < 1:
        raise InputError(f"{name} must be at least 1, not {value}")
    if value > MOST:
        raise InputError(f"{name} must be at most {MOST:,}, not {value:,}")


def _require_kinds(settings: Mapping[str, Any]) -> None:
    """Says what would be right, where a setting is often given in another form."""
    if not isinstance(settings.get("epochs", ()), tuple):
        raise InputError(
            "epochs are a tuple of whole numbers, one for each phase, such as (20, 100), not "
            f"{brief(settings['epochs'])}"
        )
    for name in ("learning_rate", "schedule"):
        if callable(settings.get(name)):
            raise InputError(
                f"{name} cannot be a function: give your schedule to an optimizer, such as "
                "optimizer=optax.sgd(schedule, momentum=0.9)"
            )


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
      cache_targets: compute the teacher's targets once for each view of an image, and keep them for
        all runs of this process that share them.
      tensorboard: write the history as TensorBoard events too, beside the record.
      workers: processes that decode images; None: one a core, 16 at most.
      keep_anchors: how many students of the run are kept as `anchors/EPOCH.safetensors`, at equal
        distances of epochs (after which it is evaluated), for a route of teachers later. A run that
        has passed such an epoch without keeping its student is refused.
    """

    devices: int | None = None
    steps_per_dispatch: int | None = None
    checkpoint_seconds: float = 60.0
    cache_targets: bool = False
    tensorboard: bool = False
    workers: int | None = None
    keep_anchors: int = 0

    def __post_init__(self) -> None:
        require_field_types(self)
        if self.keep_anchors < 0:
            raise InputError(f"keep_anchors must be at least 0, not {self.keep_anchors}")
        for name in ("workers", "steps_per_dispatch"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
