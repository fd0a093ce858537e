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

from abflax import Dataset, Network, Resources, distill, evaluate, load
from abflax.data import holdout
from abflax.models import MODELS
from abflax.runtime.reporter import Reporter
from abflax.storage.files import as_json, write_whole
from experiments import quickstart
from experiments.common import cli, plots
from experiments.common.networks import find_anchors
from experiments.common.stats import mean_and_std

PIXELS = (0.0, 16.0)
# Chosen once, for the time they take.
DOMAIN_EPOCHS, DOMAIN_TEACHER_EPOCHS = 20, 24
METHODS, ANCHORS, METHOD_EPOCHS = ("kd", "rco", "bss"), 4, 60


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
    source, target, tests = two_domains()
    common: dict[str, Any] = {
        "test": tests["target"], "workdir": arguments.workdir, "force": arguments.force,
        "reporter": reporter, "batch_size": 32, "evaluate_every": 10,
    }  # fmt: skip
    taught = distill(
        MODELS[quickstart.TEACHER](), None, source, method="cross-entropy",
        epochs=(0, DOMAIN_TEACHER_EPOCHS), seeds=quickstart.TEACHER_SEED, **common,
    )  # fmt: skip
    teacher = Network(MODELS[quickstart.TEACHER](), taught.variables)
    unlabelled = Dataset(target.images, preprocessing=target.preprocessing, name=target.name)
    settings: dict[str, dict[str, Any]] = {
        "source alone, kd": {"data": source, "method": "kd"},
        "both domains, progressive-uda": {
            "data": source, "method": "progressive-uda", "target_data": unlabelled,
        },
        "labelled target, cross-entropy": {
            "data": target, "method": "cross-entropy", "teacher": None,
        },
    }  # fmt: skip
    errors: dict[str, dict[str, list[float]]] = {}
    hashes: dict[str, list[str]] = {}
    for name, own in settings.items():
        errors[name], hashes[name] = {"target": [], "source": []}, []
        for seed in arguments.seeds:
            result = distill(
                MODELS[quickstart.STUDENT](), own.get("teacher", teacher), own["data"],
                **{key: own[key] for key in own if key not in ("data", "teacher")},
                epochs=(0, DOMAIN_EPOCHS), seeds=seed, **common,
            )  # fmt: skip
            student = Network(MODELS[quickstart.STUDENT](), result.variables)
            errors[name]["target"].append(result.record["result"]["test_error"])
            errors[name]["source"].append(evaluate(student, tests["source"])["test_error"])
            hashes[name].append(result.record["hash"])
            if "teacher_test_error" in result.record["result"]:
                moved = errors[name].setdefault("its teacher, target", [])
                moved.append(result.record["result"]["teacher_test_error"])
    measured = {name: evaluate(teacher, test)["test_error"] for name, test in tests.items()}
    return errors, {"teacher_errors": measured, "records": hashes}


def two_domains() -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    """The source, the target with its labels, and held-out digits of both.

    Half of the training digits are the source. The other half, inverted, moved by up to one pixel
    and with noise, are the target; so are the held-out digits.
    """
    every, test = load("digits", "train"), load("digits", "test")
    source, others = holdout(every, 0.5, seed=0)
    return source, other_domain(others, 0), {"source": test, "target": other_domain(test, 1)}


def other_domain(data: Dataset, seed: int) -> Dataset:
    """Inverts digits, moves each by up to one pixel along both sides, and adds noise."""
    draw = np.random.default_rng(seed)
    padded = np.pad(PIXELS[1] - data.images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    corners = draw.integers(0, 3, (len(data), 2))
    height, width = data.image_shape[:2]
    moved = np.stack([
        image[row : row + height, column : column + width]
        for image, (row, column) in zip(padded, corners, strict=True)
    ])  # fmt: skip
    noisy = np.clip(moved + draw.normal(0, 2, moved.shape), *PIXELS).astype(np.float32)
    return Dataset(noisy, data.labels, data.num_classes, data.preprocessing, "inverted digits")


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
        method: [
            distill(
                MODELS[quickstart.STUDENT](), route if method == "rco" else route[-1], train,
                method=method, epochs=(0, METHOD_EPOCHS), batch_size=32,
                evaluate_every=METHOD_EPOCHS // ANCHORS, fraction=quickstart.FRACTION,
                seeds=seed, **common,
            ).record
            for seed in arguments.seeds
        ]
        for method in METHODS
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
    series = {
        method: [
            (100 * float(np.mean(own["test"])), 100 * float(np.std(own["test"], ddof=1)))
            if method == place
            else None
            for place in errors
        ]
        for method, own in errors.items()
    }
    places = [(method, None) for method in errors]
    panel = plots.Panel("as many steps for each", "test error, %", "", places, series)
    plots.points([panel], list(errors), path, "A student of a tenth of the digits")


def draw_domains(path: Path) -> None:
    """Draws twenty digits of each domain, in a row."""
    source, target, _ = two_domains()
    both = np.concatenate([source.images[:20].astype(np.float32), target.images[:20]])
    plots.contact_sheet(both, np.repeat([0, 1], 20), PIXELS, path)


if __name__ == "__main__":
    cli.main(main)
