"""Train teachers, distil students, evaluate networks, list runs.

Examples:
  python -m experiments.run --epochs 1+1 --protocol official --seeds 3
      distil the shipped wrn16-2 into a wrn16-1 on CIFAR-10, three seeds
  python -m experiments.run --method kd --fraction 0.1 --epochs 20+100
  python -m experiments.run --method kd --epochs 1+1 --seeds 4 --same-batches
      four students in one program, with one forward pass of the teacher for all
  python -m experiments.run --student wrn22-4 --method cross-entropy --epochs 0+200
      train a teacher; --teacher wrn22-4 --teacher-weights RUN uses it afterwards
  python -m experiments.run evaluate --teacher wrn16-2
  python -m experiments.run list
  python -m experiments.run --distributed node0:9876,2,0
      one run by two processes, which train together: the same command with node0:9876,2,1 beside
      it; on a cluster that JAX knows (Slurm, Open MPI, Kubernetes, Cloud TPU): --distributed auto

The same command again resumes where it stopped; a finished run is not trained twice.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from abflax import (
    Dataset,
    Network,
    Resources,
    RunConfig,
    Seeds,
    distill_group,
    evaluate,
    load,
)
from abflax.errors import InputError
from abflax.methods import METHODS, PROTOCOLS
from abflax.models import MODELS, without_fields
from abflax.runtime.distributed import is_first
from abflax.storage.files import as_json, read_json
from abflax.training.record import read_config, read_record, skip_damaged
from experiments.common import cli
from experiments.common.networks import (
    architecture,
    find_anchors,
    find_teacher,
    greedy_anchors,
)
from experiments.common.stats import mean_and_std, percent

TEACHER = "wrn16-2"


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      command: train, evaluate (the teacher) or list.
      config: what changes the run's numbers; a method that needs a teacher has the shipped wrn16-2
        where --teacher is left out.
      resources: what changes its speed.
      teacher_weights: file or run; left out: what the repository ships.
      anchors: follow so many of the anchors that the teacher's run has kept (--keep-anchors), one
        after the other, instead of its end alone; with --method rco or another.
      greedy: choose those by how far their answers are apart, more than so many nats.
      data_dir: folder of TensorFlow Datasets; left out: TFDS_DATA_DIR.
      seeds: how many, or a list such as 0,3.
      same_batches: train all seeds in one program, on the batches of the first, which changes their
        numbers: they differ in initial weights alone.
      distributed: this is one of several processes: auto, where JAX knows the cluster, or
        HOST:PORT,N,I: process I of N, with process 0 at that address.
      force: train finished runs again.
      json: print the result as JSON, progress to stderr.
    """

    command: Annotated[Literal["train", "evaluate", "list"], tyro.conf.Positional] = "train"
    config: RunConfig = RunConfig(dataset="cifar10", student="wrn16-1")
    resources: Resources = Resources()
    teacher_weights: str | None = None
    anchors: int | None = None
    greedy: float | None = None
    data_dir: str | None = None
    seeds: cli.SeedList = (0,)
    same_batches: bool = False
    distributed: str | None = None
    force: bool = False
    json: bool = False


def main(console: Console) -> None:
    """Runs the command."""
    methods = {name: METHODS.describe(name) for name in METHODS}
    choices = {
        "methods (names can be summed with +)": {
            name: f"{method.summary} [{method.reference}]" for name, method in methods.items()
        },
        "protocols": {name: settings["cifar"].summary for name, settings in PROTOCOLS.items()},
    }
    arguments = cli.parse(Arguments, "experiments.run", __doc__, choices)
    if arguments.distributed is not None:
        own = ("workdir", "quiet", "teacher_weights", "data_dir", "distributed", "json")
        same = [pair for pair in vars(arguments).items() if pair[0] not in own]
        cli.join_processes(arguments.distributed, repr(same))
    cli.cache_compilation(arguments.workdir)
    if arguments.json:
        console = Console(stderr=True, quiet=not is_first())
    commands = {"train": train, "evaluate": evaluate_network, "list": list_runs}
    commands[arguments.command](arguments, console)


def train(arguments: Arguments, console: Console) -> None:
    """Trains one run for each seed, and prints their mean."""
    config = arguments.config
    # Whatever can be wrong is checked before the data is read.
    make_student = MODELS[config.student]
    named = config.teacher is not None or arguments.teacher_weights is not None
    teacher = _teacher(arguments) if config.needs_teacher or named else None
    data, test = (load(config.dataset, split, arguments.data_dir) for split in ("train", "test"))
    route: Network | list[Network] | None = teacher
    if arguments.anchors is not None:
        route = _route(arguments, data)
    reporter = cli.progress(arguments, console)
    first = arguments.seeds[0]
    groups = [[Seeds.all(seed)] for seed in arguments.seeds]
    if arguments.same_batches:
        groups = [[Seeds(seed, first, first, first) for seed in arguments.seeds]]
    run_group = functools.partial(
        distill_group, student=make_student(num_classes=data.num_classes), teacher=route,
        data=data, test=test, config=config, workdir=arguments.workdir, force=arguments.force,
        resources=arguments.resources, reporter=reporter,
    )  # fmt: skip
    with reporter.shown():
        results = cli.results_of(
            functools.partial(run_group, [{"seeds": seeds} for seeds in group]) for group in groups
        )
    if arguments.json:
        sys.stdout.write(as_json([result.record for result in results]))
        return
    errors = [result.record["result"]["test_error"] for result in results]
    for result, error in zip(results, errors, strict=True):
        console.print(f"{result.directory}  {percent(error)} %", soft_wrap=True)
    console.print(
        f"{config.method}, {config.student} on {config.dataset}: "
        f"test error {mean_and_std(errors)} % (n = {len(errors)}"
        f"{', of initial weights alone' * arguments.same_batches})",
        soft_wrap=True,
    )


def evaluate_network(arguments: Arguments, console: Console) -> None:
    """Prints the test error of --teacher."""
    config = arguments.config
    if config.student != Arguments.config.student:
        raise InputError("evaluate measures a teacher: give --teacher, and --teacher-weights")
    network = _teacher(arguments)
    test = load(config.dataset, "test", arguments.data_dir)
    measured = evaluate(network, test, arguments.resources.devices)
    if arguments.json:
        found = {"network": network.name, "dataset": config.dataset, **measured}
        sys.stdout.write(as_json(found))
        return
    console.print(
        f"{network.name} on {config.dataset}: test error {percent(measured['test_error'])} % "
        f"({measured['errors']:,} of {measured['examples']:,}), "
        f"cross-entropy {measured['test_cross_entropy']:.4f}",
        soft_wrap=True,
    )


def list_runs(arguments: Arguments, console: Console) -> None:
    """Prints every run of the workdir, with its state and result."""
    rows = []
    for path in sorted((arguments.workdir / "runs").glob("*/config.json")):
        with skip_damaged():
            rows.append(_row(path))
    if arguments.json:
        sys.stdout.write(as_json(rows))
        return
    if not rows:
        console.print(f"no runs in {arguments.workdir}")
        return
    table = cli.make_table(rows[0], left=len(rows[0]), pad_edge=False)
    for row in rows:
        networks = {role: without_fields(row[role]) for role in ("student", "teacher")}
        table.add_row(*(str(value) for value in (row | networks).values()))
    cli.print_table(console, table)


def _row(path: Path) -> dict[str, Any]:
    config = read_config(path, read_json(path)).as_json()
    record = read_record(path.parent / "record.json")
    diverged = read_record(path.parent / "diverged.json")
    checkpoints = (path.parent / "checkpoints").glob("*")
    steps = [int(path.name) for path in checkpoints if path.name.isdecimal()]
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


def _route(arguments: Arguments, data: Dataset) -> list[Network]:
    """The anchors to follow."""
    name, run, count = arguments.config.teacher, arguments.teacher_weights, arguments.anchors
    if name is None or run is None or count is None:
        raise InputError("--anchors are a run's: name it, --teacher wrn16-2 --teacher-weights RUN")
    networks = find_anchors(name, run, arguments.workdir, count)
    if arguments.greedy is None:
        return networks
    return greedy_anchors(networks, data.take(np.arange(min(len(data), 500))), arguments.greedy)


def _teacher(arguments: Arguments) -> Network:
    name, dataset = arguments.config.teacher or TEACHER, arguments.config.dataset
    return find_teacher(name, dataset, arguments.teacher_weights, arguments.workdir)


if __name__ == "__main__":
    cli.main(main)
