"""Look into trained networks: who fires, who agrees with the teacher, and where error falls.

Agreement by layer, channel and class; neurons that never or always fire; error by how well the
activation pattern matches the teacher's; distance to the activation boundaries; distinct
patterns. Of held-out images. Several networks are taken for seeds of one: tables and pictures
show their mean and standard deviation.

A network is a run's hash, an architecture whose weights the repository ships, or
ARCHITECTURE=FILE. Its teacher is the one that taught the run, if it is shipped or among the runs.

examples:
  python -m experiments.analyse 3fa1b2c4d5e6 --dataset digits
  python -m experiments.analyse 3fa1b2c4d5e6 8c0d1e2f3a4b   # two seeds
  python -m experiments.analyse wrn16-2 --examples 1000     # the shipped teacher, alone
  python -m experiments.analyse wrn16-2=mine.npz --teacher wrn16-2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from abflax import Dataset, Network, load
from abflax.data import DATASETS
from abflax.errors import InputError, unknown
from abflax.files import write_whole
from abflax.record import read_record, require_writable
from experiments import analysis_plots, cli
from experiments.analysis_report import arrays, look, summarise, tables
from experiments.layout import architecture
from experiments.teachers import find_teacher


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser("experiments.analyse", __doc__)
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="run, architecture or ARCHITECTURE=FILE")
    add("--dataset", help=f"{' or '.join(DATASETS)} (default: the run's, else cifar10)")
    add("--data-dir", help="of TensorFlow Datasets; default: TFDS_DATA_DIR")
    add("--teacher", help="architecture, or none (default: the run's)")
    add("--teacher-weights", help="file or run; default: what the repository ships")
    add("--examples", type=int, help="how many held-out images (default all)")
    add("--groups", type=int, default=5, help="of images, by agreement (default 5)")
    add("--distance-images", type=int, default=100, metavar="N",
        help="whose distances are measured (default 100; 0: none)")  # fmt: skip
    add("--distance-neurons", type=int, default=32, metavar="N",
        help="of each layer, drawn at random (default 32)")  # fmt: skip
    add("--workdir", type=Path, default=cli.WORKDIR, help="where all goes (default ./workdir)")
    add("--json", action="store_true", help="print the result as JSON, and no table")
    return parser.parse_args(arguments)


def main(console: Console) -> None:
    arguments = parse()
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
    directory = arguments.workdir / "analysis" / _title(arguments.networks)
    require_writable(directory)
    cli.cache_compilation(arguments.workdir)
    test = load(dataset, "test", arguments.data_dir)
    if arguments.examples is not None:
        test = _some(test, arguments.examples)
    found = look(networks, teacher, test, arguments.distance_images, arguments.distance_neurons)
    summary = {
        "networks": [network.name for network in networks],
        "teacher": teacher.name if teacher is not None else None,
        "dataset": dataset,
        **summarise(found, arguments.groups),
    }
    write_whole(directory / "analysis.json", (json.dumps(summary, indent=1) + "\n").encode())
    named: dict[str, Any] = dict(arrays(found))
    np.savez_compressed(directory / "analysis.npz", **named)
    pictures = analysis_plots.draw(found, summary, directory)
    if arguments.json:
        json.dump(summary, sys.stdout, indent=1)
        return
    for table in tables(summary):
        console.print(table, soft_wrap=True)
        console.print()
    written = ", ".join(path.name for path in pictures)
    console.print(f"{directory}: analysis.json, analysis.npz, {written}", soft_wrap=True)


def _run(arguments: argparse.Namespace, name: str) -> Path:
    return arguments.workdir / "runs" / name


def _network(
    arguments: argparse.Namespace, name: str, record: dict[str, Any] | None, dataset: str
) -> Network:
    """What one NETWORK argument stands for."""
    if record is not None:
        return find_teacher(record["config"]["student"], dataset, name, arguments.workdir)
    if (_run(arguments, name) / "config.json").exists():
        raise InputError(f"run {name} is not finished; the command that began it goes on with it")
    architecture, _, weights = name.partition("=")
    return find_teacher(architecture, dataset, weights or None, arguments.workdir)


def _teacher(
    arguments: argparse.Namespace, records: list[dict[str, Any] | None], dataset: str
) -> Network | None:
    """The teacher that was asked for, else the one that taught the runs, else none."""
    if arguments.teacher == "none":
        return None
    if arguments.teacher is not None:
        return find_teacher(
            arguments.teacher, dataset, arguments.teacher_weights, arguments.workdir
        )
    taught = (record["config"]["teacher"] for record in records if record)
    names = {str(teacher) for teacher in taught if teacher is not None}
    if not names:
        return None
    if len(names) > 1:
        raise InputError(
            f"the runs have different teachers, {', '.join(sorted(names))}: choose one"
        )
    (name,) = names
    model = architecture(name)
    for weights in (arguments.teacher_weights, None, *_trained(arguments.workdir, model)):
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


def _trained(workdir: Path, architecture: str) -> list[str]:
    """The finished runs that trained such a network."""
    found = {path.parent.name: read_record(path) for path in workdir.glob("runs/*/record.json")}
    return [
        name
        for name, record in sorted(found.items())
        if record and record["config"]["student"] == architecture
    ]


def _some(data: Dataset, examples: int) -> Dataset:
    """The first of the held-out images."""
    if not 1 <= examples <= len(data):
        raise InputError(f"--examples must be between 1 and {len(data)}, not {examples}")
    return data.take(np.arange(examples))


def _title(networks: Sequence[str]) -> str:
    """A folder's name."""
    first = networks[0].replace("=", "-").replace("/", "-")
    return first if len(networks) == 1 else f"{first}-and-{len(networks) - 1}-more"


if __name__ == "__main__":
    cli.main(main)
