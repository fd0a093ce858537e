"""Train teachers, distil students, evaluate networks, list runs.

examples:
  python -m experiments.run --epochs 1+1 --protocol official --seeds 3
      distil the shipped wrn16-2 into a wrn16-1 on CIFAR-10, three seeds
  python -m experiments.run --method kd --fraction 0.1 --epochs 20+100
  python -m experiments.run --method kd --epochs 1+1 --seeds 4 --same-batches
      four students in one program: the teacher is asked once for all
  python -m experiments.run --student wrn22-4 --method cross-entropy --epochs 0+200
      train a teacher; --teacher wrn22-4 --teacher-weights RUN uses it afterwards
  python -m experiments.run evaluate --teacher wrn16-2
  python -m experiments.run list
  python -m experiments.run --coordinator node0:9876 --processes 2 --process 0
      one run by two processes, which train together: the same command with --process 1 beside it;
      on a cluster that JAX knows (Slurm, Open MPI, Kubernetes, Cloud TPU): --distributed

The same command again goes on where it stopped; a finished run is not run twice.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from abflax import Resources, Seeds, distill, evaluate, load
from abflax.config import PRECISIONS, RunConfig
from abflax.data import DATASETS
from abflax.errors import InputError, unknown
from abflax.files import read_json
from abflax.methods import METHODS, PROTOCOLS
from abflax.models import MODELS
from abflax.processes import is_first
from abflax.record import read_record
from experiments import cli
from experiments.layout import architecture
from experiments.statistics import mean_and_std, percent
from experiments.teachers import find_teacher


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    described = {name: METHODS.describe(name) for name in METHODS}
    choices = {
        "methods (they add up with +)": {
            name: f"{each.summary} [{each.reference}]" for name, each in described.items()
        },
        "protocols": {name: settings["cifar"].summary for name, settings in PROTOCOLS.items()},
    }
    parser = cli.Parser("experiments.run", __doc__, choices, trains=True)
    add = parser.add_argument
    add(
        "command",
        nargs="?",
        default="train",
        help="train (default), evaluate (the teacher) or list",
    )
    add("--dataset", default="cifar10", help=f"{' or '.join(DATASETS)} (default cifar10)")
    add("--data-dir", help="of TensorFlow Datasets; default: TFDS_DATA_DIR")
    add("--teacher", help="architecture, such as wrn22-4 (default wrn16-2), or none")
    add("--teacher-weights", help="file or run; default: what the repository ships")
    add("--student", help="architecture (default wrn16-1)")
    add("--method", default="activation-boundary", help="see below (default activation-boundary)")
    add("--protocol", default="paper", help=f"{' or '.join(PROTOCOLS)} (default paper)")
    add("--epochs", type=cli.epochs_type, default=(20, 100), metavar="I+C",
        help="of initialise + classify (default 20+100)")  # fmt: skip
    add("--fraction", type=float, default=1.0, help="share of the training data (default 1)")
    add("--batch-size", type=int, default=128)
    add("--seeds", type=cli.seeds_type, default=(0,), metavar="N",
        help="how many, or a list such as 0,3 (default 1)")  # fmt: skip
    add("--same-batches", action="store_true",
        help="train all seeds in one program, on the batches of the first: they differ in initial "
             "weights alone")  # fmt: skip
    add("--margin", type=float, help="of the activation transfer hinge (default 1)")
    add("--layers", help="taps compared, such as layer2,layer3 (default all)")
    add("--temperature", type=float, help="of knowledge distillation")
    add("--transfer-weight", type=float, help="factor on the transfer loss (default 1)")
    add("--evaluate-every", type=int, default=1, metavar="EPOCHS")
    add("--precision", default="float32", help=" or ".join(PRECISIONS))
    add("--workdir", type=Path, default=cli.WORKDIR, help="where all goes (default ./workdir)")
    add(
        "--views",
        type=int,
        metavar="K",
        help="how many crops and flips of an image are shown (default all; CIFAR-10: 162)",
    )
    add("--keep-targets", action="store_true",
        help="ask the teacher once for each of the views, and keep its bits")  # fmt: skip
    add("--tensorboard", action="store_true",
        help="write events too: tensorboard --logdir WORKDIR/runs")  # fmt: skip
    add("--devices", type=int, help="how many of each process's (default all)")
    add("--coordinator", metavar="HOST:PORT", help="this is one of several processes: where 0 is")
    add("--processes", type=int, metavar="N", help="how many they are")
    add("--process", type=int, metavar="I", help="which of them this is, from 0")
    add("--distributed", action="store_true",
        help="this is one of several processes, as the cluster tells JAX")  # fmt: skip
    add("--steps-per-dispatch", type=int, help="default: 1 on CPUs, 100 elsewhere")
    add("--checkpoint-seconds", type=float, default=60.0)
    add("--force", action="store_true", help="run again what is finished")
    add("--json", action="store_true", help="print the result as JSON, progress to stderr")
    return parser.parse_args(arguments)


def main(console: Console) -> None:
    arguments = parse()
    commands = {"train": train, "evaluate": evaluate_network, "list": list_runs}
    if arguments.command not in commands:
        raise unknown("command", arguments.command, commands)
    place = (arguments.coordinator, arguments.processes, arguments.process)
    if arguments.distributed or place != (None, None, None):
        cli.join(*place)
    cli.cache_compilation(arguments.workdir)
    if arguments.json:
        console = Console(stderr=True, quiet=not is_first())
    commands[arguments.command](arguments, console)


def train(arguments: argparse.Namespace, console: Console) -> None:
    """One run a seed, then their mean."""
    options, student_name = _options(arguments), arguments.student or "wrn16-1"
    # Everything that can be wrong is looked at before the data is read.
    config = RunConfig(
        dataset=arguments.dataset,
        student=student_name,
        method=arguments.method,
        protocol=arguments.protocol,
        options=tuple(sorted(options.items())),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        fraction=arguments.fraction,
        evaluate_every=arguments.evaluate_every,
        precision=arguments.precision,
        views=arguments.views,
    )
    MODELS[student_name]
    teacher = _teacher(arguments)
    data = load(arguments.dataset, "train", arguments.data_dir)
    test = load(arguments.dataset, "test", arguments.data_dir)
    student = MODELS[student_name](num_classes=data.num_classes)
    resources = Resources(
        arguments.devices,
        arguments.steps_per_dispatch,
        arguments.checkpoint_seconds,
        arguments.keep_targets,
        arguments.tensorboard,
    )
    live = cli.progress(arguments, console)
    first, *others = arguments.seeds
    beside = tuple({"seeds": Seeds(seed, first, first, first)} for seed in others)
    sittings = {first: beside} if arguments.same_batches else dict.fromkeys(arguments.seeds, ())
    run = functools.partial(
        distill, student, teacher, data, test=test, workdir=arguments.workdir,
        force=arguments.force, resources=resources, reporter=live,
    )  # fmt: skip
    with live.shown():
        results = cli.results_of(
            functools.partial(run, abreast=abreast, **config.arguments | {"seeds": seed})
            for seed, abreast in sittings.items()
        )
    if arguments.json:
        json.dump([result.record for result in results], sys.stdout, indent=1)
        return
    for result in results:
        wrong = result.record["result"]["test_error"]
        console.print(f"{result.directory}  {percent(wrong)} %", soft_wrap=True)
    errors = [result.record["result"]["test_error"] for result in results]
    console.print(
        f"{arguments.method}, {student_name} on {arguments.dataset}: "
        f"test error {mean_and_std(errors)} % (n = {len(errors)}"
        f"{', of initial weights alone' * arguments.same_batches})",
        soft_wrap=True,
    )


def evaluate_network(arguments: argparse.Namespace, console: Console) -> None:
    """The test error of --teacher."""
    if arguments.student is not None:
        raise InputError("evaluate measures a teacher: give --teacher, and --teacher-weights")
    name = arguments.teacher or "wrn16-2"
    network = find_teacher(name, arguments.dataset, arguments.teacher_weights, arguments.workdir)
    test = load(arguments.dataset, "test", arguments.data_dir)
    found = evaluate(network, test, arguments.devices)
    if arguments.json:
        json.dump({"network": network.name, "dataset": arguments.dataset, **found}, sys.stdout)
        return
    console.print(
        f"{network.name} on {arguments.dataset}: test error {percent(found['test_error'])} % "
        f"({found['errors']:,} of {found['examples']:,}), "
        f"cross-entropy {found['test_cross_entropy']:.4f}",
        soft_wrap=True,
    )


def list_runs(arguments: argparse.Namespace, console: Console) -> None:
    """Every run of the workdir, with its state and result."""
    rows = [_row(path) for path in sorted((arguments.workdir / "runs").glob("*/config.json"))]
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)
        return
    if not rows:
        console.print(f"no runs in {arguments.workdir}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table, soft_wrap=True)


def _row(path: Path) -> dict[str, Any]:
    config = read_json(path)
    record = read_record(path.parent / "record.json")
    diverged = read_record(path.parent / "diverged.json")
    steps = [int(p.name) for p in (path.parent / "checkpoints").glob("*") if p.name.isdigit()]
    reached = f"step {max(steps)}" if steps else "begun"
    error = record["result"].get("test_error") if record else None
    return {
        "run": path.parent.name,
        "method": config["method"],
        "student": config["student"],
        "teacher": architecture(config["teacher"] or "-"),
        "data": f"{config['dataset']} {100 * config['fraction']:g} %",
        "protocol": config["protocol"],
        "epochs": "+".join(map(str, config["epochs"])),
        "seed": config["seeds"]["weights"],
        "state": "finished" if record else "diverged" if diverged else reached,
        "test error": f"{percent(error)} %" if error is not None else "-",
    }


def _teacher(arguments: argparse.Namespace) -> Any:
    """The teacher; None where the method needs none and none was asked for."""
    phases = METHODS[arguments.method](protocol=arguments.protocol, **_options(arguments))
    needed = any(phase.needs_teacher for phase in phases)
    asked = arguments.teacher is not None or arguments.teacher_weights is not None
    if arguments.teacher == "none" or not (needed or asked):
        if needed:
            raise InputError(f"method {arguments.method} needs a teacher")
        return None
    return find_teacher(
        arguments.teacher or "wrn16-2",
        arguments.dataset,
        arguments.teacher_weights,
        arguments.workdir,
    )


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The method's options that were given."""
    given = {
        "margin": arguments.margin,
        "layers": tuple(arguments.layers.split(",")) if arguments.layers is not None else None,
        "temperature": arguments.temperature,
        "transfer_weight": arguments.transfer_weight,
    }
    return {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    cli.main(main)
