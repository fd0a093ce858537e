"""Make images from a trained network alone, or show on digits what a student learns from them.

The images are labelled and stand in a folder, where a contact sheet shows them. A student is
trained on them as on any data set, and tested on real images: --dataset dreamed:DIR.

Examples:
  python -m experiments.dream --teacher wrn16-2 --count 256
      256 images of CIFAR-10's classes from the shipped wrn16-2
  python -m experiments.run --dataset dreamed:workdir/dreams/HASH --method kd --epochs 0+200
      a student that learns from them
  python -m experiments.dream --digits
      students from dreamed digits, from real ones and from noise, three seeds, in some minutes

The same command again resumes where it stopped.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from abflax import Dataset, Network, Resources, distill, load
from abflax.data import Preprocessing, few_shot_subset
from abflax.errors import unknown
from abflax.models import MODELS
from abflax.storage.files import as_json, write_whole
from abflax.synthesis import Dreaming, dream
from abflax.weights import load_network
from experiments import quickstart
from experiments.common import cli, plots
from experiments.common.networks import find_teacher
from experiments.common.stats import mean_and_std

# What a network must be told of its data: the sides of images, and the range of their pixels.
FORMS: dict[str, tuple[tuple[int, int, int], tuple[float, float], Preprocessing]] = {
    "cifar10": (
        (32, 32, 3),
        (0.0, 255.0),
        Preprocessing(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7), pad=4, flip=True),
    ),
    "digits": ((8, 8, 1), (0.0, 16.0), Preprocessing(mean=(4.88,), std=(6.02,), pad=1)),
}

# Of the digits' study, chosen for its time, and by eye on the picture. A mirrored digit is none, so
# nothing is mirrored. Each image moves on its own, as the teacher's were augmented: where the whole
# batch moves alike, few digits can be recognized.
DIGITS = Dreaming(
    steps=400, batch_size=200, learning_rate=0.1, statistics=1.0, first_statistics=3.0, tv_l2=0.01,
    l2=0.1, jitter=1, flip=False, each=True,
)  # fmt: skip
COUNT = 200
METHODS = ("kd", "activation-boundary")
EPOCHS = (5, 25)


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      teacher: name of its architecture.
      teacher_weights: file or run; left out: what the repository ships.
      dataset: what the teacher was trained on; tells sides and range of the images.
      count: images to make.
      seed: of noise, jitter and flips.
      how: the weights of the objective, and the optimizer.
      devices: how many; left out: all.
      digits: run the study on digits instead.
      seeds: of its students: how many, or a list such as 0,3.
      force: train its finished runs again.
    """

    teacher: str = "wrn16-2"
    teacher_weights: str | None = None
    dataset: str = "cifar10"
    count: int = 256
    seed: int = 0
    how: Dreaming = Dreaming()
    devices: int | None = None
    digits: bool = False
    seeds: cli.SeedList = (0, 1, 2)
    force: bool = False


def main(console: Console) -> None:
    """Runs the command."""
    arguments = cli.parse(Arguments, "experiments.dream", __doc__)
    cli.cache_compilation(arguments.workdir)
    if arguments.digits:
        study(arguments, console)
        return
    if arguments.dataset not in FORMS:
        raise unknown("dataset", arguments.dataset, FORMS)
    teacher = find_teacher(
        arguments.teacher, arguments.dataset, arguments.teacher_weights, arguments.workdir
    )
    folder, data = make(
        teacher, arguments.dataset, arguments.count, arguments.seed, arguments.how, arguments,
        console,
    )  # fmt: skip
    console.print(f"{len(data)} images: {folder}   picture: {folder / 'dreams.png'}")
    console.print(f"a student: python -m experiments.run --dataset dreamed:{folder} --method kd")


def make(
    teacher: Network,
    dataset: str,
    count: int,
    seed: int,
    how: Dreaming,
    arguments: Arguments,
    console: Console,
) -> tuple[Path, Dataset]:
    """Dreams into a folder that is named by all that changes the images, and draws them."""
    shape, pixels, preprocessing = FORMS[dataset]
    told = (teacher.name, dataset, count, seed, dataclasses.asdict(how))
    name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
    folder = arguments.workdir / "dreams" / name
    reporter = cli.progress(arguments, console)
    with reporter.shown():
        data = dream(
            teacher, count, key=jax.random.key(seed), image_shape=shape, pixels=pixels,
            preprocessing=preprocessing, stands_for=dataset, workdir=folder,
            resources=Resources(devices=arguments.devices), reporter=reporter,
            **dataclasses.asdict(how),
        )  # fmt: skip
    plots.contact_sheet(data.images, data.labels, pixels, folder / "dreams.png")
    return folder, data


def study(arguments: Arguments, console: Console) -> None:
    """Trains students on dreamed digits, on the real ones, and on noise."""
    shape, pixels, preprocessing = FORMS["digits"]
    reporter = cli.progress(arguments, console)
    common: dict[str, Any] = {
        "test": load("digits", "test"), "protocol": "official", "workdir": arguments.workdir,
        "force": arguments.force, "reporter": reporter,
    }  # fmt: skip
    every = load("digits", "train")
    real = few_shot_subset(every, COUNT // 10, seed=0)
    with reporter.shown():
        run = quickstart.teach(every, **common)
    assert run.directory is not None
    teacher = load_network(quickstart.TEACHER, run.directory / "student.safetensors")
    folder, dreamed = make(teacher, "digits", COUNT, 0, DIGITS, arguments, console)
    draw = np.random.default_rng(0)
    noise = np.clip(
        draw.normal(preprocessing.mean[0], preprocessing.std[0], (COUNT, *shape)), *pixels
    )
    sources = {
        "dreamed digits": dreamed,
        "real digits": real,
        "noise": Dataset(noise.astype(np.float32), dreamed.labels, 10, preprocessing, "noise"),
    }
    records: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with reporter.shown():
        for source, data in sources.items():
            for method in METHODS:
                records[source, method] = [
                    learn(method, teacher, data, seeds=seed, **common).record
                    for seed in arguments.seeds
                ]
    rows = [[source, method, _errors(runs)] for (source, method), runs in records.items()]
    error = run.record["result"]["test_error"]
    console.print(_table(rows, error, len(arguments.seeds)), soft_wrap=True)
    console.print(f"picture: {folder / 'dreams.png'}")
    summary = {
        "teacher_error": error,
        "how": dataclasses.asdict(DIGITS),
        "images": COUNT,
        "seeds": list(arguments.seeds),
        "test_errors": {f"{source}, {method}": each for source, method, each in rows},
        "records": {f"{source}, {method}": [run["hash"] for run in runs]
                    for (source, method), runs in records.items()},
    }  # fmt: skip
    path = arguments.workdir / "dreamed_digits.json"
    write_whole(path, as_json(summary).encode())


def page_table(summary: dict[str, Any]) -> str:
    """The table of docs/relatives.md, from the summary that the study writes."""
    lines = ["| training images | method | test error % |", "| --- | --- | ---: |"]
    for name, errors in summary["test_errors"].items():
        source, method = name.split(", ")
        lines.append(f"| {source} | `{method}` | {mean_and_std(errors)} |")
    return "\n".join(lines)


def learn(method: str, teacher: Network, data: Dataset, **settings: Any) -> Any:
    """Trains a student."""
    return distill(
        MODELS[quickstart.STUDENT](), teacher, data, method=method, epochs=EPOCHS, batch_size=20,
        evaluate_every=10, **quickstart.OPTIONS.get(method, {}), **settings,
    )  # fmt: skip


def _errors(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [run["result"]["test_error"] for run in runs]


def _table(rows: Sequence[Sequence[Any]], teacher: float, seeds: int) -> Table:
    title = (
        f"{quickstart.STUDENT} on {COUNT} images of each kind, error on 500 real digits, "
        f"{seeds} seeds; teacher {100 * teacher:.2f} %"
    )
    table = cli.make_table(("training images", "method", "test error %"), title, left=2)
    for source, method, errors in rows:
        table.add_row(source, method, mean_and_std(errors))
    return table


if __name__ == "__main__":
    cli.main(main)
