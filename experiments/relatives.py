"""Compare relatives of the methods on digits: two domains, a route of anchors, boundary samples.

Examples:
  python -m experiments.relatives domains
      a student adapts, with its teacher, from digits to unlabelled ones of inverted contrast
  python -m experiments.relatives methods
      a route of four anchors, and boundary-supporting samples, beside knowledge distillation

Three seeds each, some minutes. The same command again resumes where it stopped. A summary, as it is
committed in this folder, and a picture go to the workdir.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from abflax import Dataset, Resources, distill, evaluate, load
from abflax.data import holdout
from abflax.models import MODELS
from abflax.runtime.reporter import Reporter
from abflax.storage.files import as_json, write_whole
from experiments import quickstart
from experiments.common import cli, plots
from experiments.common.networks import find_anchors
from experiments.common.stats import mean_and_std

PIXELS = (0.0, 16.0)
# Name of a target domain -> a and b: its pixels are a·x + b, x of the digits, and noise.
DOMAINS = {"inverted": (-1.0, 16.0), "pale": (0.5, 4.0)}
# Chosen once, for the time they take.
DOMAIN_EPOCHS, DOMAIN_TEACHER_EPOCHS = 20, 24
ANCHORS, METHOD_EPOCHS = 4, 60
# The learning rate falls over the run (protocol paper), or with each anchor anew (official).
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"method": "kd"},
    "rco": {"method": "rco"},
    "rco, rate anew": {"method": "rco", "protocol": "official"},
    "bss": {"method": "bss"},
}


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      study: domains, or methods.
      seeds: how many, or a list such as 0,3.
      force: train finished runs again.
    """

    study: Annotated[Literal["domains", "methods"], tyro.conf.Positional] = "domains"
    seeds: cli.SeedList = (0, 1, 2)
    force: bool = False


Errors = Mapping[str, Mapping[str, Sequence[float]]]
"""What was trained -> what was measured -> its share, seed by seed."""


def main(console: Console) -> None:
    """Runs the study, prints its table, and writes summary and picture."""
    arguments = cli.parse(Arguments, "experiments.relatives", __doc__)
    cli.cache_compilation(arguments.workdir)
    reporter = cli.progress(arguments, console)
    study = {"domains": domains, "methods": methods}[arguments.study]
    with reporter.shown():
        errors, facts = study(arguments, reporter)
    path = arguments.workdir / f"relatives_{arguments.study}"
    summary = {"seeds": list(arguments.seeds), **facts, "errors": errors}
    write_whole(path.with_suffix(".json"), as_json(summary).encode())
    picture = path.with_suffix(".png")
    draw_domains(picture) if arguments.study == "domains" else draw(errors, picture)
    console.print(page_table(summary), soft_wrap=True, markup=False)
    console.print(f"picture: {picture}", soft_wrap=True)


def domains(arguments: Arguments, reporter: Reporter) -> tuple[Errors, dict[str, Any]]:
    """Trains students on labelled digits, with and without unlabelled ones of another domain."""
    errors: dict[str, dict[str, list[float]]] = {}
    teachers: dict[str, float] = {}
    hashes: dict[str, list[str]] = {}
    for domain in DOMAINS:
        own, teachers[domain], records = adapt(domain, arguments, reporter)
        for name, measured in own.items():
            label = f"{domain}: {name}"
            errors[label], hashes[label] = measured, records[name]
    return errors, {"teacher_errors_on_target": teachers, "records": hashes}


def adapt(
    domain: str, arguments: Arguments, reporter: Reporter
) -> tuple[dict[str, dict[str, list[float]]], float, dict[str, list[str]]]:
    """Trains the students of one target domain: their errors, the teacher's, and their runs."""
    source, target, tests = two_domains(domain)
    common: dict[str, Any] = {
        "test": tests["target"], "workdir": arguments.workdir, "force": arguments.force,
        "reporter": reporter, "batch_size": 32, "evaluate_every": 10,
    }  # fmt: skip
    taught = distill(
        MODELS[quickstart.TEACHER](), None, source, method="cross-entropy",
        epochs=(0, DOMAIN_TEACHER_EPOCHS), seeds=quickstart.TEACHER_SEED, **common,
    )  # fmt: skip
    teacher = taught.student
    unlabelled = Dataset(target.images, preprocessing=target.preprocessing, name=target.name)
    settings: dict[str, dict[str, Any]] = {
        "source alone, `kd`": {"method": "kd"},
        "both, `progressive-uda`": {"method": "progressive-uda", "target_data": unlabelled},
    }
    errors: dict[str, dict[str, list[float]]] = {}
    hashes: dict[str, list[str]] = {}
    for name, own in settings.items():
        errors[name], hashes[name] = {"target": [], "source": []}, []
        for seed in arguments.seeds:
            result = distill(
                MODELS[quickstart.STUDENT](), teacher, source, epochs=(0, DOMAIN_EPOCHS),
                seeds=seed, **own, **common,
            )  # fmt: skip
            found = result.record["result"]
            errors[name]["target"].append(found["test_error"])
            errors[name]["source"].append(evaluate(result.student, tests["source"])["test_error"])
            hashes[name].append(result.record["hash"])
            if "teacher_test_error" in found:
                moved = errors[name].setdefault("target, its teacher", [])
                moved.append(found["teacher_test_error"])
    return errors, taught.record["result"]["test_error"], hashes


def two_domains(domain: str) -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    """The source, the target with its labels, and held-out digits of both.

    Half of the training digits are the source, the other half the target.
    """
    every, test = load("digits", "train"), load("digits", "test")
    source, others = holdout(every, 0.5, seed=0)
    tests = {"source": test, "target": other_domain(test, domain, 1)}
    return source, other_domain(others, domain, 0), tests


def other_domain(data: Dataset, domain: str, seed: int) -> Dataset:
    """Changes the contrast of digits, moves each by up to a pixel along both sides; adds noise."""
    factor, offset = DOMAINS[domain]
    draw = np.random.default_rng(seed)
    changed = factor * data.images + offset
    padded = np.pad(changed, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    corners = draw.integers(0, 3, (len(data), 2))
    height, width = data.image_shape[:2]
    moved = np.stack([
        image[row : row + height, column : column + width]
        for image, (row, column) in zip(padded, corners, strict=True)
    ])  # fmt: skip
    noisy = np.clip(moved + draw.normal(0, 2, moved.shape), *PIXELS).astype(np.float32)
    return Dataset(noisy, data.labels, data.num_classes, data.preprocessing, f"{domain} digits")


def methods(arguments: Arguments, reporter: Reporter) -> tuple[Errors, dict[str, Any]]:
    """Trains students by KD, along a route of anchors, and with boundary-supporting samples."""
    train, test, epochs = load("digits", "train"), load("digits", "test"), quickstart.TEACHER_EPOCHS
    common: dict[str, Any] = {
        "test": test, "workdir": arguments.workdir, "force": arguments.force, "reporter": reporter,
    }  # fmt: skip
    run = distill(
        MODELS[quickstart.TEACHER](), None, train, method="cross-entropy", epochs=(0, epochs),
        batch_size=64, evaluate_every=epochs // ANCHORS, seeds=quickstart.TEACHER_SEED,
        resources=Resources(keep_anchors=ANCHORS), **common,
    )  # fmt: skip
    route = find_anchors(quickstart.TEACHER, run.record["hash"], arguments.workdir, ANCHORS)
    records = {
        name: [
            distill(
                MODELS[quickstart.STUDENT](), route if own["method"] == "rco" else route[-1], train,
                epochs=(0, METHOD_EPOCHS), batch_size=32,
                evaluate_every=METHOD_EPOCHS // ANCHORS, fraction=quickstart.FRACTION,
                seeds=seed, **own, **common,
            ).record
            for seed in arguments.seeds
        ]
        for name, own in METHODS.items()
    }  # fmt: skip
    errors = {
        method: {"test": [each["result"]["test_error"] for each in runs]}
        for method, runs in records.items()
    }
    anchors = [evaluate(each, test)["test_error"] for each in route]
    hashes = {method: [each["hash"] for each in runs] for method, runs in records.items()}
    return errors, {"anchor_errors": anchors, "records": hashes}


def page_table(summary: Mapping[str, Any]) -> str:
    """The table of docs/relatives.md, from the summary that a study writes."""
    errors: Errors = summary["errors"]
    columns = list(dict.fromkeys(name for own in errors.values() for name in own))
    lines = [
        f"| student | {' | '.join(f'error on {name} %' for name in columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for name, own in errors.items():
        shown = (mean_and_std(own[column]) if column in own else "–" for column in columns)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(errors: Errors, path: Path) -> None:
    """Draws the errors with their deviations."""
    shares = [100 * np.asarray(own["test"]) for own in errors.values()]
    values = [
        (float(each.mean()), float(each.std(ddof=1)) if len(each) > 1 else None) for each in shares
    ]
    name, places = "mean ± standard deviation", [(method, None) for method in errors]
    panel = plots.Panel("as many steps for each", "test error, %", "", places, {name: values})
    plots.points([panel], [name], path, "A student of a tenth of the digits")


def draw_domains(path: Path) -> None:
    """Draws twenty digits of each domain, in a row."""
    source = two_domains("inverted")[0].images[:20].astype(np.float32)
    targets = [two_domains(domain)[1].images[:20] for domain in DOMAINS]
    rows = np.repeat(range(1 + len(targets)), 20)
    plots.contact_sheet(np.concatenate([source, *targets]), rows, PIXELS, path)


if __name__ == "__main__":
    cli.main(main)
