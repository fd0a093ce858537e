"""Transfer learning: a published teacher, a small student, your own images.

A student learns the classes of a folder of photographs, or of one of the paper's two data sets,
from a teacher of other classes: first the teacher's hidden activations, then the labels, the
teacher's logits over its own classes throughout (DTL).

examples:
  python -m experiments.transfer --images photos --teacher resnet50.safetensors
      photos/train/CLASS/*.jpg and photos/test/CLASS/*.jpg; a mobilenet-v1 by activation boundaries
  python -m experiments.transfer --images photos --holdout 0.2 --teacher resnet50.pth
      photos/CLASS/*.jpg; a fifth of each class is held out for testing
  python -m experiments.transfer --images photos --teacher resnet50.pth --per-class 5,10,20,40,80
      the same from a few images of each class
  python -m experiments.transfer --dataset caltech_birds2011 --teacher resnet50.pth --method dtl
  python -m experiments.transfer --images photos --method cross-entropy --student-weights v1.pth
      no teacher: a student that begins with published weights, and a classifier of its own

The same command again goes on where it stopped; a finished run is not run twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from abflax import InputError, Network, Resources, Result, distill
from abflax.config import PRECISIONS, RunConfig
from abflax.data import PHOTOGRAPHS, Photographs, load_photographs, read_folder
from abflax.data.folder import MOST_BROKEN
from abflax.methods import PROTOCOLS
from abflax.models import MODELS
from abflax.weights import load_network
from experiments import cli
from experiments.layout import needs_teacher
from experiments.statistics import mean_and_std
from experiments.teachers import begun, setting_of


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser("experiments.transfer", __doc__, trains=True)
    add = parser.add_argument
    add("--images", type=Path, metavar="FOLDER", help="train/CLASS/FILE and test/CLASS/FILE")
    add("--holdout", type=float, metavar="SHARE",
        help="of each class, for testing, where FOLDER has no test folder")  # fmt: skip
    add("--max-broken", type=float, default=MOST_BROKEN, metavar="SHARE",
        help=f"of the files that may be no images (default {MOST_BROKEN:g})")  # fmt: skip
    add("--dataset", help=f"instead of --images: {' or '.join(PHOTOGRAPHS)}")
    add("--data-dir", help="of TensorFlow Datasets; default: TFDS_DATA_DIR")
    add("--teacher", type=Path, metavar="FILE", help="its weights, .safetensors, .pth or .npz")
    add("--teacher-model", default="resnet50", help="its architecture (default resnet50)")
    add("--student", default="mobilenet-v1", help="architecture (default mobilenet-v1)")
    add("--student-weights", type=Path, metavar="FILE", help="that it begins with (default random)")
    add("--method", type=cli.names_type, default=("activation-boundary",), metavar="NAMES",
        help="one or several (default activation-boundary)")  # fmt: skip
    add("--protocol", default="paper", help=f"{' or '.join(PROTOCOLS)} (default paper)")
    add("--epochs", type=cli.epochs_type, default=(60, 40), metavar="I+C",
        help="of initialise + classify (default 60+40)")  # fmt: skip
    add("--per-class", type=counts_type, default=(None,), metavar="K,K,…",
        help="training images of each class; all, where it has fewer (default all)")  # fmt: skip
    add("--size", type=int, default=224, metavar="PIXELS", help="of what is seen (default 224)")
    add("--batch-size", type=int, default=32)
    add("--transfer-weight", type=float, help="factor on the transfer loss (default 1)")
    add("--seeds", type=cli.seeds_type, default=(0,), metavar="N",
        help="how many, or a list such as 0,3 (default 1)")  # fmt: skip
    add("--evaluate-every", type=int, default=5, metavar="EPOCHS")
    add("--precision", default="float32", help=" or ".join(PRECISIONS))
    add("--workdir", type=Path, default=cli.WORKDIR, help="where all goes (default ./workdir)")
    add("--workers", type=int, help="processes that decode (default: one a core, 16 at most)")
    add("--devices", type=int, help="how many (default all)")
    add("--steps-per-dispatch", type=int, help="default: 1 on CPUs, 8 elsewhere")
    add("--checkpoint-seconds", type=float, default=60.0)
    add("--force", action="store_true", help="run again what is finished")
    add("--json", action="store_true", help="print the results as JSON, progress to stderr")
    return parser.parse_args(arguments)


def counts_type(text: str) -> tuple[int, ...]:
    """ "5,10" -> (5, 10)."""
    parts = cli.names_type(text)
    if not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers of images")
    return tuple(map(int, parts))


def main(console: Console) -> None:
    arguments = parse()
    console = Console(stderr=True) if arguments.json else console
    # Everything that can be wrong is looked at before the images are.
    runs = plan(arguments)
    resources = Resources(
        arguments.devices,
        arguments.steps_per_dispatch,
        arguments.checkpoint_seconds,
        workers=arguments.workers,
    )
    teacher = find_teacher(arguments, runs)
    given = None
    if arguments.student_weights is not None:
        given = _of(arguments.student, arguments.student_weights, begun)
    cli.cache_compilation(arguments.workdir)
    train, test, notes = read(arguments)
    for note in (*notes, *too_few(train, arguments.per_class)):
        console.print(note, soft_wrap=True, markup=False)
    model = MODELS[arguments.student](num_classes=train.num_classes)
    student = model if given is None else dataclasses.replace(given, model=model)
    live = cli.progress(arguments, console)
    call = functools.partial(
        distill, student, data=train, test=test, workdir=arguments.workdir,
        force=arguments.force, resources=resources, reporter=live,
    )  # fmt: skip
    with live.shown():
        results = cli.results_of(
            functools.partial(
                call,
                teacher=teacher if needs_teacher(run) else None,
                **run.arguments | {"seeds": seed},
            )
            for run in runs
            for seed in arguments.seeds
        )
    if arguments.json:
        json.dump([result.record for result in results], sys.stdout, indent=1)
        return
    for result in results:
        console.print(f"{result.directory}", soft_wrap=True)
    console.print(_table(results, arguments, train), soft_wrap=True)


def plan(arguments: argparse.Namespace) -> list[RunConfig]:
    """The runs, without their data, teacher and seeds."""
    if (arguments.images is None) == (arguments.dataset is None):
        raise InputError("give either a folder of photographs, --images, or a --dataset")
    if arguments.dataset is not None and arguments.holdout is not None:
        raise InputError(f"{arguments.dataset} has a test split, so there is nothing to hold out")
    MODELS[arguments.student], MODELS[arguments.teacher_model]
    weight = arguments.transfer_weight
    return [
        RunConfig(
            dataset=str(arguments.images or arguments.dataset),
            student=arguments.student,
            method=method,
            protocol=arguments.protocol,
            setting=setting_of(arguments.protocol, arguments.student),
            options=() if weight is None else (("transfer_weight", weight),),
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            evaluate_every=arguments.evaluate_every,
            precision=arguments.precision,
            per_class=count,
        )
        for count in arguments.per_class
        for method in arguments.method
    ]


def find_teacher(arguments: argparse.Namespace, runs: Sequence[RunConfig]) -> Network | None:
    """The teacher; None: no run needs one."""
    needing = [run.method for run in runs if needs_teacher(run)]
    if not needing:
        return None
    if arguments.teacher is None:
        raise InputError(f"method {needing[0]} needs a teacher: give its weights with --teacher")
    return _of(arguments.teacher_model, arguments.teacher, load_network)


def _of(name: str, path: Path, load: Callable[[str, Path], Network]) -> Network:
    try:
        return load(name, path)
    except InputError as error:
        raise InputError(f"{path} gives no {name}: {error}") from error


def read(arguments: argparse.Namespace) -> tuple[Photographs, Photographs, tuple[str, ...]]:
    """Training and test images, and what is to be said of them."""
    if arguments.images is not None:
        found = read_folder(
            arguments.images,
            side=arguments.size,
            held_out=arguments.holdout,
            most_broken=arguments.max_broken,
            workers=arguments.workers,
        )
        return found.train, found.test, found.notes
    train, test = (
        load_photographs(arguments.dataset, split, arguments.data_dir, arguments.size)
        for split in ("train", "test")
    )
    return train, test, ()


def too_few(train: Photographs, counts: Sequence[int | None]) -> list[str]:
    """What is to be said where classes have fewer images than are asked for."""
    sizes = np.bincount(train.labels, minlength=train.num_classes)
    return [
        f"{(sizes < count).sum()} of {train.num_classes} classes have fewer than {count} training "
        f"images, {sizes.min()} at least: all of theirs are taken"
        for count in counts
        if count is not None and (sizes < count).any()
    ]


def _table(results: Sequence[Result], arguments: argparse.Namespace, train: Photographs) -> Table:
    """Method by method, the accuracy with each number of images."""
    begins = "random" if arguments.student_weights is None else arguments.student_weights.name
    title = (
        f"{arguments.student} ({begins}), {train.num_classes} classes, protocol "
        f"{arguments.protocol}, {'+'.join(map(str, arguments.epochs))} epochs: test accuracy, %, "
        f"mean ± std of {len(arguments.seeds)}"
    )
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    table.add_column("images of a class")
    for count in arguments.per_class:
        table.add_column("all" if count is None else str(count), justify="right", no_wrap=True)
    correct: dict[tuple[Any, ...], list[float]] = {}
    for result in results:
        config = result.record["config"]
        key = (config["method"], config["per_class"])
        correct.setdefault(key, []).append(1 - result.record["result"]["test_error"])
    for method in arguments.method:
        table.add_row(
            method, *(mean_and_std(correct[method, count]) for count in arguments.per_class)
        )
    return table


if __name__ == "__main__":
    cli.main(main)
