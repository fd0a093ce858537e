"""Search a method's transfer weight on a logarithmic grid, by validation error.

The test set is never looked at: a class-balanced tenth of the training data is held out, and the
student learns from a fifth of the rest. The grid is in units of the factor that the protocol has
today, which the record of every point states. The result is a table, and
`search/METHOD-PROTOCOL-DATASET-TEACHER-STUDENT.json` in the workdir with every point's record.

examples:
  python -m experiments.search --method attention --protocol official
  python -m experiments.search --method nst --grid 0.01,0.1,1,10,100 --seeds 2
  python -m experiments.search --method fitnet --dataset mit_indoor_scenes --student mobilenet-v1
      --teacher resnet50 --teacher-weights resnet50.pth --epochs 60+40 --fraction 1 --batch-size 32
      for transfer learning, on photographs
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from abflax import BusyError, InputError, Network, NonFiniteError, distill
from abflax.data import PHOTOGRAPHS, Dataset, Photographs, holdout
from abflax.lock import Lock
from abflax.methods import METHODS
from abflax.models import MODELS
from abflax.progress import Reporter
from abflax.record import require_writable, write_record
from experiments import cli
from experiments.statistics import mean_and_std
from experiments.teachers import find_teacher, read, setting_of

Record = dict[str, Any]

HELD_OUT, SPLIT_SEED = 0.1, 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser("experiments.search", __doc__, trains=True)
    add = parser.add_argument
    add("--method", required=True, help="with a transfer loss")
    add("--protocol", default="paper")
    add("--dataset", default="cifar10")
    add("--data-dir", help="of TensorFlow Datasets; default: TFDS_DATA_DIR")
    add("--teacher", default="wrn16-2")
    add("--teacher-weights", help="file or run; default: what the repository ships")
    add("--student", default="wrn16-1")
    add("--epochs", type=cli.epochs_type, default=(5, 5), metavar="I+C", help="default 5+5")
    add("--fraction", type=float, default=0.2, help="share of the training data (default 0.2)")
    add("--batch-size", type=int, default=128)
    add("--grid", type=grid_type, default=(0.01, 0.1, 1.0, 10.0, 100.0), metavar="W,W,…",
        help="transfer weights (default 0.01,0.1,1,10,100)")  # fmt: skip
    add("--seeds", type=cli.seeds_type, default=(0,), metavar="N")
    add("--abreast", type=int, default=1, metavar="N",
        help="train up to N points of the grid in one program (default 1)")  # fmt: skip
    add("--workdir", type=Path, default=cli.WORKDIR, help="default ./workdir")
    return parser.parse_args(arguments)


def grid_type(text: str) -> tuple[float, ...]:
    """ "0.1,1" -> (0.1, 1.0)."""
    try:
        weights = tuple(sorted(float(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers") from None
    if not weights or not all(weight > 0 for weight in weights):
        raise argparse.ArgumentTypeError("transfer weights must be above 0")
    return weights


def batched(weights: Sequence[float], most: int) -> Iterator[tuple[float, ...]]:
    """The weights in groups of `most`, in order."""
    left = iter(weights)
    while group := tuple(itertools.islice(left, most)):
        yield group


def main(console: Console) -> None:
    arguments = parse()
    photographs = arguments.dataset in PHOTOGRAPHS
    setting = setting_of(arguments.protocol, arguments.student) if photographs else "cifar"
    _require_transfer(arguments.method, arguments.protocol, setting)
    if arguments.abreast < 1:
        raise InputError(f"--abreast must be at least 1, not {arguments.abreast}")
    MODELS[arguments.student]
    teacher = find_teacher(
        arguments.teacher, arguments.dataset, arguments.teacher_weights, arguments.workdir
    )
    data = read(arguments.dataset, "train", arguments.data_dir)
    fitted, validation = holdout(data, HELD_OUT, SPLIT_SEED)
    cli.cache_compilation(arguments.workdir)
    live = cli.progress(arguments, console)
    points: list[dict[str, Any]] = []
    busy: list[BusyError] = []
    of = (arguments.method, arguments.protocol, arguments.dataset, arguments.teacher,
          arguments.student)  # fmt: skip
    path = arguments.workdir / "search" / f"{'-'.join(of)}.json"
    require_writable(path.parent)
    with Lock(path.with_suffix(".lock"), f"the search {path.stem}"), live.shown():
        for weights in batched(arguments.grid, arguments.abreast):
            records: dict[float, list[Record]] = {weight: [] for weight in weights}
            failures: dict[float, str] = {}
            for seed in arguments.seeds:
                found = attempt(
                    weights, seed, arguments, setting, teacher, fitted, validation, live
                )
                for weight, outcome in found.items():
                    if isinstance(outcome, NonFiniteError):  # a point that diverges loses
                        failures[weight] = str(outcome)
                    elif isinstance(outcome, BusyError):  # the other points first
                        busy.append(outcome)
                    else:
                        records[weight].append(outcome)
            points += [
                {
                    "transfer_weight": weight,
                    "records": records[weight],
                    "failure": failures.get(weight),
                }
                for weight in weights
            ]
        cli.require_all([record for point in points for record in point["records"]], busy)
        write_record(path, points)
    console.print(_table(points, arguments), soft_wrap=True)
    console.print(f"points: {path}", soft_wrap=True)


def attempt(
    weights: tuple[float, ...],
    seed: int,
    arguments: argparse.Namespace,
    setting: str,
    teacher: Network,
    fitted: Dataset | Photographs,
    validation: Dataset | Photographs,
    reporter: Reporter,
) -> dict[float, Record | NonFiniteError | BusyError]:
    """Trains a student for each weight, all in one program; where one fails, those that are not
    finished are tried alone, which tells whose error it is."""
    try:
        result = distill(
            MODELS[arguments.student](num_classes=fitted.num_classes),
            teacher,
            fitted,
            test=validation,
            method=arguments.method,
            protocol=arguments.protocol,
            setting=setting,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            fraction=arguments.fraction,
            evaluate_every=sum(arguments.epochs),  # phases' ends are enough here
            seeds=seed,
            abreast=tuple({"transfer_weight": weight} for weight in weights[1:]),
            workdir=arguments.workdir,
            reporter=reporter,
            transfer_weight=weights[0],
        )
        return {
            weight: each.record
            for weight, each in zip(weights, (result, *result.abreast), strict=True)
        }
    except (BusyError, NonFiniteError) as error:
        if len(weights) == 1:
            return {weights[0]: error}
    alone = (
        attempt((weight,), seed, arguments, setting, teacher, fitted, validation, reporter)
        for weight in weights
    )
    return {weight: outcome for each in alone for weight, outcome in each.items()}


def best(points: list[dict[str, Any]]) -> float:
    """The transfer weight of the smallest mean validation error; points that failed lose."""
    errors = {
        point["transfer_weight"]: statistics.mean(_errors(point))
        for point in points
        if point["records"] and point["failure"] is None
    }
    if not errors:
        raise InputError("every point of the grid diverged: search smaller transfer weights")
    return min(errors, key=lambda weight: errors[weight])


def _errors(point: dict[str, Any]) -> list[float]:
    return [record["result"]["test_error"] for record in point["records"]]


def _require_transfer(method: str, protocol: str, setting: str) -> None:
    phases = METHODS[method](protocol=protocol, setting=setting)
    if not any(term.transfers for phase in phases for _, term in phase.terms):
        raise InputError(f"method {method} has no transfer loss, so no weight to search")


def _table(points: list[dict[str, Any]], arguments: argparse.Namespace) -> Table:
    title = (
        f"{arguments.method}, protocol {arguments.protocol}: validation error, "
        f"{100 * arguments.fraction:g} % of {arguments.dataset}, "
        f"{'+'.join(map(str, arguments.epochs))} epochs"
    )
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    table.add_column("transfer weight", justify="right")
    table.add_column("error %", justify="right", no_wrap=True)
    winner = best(points)
    for point in points:
        shown = "diverged" if point["failure"] else mean_and_std(_errors(point))
        mark = "  <- best" if point["transfer_weight"] == winner else ""
        table.add_row(f"{point['transfer_weight']:g}", shown + mark)
    return table


if __name__ == "__main__":
    cli.main(main)
