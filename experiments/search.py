"""Search a method's transfer weight on a logarithmic grid, by validation error.

The test set is not used: a class-balanced tenth of the training data is held out, and the student
learns from a fifth of the rest. A transfer weight multiplies the factor that the protocol has now,
which the record of every point states. The result is a table and, in the workdir, a file
search/METHOD-PROTOCOL-DATASET-TEACHER-STUDENT-DIGEST.json with every point's record; the digest is
that of all settings, of the teacher's weights, the grid and the seeds.

Examples:
  python -m experiments.search --method attention --protocol official
  python -m experiments.search --method nst --grid 0.01,0.1,1,10,100 --seeds 2
  python -m experiments.search --method fitnet --dataset mit_indoor_scenes --student mobilenet-v1
      --teacher resnet50 --teacher-weights resnet50.pth --epochs 60+40 --fraction 1 --batch-size 32
      for transfer learning, on photographs
"""

import dataclasses
import functools
import hashlib
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from abflax import BusyError, InputError, RunConfig, distill_group
from abflax.data import IMAGE_DATASETS, holdout
from abflax.models import MODELS
from abflax.storage.lock import Lock
from abflax.training.record import require_writable, write_record
from experiments.common import cli
from experiments.common.networks import find_teacher, read, setting_of
from experiments.common.stats import mean_and_std

Point = dict[str, Any]

HELD_OUT, SPLIT_SEED = 0.1, 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      method: one with a transfer loss.
      config: what changes the runs' numbers.
      teacher_weights: file or run; left out: what the repository ships.
      data_dir: folder of TensorFlow Datasets; left out: TFDS_DATA_DIR.
      grid: transfer weights.
      seeds: how many, or a list such as 0,3.
      group: train up to this many points of the grid in one program: different weights of one
        seed, which see the same batches as they would alone.
    """

    method: str
    config: RunConfig = RunConfig(
        dataset="cifar10", student="wrn16-1", teacher="wrn16-2", epochs=(5, 5), fraction=0.2
    )
    teacher_weights: str | None = None
    data_dir: str | None = None
    grid: cli.Numbers = (0.01, 0.1, 1.0, 10.0, 100.0)
    seeds: cli.SeedList = (0,)
    group: int = 1


def main(console: Console) -> None:
    """Trains every point of the grid, and prints their errors."""
    hidden = ("method", "options", "evaluate_every")
    arguments = cli.parse(Arguments, "experiments.search", __doc__, hidden=hidden)
    config = configure(arguments)
    if min(arguments.grid) <= 0:
        raise InputError("transfer weights must be above 0")
    if arguments.group < 1:
        raise InputError(f"--group must be at least 1, not {arguments.group}")
    make_student, name = MODELS[config.student], str(config.teacher)
    teacher = find_teacher(name, config.dataset, arguments.teacher_weights, arguments.workdir)
    data = read(config.dataset, "train", arguments.data_dir)
    fitted, validation = holdout(data, HELD_OUT, SPLIT_SEED)
    cli.cache_compilation(arguments.workdir)
    reporter = cli.progress(arguments, console)
    student = make_student(num_classes=fitted.num_classes)

    def train(points: Sequence[Point], seed: int) -> None:
        results = distill_group(
            [{"transfer_weight": point["transfer_weight"]} for point in points], student=student,
            teacher=teacher, data=fitted, test=validation, config=config, seeds=seed,
            workdir=arguments.workdir, reporter=reporter,
        )  # fmt: skip
        for point, result in zip(points, results, strict=True):
            point["records"].append(result.record)

    whole = config.replace(dataset=fitted.name, teacher=teacher.name).hash
    settings = repr((whole, sorted(arguments.grid), sorted(arguments.seeds)))
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    names = (config.method, config.protocol, config.dataset, name, config.student, digest)
    path = arguments.workdir / "search" / f"{'-'.join(names)}.json"
    require_writable(path.parent)
    points: list[Point] = [
        {"transfer_weight": weight, "records": [], "failure": None}
        for weight in sorted(arguments.grid)
    ]
    busy: list[BusyError] = []
    with Lock(path.with_suffix(".lock"), f"the search {path.stem}"), reporter.shown():
        for start in range(0, len(points), arguments.group):
            group = points[start : start + arguments.group]
            for seed in arguments.seeds:
                for point, error in cli.attempt(functools.partial(train, seed=seed), group):
                    if isinstance(error, BusyError):
                        busy.append(error)
                    else:
                        point["failure"] = str(error)
        cli.require_all([record for point in points for record in point["records"]], busy)
        write_record(path, points)
    cli.print_table(console, _table(points, config))
    console.print(f"points: {path}", soft_wrap=True)


def configure(arguments: Arguments) -> RunConfig:
    """The configuration that all points share."""
    config = arguments.config
    images = config.dataset in IMAGE_DATASETS
    config = config.replace(
        method=arguments.method,
        setting=setting_of(config.protocol, config.student) if images else "cifar",
        evaluate_every=sum(config.epochs),  # the ends of phases are enough here
    )
    if not any(term.transfers for phase in config.phases for _, term in phase.terms):
        raise InputError(f"method {config.method} has no transfer loss, so no weight to search")
    return config


def best(points: list[Point]) -> float:
    """The transfer weight of the smallest mean validation error; points that failed lose."""
    finished = [point for point in points if point["records"] and point["failure"] is None]
    if not finished:
        raise InputError("every point of the grid diverged: search smaller transfer weights")
    winner = min(finished, key=lambda point: statistics.mean(_errors(point)))
    return winner["transfer_weight"]


def _errors(point: Point) -> list[float]:
    return [record["result"]["test_error"] for record in point["records"]]


def _table(points: list[Point], config: RunConfig) -> Table:
    title = (
        f"{config.method}, protocol {config.protocol}: validation error, "
        f"{100 * config.fraction:g} % of {config.dataset}, "
        f"{'+'.join(map(str, config.epochs))} epochs"
    )
    table = cli.make_table(("transfer weight", "error %"), title, left=0)
    winner = best(points)
    for point in points:
        shown = "diverged" if point["failure"] else mean_and_std(_errors(point))
        mark = "  <- best" if point["transfer_weight"] == winner else ""
        table.add_row(f"{point['transfer_weight']:g}", shown + mark)
    return table


if __name__ == "__main__":
    cli.main(main)
