"""Try to get one experiment's result for another, and count in tests/RELIABILITY.md.

A tiny run is finished, and another stopped halfway, each in a workdir. Then experiments that differ
in one thing (data, student, teacher, configuration or surroundings) are started there. Each must be
refused, or be another run by its name. Damaged results must be refused as well.

Examples:
  python -m tests.identity
  python -m tests.identity --page
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import jax
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console

from abflax import (
    Dataset,
    InputError,
    Interrupted,
    Network,
    Resources,
    Seeds,
    Tapped,
    distill,
    load,
)
from abflax.data import few_shot_subset, subset
from abflax.data.image_files import exactly_named
from abflax.methods import Phase, Ramp, terms
from abflax.methods.weights import Schedule
from abflax.training.record import write_record
from experiments.common import cli
from tests.stopping import StopAt

FACTS = Path(__file__).parent / "identity.json"
MIXED, REFUSED, NAMED, WRONG = "mixed", "refused", "another name", "refused as input"
Settings = dict[str, Any]


class _Shift:
    """An object without a name of its own: Python writes it with its address."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x):
        """Adds a number."""
        return x + self.by


def make_net(scale=0.1, factor=1.0, momentum=0.9, epsilon=1e-5, rate=0.0, slope=0.0, shift=0.0,
             frozen=False, evaluated=1.0, sown=0.0):  # noqa: PLR0913  # fmt: skip
    """A small network of a local class; what the arguments change has no name of its own."""

    class Net(nn.Module):
        """A convolution, a batch norm and a classifier."""

        width: int = 2
        kernel_init: Any = nn.initializers.normal(scale)
        activate: Any = lambda x: nn.leaky_relu(x, slope)  # noqa: E731
        moved: Any = _Shift(shift)

        @nn.compact
        def __call__(self, images, train: bool):
            """Computes logits."""
            x = (
                nn.Conv(self.width, (3, 3), strides=2, kernel_init=self.kernel_init)(images)
                * factor
            )
            x = jax.lax.stop_gradient(x) if frozen else x
            x = nn.BatchNorm(not train, momentum=momentum, epsilon=epsilon)(x)
            x = self.activate(self.moved(x)).mean(axis=(1, 2))
            x = x if train else evaluated * x
            self.sow("losses", "own", sown * x.mean())
            if rate:
                x = nn.Dropout(rate, deterministic=not train)(x)
            return nn.Dense(10, kernel_init=self.kernel_init)(x)

    return Net


def tapped(module, path="BatchNorm_0"):
    """The module with its tap."""
    return Tapped(module, {"layer1": path})


def make_teacher(net=None, change=lambda variables: variables, path="BatchNorm_0"):
    """A random teacher that is always called "teacher"."""
    module = (net or make_net())(3)
    variables = module.init(jax.random.key(5), np.zeros((1, 8, 8, 1)), train=False)
    return Network(tapped(module, path), change(jax.tree.map(np.array, dict(variables))), "teacher")


def make_augment(factor):
    """An augmentation of a local function."""

    def augment(key, images):
        return images + factor * jax.random.normal(key, images.shape)

    return augment


def make_metric(factor, array=None):
    """A metric of a local function, with an array that it closes over."""

    def metric(logits, labels):
        return factor * (logits.argmax(axis=-1) == labels) + (0 if array is None else array.sum())

    return metric


def make_method(factor=1.0, end=1.0, weight=1.0, late=10_000, ema=0.9):
    """Phases with a weight, a term, its module and an optimizer of local classes."""

    class Module(nn.Module):
        """Scales what a dense layer makes of the logits."""

        @nn.compact
        def __call__(self, student, targets, *, train):
            """Replaces the logits."""
            del train
            return dataclasses.replace(student, logits=factor * nn.Dense(3)(student.logits)), None

    @dataclasses.dataclass(frozen=True)
    class Norm(terms.Term):
        """The squared norm of what its module makes."""

        needs_teacher: ClassVar[bool] = False

        def module(self, pair):
            """Adds the module."""
            del pair
            return Module()

        def loss(self, student, targets, labels):
            """Computes one number per example."""
            del targets, labels
            return weight * (student.logits**2).sum(axis=-1)

    @dataclasses.dataclass(frozen=True)
    class Rising(Schedule):
        """Rises with the steps."""

        def __call__(self, step, steps_per_epoch, epochs=1):
            """Computes the weight."""
            del steps_per_epoch, epochs
            return end * jax.numpy.asarray(step, float) / 10

    def rate(step):
        return jax.numpy.where(step < late, 0.05, 0.01)

    optimizer: Any = optax.sgd(rate, momentum=0.9)
    second = [(1.0, terms.CrossEntropy()), (Rising(), Norm())]
    return [
        Phase("first", [(1.0, terms.ActivationBoundary())]),
        Phase("second", second, optimizer=optimizer, ema=ema),
    ]


def own() -> Settings:
    """The base experiment with functions and classes that were made outside abflax."""
    metrics = {"hits": make_metric(1.0)}
    return base() | {"method": make_method(), "augment": make_augment(1.0), "metrics": metrics}


def own_variants() -> Iterator[tuple[str, Settings]]:
    """(what differs, changed settings) of other experiments with code of one's own."""
    other = np.zeros((64, 64))
    other[31, 17] = 1
    yield "augmentation", {"augment": make_augment(2.0)}
    yield "augmentation, by little", {"augment": make_augment(1.0 + 1e-6)}
    yield "no augmentation", {"augment": None}
    yield "metric", {"metrics": {"hits": make_metric(2.0)}}
    yield "metric's array", {"metrics": {"hits": make_metric(1.0, other)}}
    yield "metric's name", {"metrics": {"other": make_metric(1.0)}}
    yield "another metric", {"metrics": {"hits": make_metric(1.0), "more": make_metric(1.0)}}
    yield "no metric", {"metrics": None}
    for what, changed in (
        ("term", {"weight": 2.0}), ("term's module", {"factor": 2.0}), ("schedule", {"end": 2.0}),
        ("optimizer after many steps", {"late": 10_001}), ("average", {"ema": 0.99}),
        ("no average", {"ema": None}),
    ):  # fmt: skip
        yield what, {"method": make_method(**changed)}
    first, second = make_method()
    (weight, cross_entropy), (_, norm) = second.terms
    ramped = ((weight, cross_entropy), (Ramp(0.0, 1.0), norm))
    yield "another schedule", {"method": [first, dataclasses.replace(second, terms=ramped)]}
    yield "phases swapped", {"method": [second, first]}


def _edited(array, index=0, by=1):
    array = array.copy()
    array.ravel()[index] += by
    return array


def _nudged(*path):
    def change(variables):
        leaf = variables
        for key in path:
            leaf = leaf[key]
        leaf.ravel()[0] += 1e-3
        return variables

    return change


def base() -> Settings:
    """The experiment that the others differ from."""
    data = load("digits", "train")
    return {
        "student": tapped(make_net()(2)),
        "teacher": make_teacher(),
        "data": data.take(np.arange(64), "sixty-four digits"),
        "test": data.take(np.arange(64, 96), "thirty-two digits"),
        "epochs": (1, 1),
        "batch_size": 16,
        "resources": Resources(devices=1, checkpoint_seconds=0.0),
    }


def _data_variants(role: str, data: Dataset) -> Iterator[tuple[str, Settings]]:
    def replaced(**fields: Any) -> Settings:
        return {role: dataclasses.replace(data, **fields)}

    preprocessing = data.preprocessing
    for what, fields in (
        ("one label", {"labels": _edited(data.labels % 9)}),
        ("one pixel", {"images": _edited(data.images, 100)}),
        ("reversed", {"images": data.images[::-1], "labels": data.labels[::-1]}),
    ):
        changed = exactly_named(dataclasses.replace(data, **fields), data.name)
        yield f"{what}, under the same name", {role: changed}
    yield "labels shifted", replaced(labels=(data.labels + 1) % 10)
    yield "one label", replaced(labels=_edited(data.labels % 9))
    yield "one pixel", replaced(images=_edited(data.images, 100))
    yield "last pixel", replaced(images=_edited(data.images, -1))
    yield "reversed", replaced(images=data.images[::-1], labels=data.labels[::-1])
    yield "images reversed", replaced(images=data.images[::-1])
    yield "one example less", replaced(images=data.images[:-1], labels=data.labels[:-1])
    yield "a share", {role: subset(data, 0.5, 0)}
    yield "few of each class", {role: few_shot_subset(data, 2, 0)}
    yield "taken under the same name", {role: data.take(np.arange(16), data.name)}
    yield "float images", replaced(images=data.images.astype(np.float32))
    yield "more classes", replaced(num_classes=11)
    for name, value in (("mean", (5.0,)), ("std", (7.0,)), ("pad", 0), ("flip", True)):
        changed = dataclasses.replace(preprocessing, **{name: value})
        yield f"preprocessing: {name}", replaced(preprocessing=changed)


def variants(start: Settings) -> Iterator[tuple[str, str, Settings]]:
    """(what it is of, what differs, changed settings) of each other experiment."""
    for role, name in (("data", "training data"), ("test", "test data")):
        for what, changed in _data_variants(role, start[role]):
            yield name, what, changed
    yield "test data", "training data as test data", {"test": start["data"]}
    yield "test data", "none", {"test": None}
    for what, arguments in (
        ("initializer", {"scale": 1.0}), ("unnamed function", {"slope": 0.1}),
        ("unnamed object", {"shift": 0.1}), ("factor in its code", {"factor": 2.0}),
        ("momentum in its code", {"momentum": 0.5}), ("epsilon in its code", {"epsilon": 1e-3}),
        ("dropout in its code", {"rate": 0.5}), ("gradient in its code", {"frozen": True}),
        ("evaluation in its code", {"evaluated": 2.0}), ("loss in its code", {"sown": 0.1}),
    ):  # fmt: skip
        yield "student", what, {"student": tapped(make_net(**arguments)(2))}
    yield "student", "width", {"student": tapped(make_net()(4))}
    yield "student", "tap", {"student": tapped(make_net()(2), "Conv_0")}
    drawn = make_net()(2).init(jax.random.key(9), np.zeros((1, 8, 8, 1)), train=False)
    yield "student", "first weights", {"student": Network(tapped(make_net()(2)), drawn)}
    for what, change in (
        ("a kernel", _nudged("params", "Conv_0", "kernel")),
        ("a bias", _nudged("params", "Dense_0", "bias")),
        ("running mean", _nudged("batch_stats", "BatchNorm_0", "mean")),
        ("running variance", _nudged("batch_stats", "BatchNorm_0", "var")),
    ):
        yield "teacher", what, {"teacher": make_teacher(change=change)}
    yield "teacher", "factor in its code", {"teacher": make_teacher(make_net(factor=2.0))}
    yield "teacher", "epsilon in its code", {"teacher": make_teacher(make_net(epsilon=1e-3))}
    yield "teacher", "unnamed function", {"teacher": make_teacher(make_net(slope=0.1))}
    yield "teacher", "tap", {"teacher": make_teacher(path="Conv_0")}
    yield "teacher", "none", {"teacher": None, "method": "cross-entropy"}
    for what, changed in (
        ("seed", {"seeds": 1}), ("seed of the weights", {"seeds": Seeds(weights=1)}),
        ("seed of the order", {"seeds": Seeds(order=1)}),
        ("seed of the augmentation", {"seeds": Seeds(augmentation=1)}),
        ("seed of the subset", {"seeds": Seeds(subset=1)}), ("epochs", {"epochs": (1, 2)}),
        ("batch size", {"batch_size": 8}), ("fraction", {"fraction": 0.5}),
        ("examples per class", {"per_class": 2}), ("margin", {"margin": 2.0}),
        ("layers' weights", {"layer_ratio": 0.5}), ("temperature", {"temperature": 4.0}),
        ("transfer weight", {"transfer_weight": 2.0}), ("protocol", {"protocol": "official"}),
        ("method", {"method": "kd"}), ("precision", {"precision": "float64"}),
        ("evaluations", {"evaluate_every": 2}), ("views", {"views": 2}),
    ):  # fmt: skip
        yield "configuration", what, changed


@contextlib.contextmanager
def _flag(name: str, value: Any) -> Iterator[None]:
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


SURROUNDINGS = (
    ("PRNG", "jax_default_prng_impl", "rbg"),
    ("partitioned keys", "jax_threefry_partitionable", None),
    ("seed offset", "jax_random_seed_offset", 7),
    ("precision of products", "jax_default_matmul_precision", "bfloat16"),
)


def experiments(start: Settings) -> Iterator[tuple[str, str, Settings, Any]]:
    """All variants, with the context in which each is asked for."""
    for of, what, changed in variants(start):
        yield of, what, start | changed, contextlib.nullcontext()
    for what, name, value in SURROUNDINGS:
        other = not getattr(jax.config, name) if value is None else value
        yield "surroundings", what, start, _flag(name, other)


def own_experiments() -> Iterator[tuple[str, str, Settings, Any]]:
    """Likewise, of the experiment with code of one's own."""
    for what, changed in own_variants():
        yield "code of one's own", what, own() | changed, contextlib.nullcontext()


class _Trains(Exception):
    """A run under another name would be trained."""


def _refuse_to_train(*_: Any, **__: Any) -> None:
    raise _Trains


def outcome(settings: Settings, workdir: Path) -> tuple[str, str]:
    """What becomes of an experiment that is asked for where another one's result is."""
    resumed = mock.patch("abflax.training.run.Run._restore_checkpoint", return_value=None)
    began = mock.patch("abflax.training.run.Run._begin_phase", _refuse_to_train)
    with resumed as resume, began:
        resume.side_effect = lambda *_: (_ for _ in ()).throw(AssertionError("resumed"))
        try:
            distill(**settings, workdir=workdir)
        except _Trains:
            return NAMED, ""
        except AssertionError as error:
            return MIXED, str(error)
        except InputError as error:
            asked = "was made with" in str(error)
            return (REFUSED if asked else WRONG), str(error)
    return MIXED, "served"


def finished(workdir: Path, settings: Settings) -> Path:
    """Trains an experiment. Returns its folder."""
    directory = distill(**settings, workdir=workdir).directory
    assert directory is not None
    return directory


def stopped(workdir: Path, settings: Settings) -> None:
    """Trains an experiment for three of its eight steps."""
    with contextlib.suppress(Interrupted):
        distill(**settings, workdir=workdir, reporter=StopAt(3))


def flip(path: Path, bit: int) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flips_served(directory: Path, name: str, count: int, seed: int = 0) -> int:
    """How many of some random bit flips in a finished run's file go unnoticed."""
    path, draw, served = directory / name, random.Random(seed), 0
    content, settings = path.read_bytes(), base()
    for _ in range(count):
        flip(path, draw.randrange(8 * len(content)))
        try:
            distill(**settings, workdir=directory.parent.parent)
            served += 1
        except InputError:
            pass
        path.write_bytes(content)
    return served


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      page: only rebuild the page.
    """

    page: bool = False


def measure(note: Callable[[str], None]) -> dict[str, Any]:
    """Tries everything, and counts."""
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = finished(Path(folder) / "finished", base())
        finished(Path(folder) / "finished", own())
        for settings in (base(), own()):
            stopped(Path(folder) / "stopped halfway", settings)
        for kind in ("finished", "stopped halfway"):
            workdir = Path(folder) / kind
            counts: dict[str, Counter[str]] = {}
            for of, what, settings, context in (*experiments(base()), *own_experiments()):
                with context:
                    found, why = outcome(settings, workdir)
                counts.setdefault(of, Counter())[found] += 1
                note(f"{kind}: {of}, {what}: {found} {why}")
            facts[kind] = {of: dict(each) for of, each in counts.items()}
        facts["flips"] = {
            name: {"flipped": 100, "served": flips_served(directory, name, 100)}
            for name in ("record.json", "student.safetensors")
        }
    return facts


def section() -> str:
    """The page's section, from the committed facts."""
    facts = json.loads(FACTS.read_text())
    lines = [
        "## Identity\n",
        "A finished run, one stopped halfway, and then experiments that differ in one thing, in "
        "the same workdir (`python -m tests.identity`; the same as tests: "
        "`tests/training/test_identity.py`). *Refused*: the command stops and names what differs. "
        "*Another name*: the configuration differs, so it is another run.\n",
        "| found there | differs in | tried | refused | another name | no valid input | mixed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in ("finished", "stopped halfway"):
        for of, counts in facts[kind].items():
            row = [counts.get(each, 0) for each in (REFUSED, NAMED, WRONG, MIXED)]
            lines.append(f"| {kind} | {of} | {sum(row)} | {' | '.join(map(str, row))} |")
    lines += ["", "| a bit flipped in | times | returned as good |", "| --- | ---: | ---: |"]
    for name, counts in facts["flips"].items():
        lines.append(f"| `{name}` | {counts['flipped']} | {counts['served']} |")
    return "\n".join(lines) + "\n"


def main(console: Console) -> None:
    """Runs the command."""
    from tests import crash

    if not cli.parse(Arguments, "tests.identity", __doc__).page:
        write_record(FACTS, measure(lambda line: console.print(line, soft_wrap=True)))
    crash.write_page()
    console.print(section(), markup=False, soft_wrap=True)


if __name__ == "__main__":
    cli.main(main)
