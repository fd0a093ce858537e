"""Examine trained networks: which neurons fire, where they agree with the teacher, and errors.

Measures, on held-out images: agreement by layer, channel and class; neurons that never or always
fire; error by how well the activation pattern matches the teacher's; distance to the activation
boundaries; the number of distinct patterns. Several networks must be seeds of one: tables and
pictures show their mean and standard deviation.

A network is a run's hash, an architecture whose weights the repository ships, or
ARCHITECTURE=FILE. Its teacher is that of the run, if it is shipped or one of the workdir's runs.

Examples:
  python -m experiments.analyse 3fa1b2c4d5e6 --dataset digits
  python -m experiments.analyse 3fa1b2c4d5e6 8c0d1e2f3a4b   # two seeds
  python -m experiments.analyse wrn16-2 --examples 1000     # the shipped teacher, alone
  python -m experiments.analyse wrn16-2=mine.npz --teacher wrn16-2
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from abflax import Network, Result, load
from abflax.data import DATASETS
from abflax.errors import InputError, unknown
from abflax.storage.files import as_json, write_whole
from abflax.training.record import finished_records, read_record, require_writable
from experiments.analysis import figures
from experiments.analysis.report import arrays, examine_all, summarise, tables
from experiments.common import cli
from experiments.common.networks import architecture, find_teacher


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      networks: runs, architectures or ARCHITECTURE=FILE.
      dataset: name of the held-out images; left out: the run's, or cifar10.
      data_dir: folder of TensorFlow Datasets; left out: TFDS_DATA_DIR.
      teacher: architecture, or none; left out: the run's.
      teacher_weights: file or run; left out: the weights that the repository ships.
      examples: how many held-out images; left out: all.
      groups: how many groups of images, by agreement.
      distance_images: how many images' distances to the boundaries are measured; 0: none.
      distance_neurons: how many neurons of each layer these are measured for, drawn at random.
      workdir: where runs are, and pictures go.
      json: print the result as JSON, and no table.
    """

    networks: Annotated[tuple[str, ...], tyro.conf.Positional]
    dataset: str | None = None
    data_dir: str | None = None
    teacher: str | None = None
    teacher_weights: str | None = None
    examples: int | None = None
    groups: int = 5
    distance_images: int = 100
    distance_neurons: int = 32
    workdir: Path = cli.WORKDIR
    json: bool = False


def main(console: Console) -> None:
    """Runs the command."""
    arguments = cli.parse(Arguments, "experiments.analyse", __doc__)
    if not arguments.networks:
        raise InputError("name at least one network: a run, an architecture, ARCHITECTURE=FILE")
    for name in ("groups", "distance_neurons"):
        if getattr(arguments, name) < 1:
            raise InputError(f"{name} must be at least 1, not {getattr(arguments, name)}")
    records = [read_record(_run(arguments, name) / "record.json") for name in arguments.networks]
    dataset = arguments.dataset or next((r["config"]["dataset"] for r in records if r), "cifar10")
    if dataset not in DATASETS:
        raise unknown("dataset", dataset, DATASETS)
    networks = [
        _network(arguments, name, record, dataset)
        for name, record in zip(arguments.networks, records, strict=True)
    ]
    teacher = _teacher(arguments, records, dataset)
    first, *others = arguments.networks
    title = first.replace("=", "-").replace("/", "-") + f"-and-{len(others)}-more" * bool(others)
    directory = arguments.workdir / "analysis" / title
    require_writable(directory)
    cli.cache_compilation(arguments.workdir)
    test = load(dataset, "test", arguments.data_dir)
    if (count := arguments.examples) is not None:
        if not 1 <= count <= len(test):
            raise InputError(f"--examples must be between 1 and {len(test)}, not {count}")
        test = test.take(np.arange(count))
    findings = examine_all(
        networks, teacher, test, arguments.distance_images, arguments.distance_neurons,
        [_connectors(_run(arguments, name), record, teacher) for name, record in
         zip(arguments.networks, records, strict=True)],
    )  # fmt: skip
    summary = {
        "networks": [network.name for network in networks],
        "teacher": teacher.name if teacher is not None else None,
        "dataset": dataset,
        **summarise(findings, arguments.groups),
    }
    write_whole(directory / "analysis.json", as_json(summary).encode())
    named: dict[str, Any] = dict(arrays(findings))
    np.savez_compressed(directory / "analysis.npz", **named)
    pictures = figures.draw(findings, summary, directory)
    if arguments.json:
        sys.stdout.write(as_json(summary))
        return
    for table in tables(summary):
        cli.print_table(console, table)
        console.print()
    written = ", ".join(path.name for path in pictures)
    console.print(f"{directory}: analysis.json, analysis.npz, {written}", soft_wrap=True)


def _run(arguments: Arguments, name: str) -> Path:
    return arguments.workdir / "runs" / name


def _connectors(
    run: Path, record: dict[str, Any] | None, teacher: Network | None
) -> dict[str, Any] | None:
    """The connectors that a run has kept to that teacher's widths, if any."""
    if record is None or teacher is None or record["config"]["teacher"] != teacher.name:
        return None
    return Result(record, None, run).connectors


def _network(
    arguments: Arguments, name: str, record: dict[str, Any] | None, dataset: str
) -> Network:
    if record is not None:
        return find_teacher(record["config"]["student"], dataset, name, arguments.workdir)
    if (_run(arguments, name) / "config.json").exists():
        raise InputError(f"run {name} is not finished; the same command resumes it")
    architecture, _, weights = name.partition("=")
    return find_teacher(architecture, dataset, weights or None, arguments.workdir)


def _teacher(
    arguments: Arguments, records: list[dict[str, Any] | None], dataset: str
) -> Network | None:
    """Loads the given teacher, or else that of the runs, or else none."""
    if arguments.teacher == "none":
        return None
    if arguments.teacher is not None:
        return find_teacher(
            arguments.teacher, dataset, arguments.teacher_weights, arguments.workdir
        )
    teachers = {record["config"]["teacher"] for record in records if record}
    names = {str(teacher) for teacher in teachers if teacher is not None}
    if not names:
        return None
    if len(names) > 1:
        raise InputError(
            f"the runs have different teachers, {', '.join(sorted(names))}: choose one"
        )
    (name,) = names
    model = architecture(name)
    for weights in (arguments.teacher_weights, None, *_runs_of(arguments.workdir, model)):
        try:
            network = find_teacher(model, dataset, weights, arguments.workdir)
        except InputError:
            continue
        if network.name == name:
            return network
    raise InputError(
        f"the teacher {name} is neither shipped nor among the runs of {arguments.workdir}: give "
        "--teacher and --teacher-weights, or --teacher none"
    )


def _runs_of(workdir: Path, architecture: str) -> list[str]:
    records = finished_records(workdir)
    return [
        name
        for name, record in sorted(records.items())
        if record["config"]["student"] == architecture
    ]


if __name__ == "__main__":
    cli.main(main)
