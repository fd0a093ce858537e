"""Make images from a trained network alone, or show what students learn from them.

The images are labelled and stand in a folder, where a contact sheet shows them. A student is
trained on them as on any data set, and tested on real images: --dataset dreamed:DIR.

Examples:
  python -m experiments.dream --teacher wrn16-2 --count 256
      256 images of CIFAR-10's classes from the shipped wrn16-2
  python -m experiments.run --dataset dreamed:workdir/dreams/HASH --method kd --epochs 0+200
      a student that learns from them
  python -m experiments.dream --study digits
      students from dreamed digits, from real ones and from noise, three seeds, in some minutes
  python -m experiments.dream --study cifar10
      the same on CIFAR-10, from the shipped wrn16-2: some hours on one core

The same command again resumes where it stopped.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from abflax import Dataset, Network, Resources, Result, RunConfig, distill_group, evaluate, load
from abflax.data import Preprocessing, few_shot_subset
from abflax.errors import unknown
from abflax.models import MODELS
from abflax.storage.files import as_json, write_whole
from abflax.synthesis import Dreaming, dream
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

METHODS = ("kd", "activation-boundary")
WORD = {"digits": "digits", "cifar10": "images"}


@dataclasses.dataclass(frozen=True)
class Study:
    """Students from dreams, from as many real images, and from noise.

    Attributes:
      student: its architecture.
      count: images of each kind.
      how: the dreams.
      protocol, batch_size, epochs, evaluate_every: of the students.
      options: method -> its options.
    """

    student: str
    count: int
    how: Dreaming
    protocol: str
    batch_size: int
    epochs: tuple[int, int]
    evaluate_every: int
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


STUDIES = {
    # Chosen for its time, and by eye on the picture. A mirrored digit is none, so nothing is
    # mirrored. Each image moves on its own, as the teacher's were augmented: where the whole batch
    # moves alike, few digits can be recognized.
    "digits": Study(
        student=quickstart.STUDENT,
        count=200,
        how=Dreaming(
            steps=400, batch_size=200, learning_rate=0.1, statistics=1.0, first_statistics=3.0,
            tv_l2=0.01, l2=0.1, jitter=1, flip=False, each=True,
        ),
        protocol="official",
        batch_size=20,
        epochs=(5, 25),
        evaluate_every=10,
        options=quickstart.OPTIONS,
    ),
    # The published weights; a quarter of the steps at twice the rate, about an hour and a half on
    # one core. Each image moves on its own, which by eye makes trucks and horses a little clearer.
    "cifar10": Study(
        student="wrn10-1",
        count=1000,
        how=Dreaming(steps=500, batch_size=250, learning_rate=0.1, each=True),
        protocol="paper",
        batch_size=100,
        epochs=(10, 50),
        evaluate_every=30,
    ),
}  # fmt: skip


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
      study: compare students on these data instead, "digits" or "cifar10".
      seeds: of the study's students: how many, or a list such as 0,3.
      force: train its finished runs again.
    """

    teacher: str = "wrn16-2"
    teacher_weights: str | None = None
    dataset: str = "cifar10"
    count: int = 256
    seed: int = 0
    how: Dreaming = Dreaming()
    devices: int | None = None
    study: str | None = None
    seeds: cli.SeedList = (0, 1, 2)
    force: bool = False


def main(console: Console) -> None:
    """Runs the command."""
    arguments = cli.parse(Arguments, "experiments.dream", __doc__)
    cli.cache_compilation(arguments.workdir)
    if arguments.study is not None:
        if arguments.study not in STUDIES:
            raise unknown("study", arguments.study, STUDIES)
        compare(arguments.study, arguments, console)
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


def compare(name: str, arguments: Arguments, console: Console) -> None:
    """Trains students on dreams, on real images, and on noise."""
    study, (shape, pixels, preprocessing) = STUDIES[name], FORMS[name]
    reporter = cli.progress(arguments, console)
    common: dict[str, Any] = {
        "test": load(name, "test"), "workdir": arguments.workdir, "force": arguments.force,
        "reporter": reporter,
    }  # fmt: skip
    every = load(name, "train")
    real = few_shot_subset(every, study.count // every.num_classes, seed=0)
    with reporter.shown():
        teacher = _teacher(name, every, arguments, common)
    error = evaluate(teacher, common["test"])["test_error"]
    folder, dreamed = make(teacher, name, study.count, 0, study.how, arguments, console)
    draw = np.random.default_rng(0)
    noise = draw.normal(preprocessing.mean, preprocessing.std, (study.count, *shape))
    noise = np.clip(noise, *pixels).astype(np.float32)
    sources = {
        f"dreamed {WORD[name]}": dreamed,
        f"real {WORD[name]}": real,
        "noise": Dataset(noise, dreamed.labels, every.num_classes, preprocessing, "noise"),
    }
    records: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with reporter.shown():
        for source, data in sources.items():
            for seed in arguments.seeds:
                results = learn(study, teacher, data, seeds=seed, **common)
                for method, result in zip(METHODS, results, strict=True):
                    records.setdefault((source, method), []).append(result.record)
    rows = [[source, method, _errors(runs)] for (source, method), runs in records.items()]
    title = (
        f"{study.student} on {study.count} images of each kind, error on {len(common['test'])} "
        f"real {WORD[name]}, {len(arguments.seeds)} seeds; teacher {100 * error:.2f} %"
    )
    cli.print_table(console, _table(rows, title))
    console.print(f"picture: {folder / 'dreams.png'}")
    summary = {
        "teacher_error": error,
        "how": dataclasses.asdict(study.how),
        "images": study.count,
        "seeds": list(arguments.seeds),
        "test_errors": {f"{source}, {method}": each for source, method, each in rows},
        "records": {f"{source}, {method}": [run["hash"] for run in runs]
                    for (source, method), runs in records.items()},
    }  # fmt: skip
    path = arguments.workdir / f"dreamed_{name}.json"
    write_whole(path, as_json(summary).encode())


def page_table(summary: dict[str, Any]) -> str:
    """The table of docs/relatives.md, from the summary that a study writes."""
    lines = ["| training images | method | test error % |", "| --- | --- | ---: |"]
    for name, errors in summary["test_errors"].items():
        source, method = name.split(", ")
        lines.append(f"| {source} | `{method}` | {mean_and_std(errors)} |")
    return "\n".join(lines)


def learn(study: Study, teacher: Network, data: Dataset, **settings: Any) -> list[Result]:
    """Trains a student by each method, those with the same batches and teacher in one program."""
    config = RunConfig(
        dataset=data.name, student=study.student, teacher=teacher.name, protocol=study.protocol,
        epochs=study.epochs, batch_size=study.batch_size, evaluate_every=study.evaluate_every,
    )  # fmt: skip
    runs = [{"method": method, **study.options.get(method, {})} for method in METHODS]
    results: list[Result] = []
    for _, group in itertools.groupby(runs, lambda run: config.replace(**run).group_key):
        results += distill_group(
            [*group], MODELS[study.student](), teacher, data, config=config, **settings
        )
    return results


def _teacher(name: str, data: Dataset, arguments: Arguments, common: dict[str, Any]) -> Network:
    """The shipped teacher, or for the digits one that is trained."""
    if name != "digits":
        return find_teacher(Arguments.teacher, name, None, arguments.workdir)
    taught: Network = quickstart.teach(data, protocol="official", **common).student
    return taught


def _errors(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [run["result"]["test_error"] for run in runs]


def _table(rows: Sequence[Sequence[Any]], title: str) -> Table:
    table = cli.make_table(("training images", "method", "test error %"), title, left=2)
    for source, method, errors in rows:
        table.add_row(source, method, mean_and_std(errors))
    return table


if __name__ == "__main__":
    cli.main(main)
