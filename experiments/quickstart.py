"""Distil a network on real images in a few minutes: scikit-learn's digits, nothing to download.

A wide ResNet learns all 1,297 training digits. Then a shallower one of the same widths learns a
tenth of them from labels alone, from the teacher's logits, and from the teacher's activation
boundaries first; five seeds each. Error and agreement are measured on 500 held-out digits.

About two minutes on two CPU cores, compilation included.

Examples:
  python -m experiments.quickstart
  python -m experiments.quickstart --seeds 10 --workdir /tmp/abflax
"""

import dataclasses
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from abflax import Dataset, Network, Result, distill, load
from abflax.models import MODELS
from abflax.training.record import require_writable
from abflax.weights import load_network
from experiments.common import cli, plots
from experiments.common.stats import describe_points, mean_and_std, paired_difference, percent

TEACHER, STUDENT = "wrn16-1", "wrn10-1"
METHODS = ("cross-entropy", "kd", "activation-boundary")
# Chosen once, for the time they take: every method makes the same number of steps.
TEACHER_EPOCHS, EPOCHS = 12, (20, 40)
FRACTION = 0.1
# The published factor 3/1000 is made for a wrn22-4 on 32×32 images. A wrn16-1 on 8×8 has 64 times
# fewer neurons in each tap, so 64 is the same weight on the mean over neurons.
OPTIONS: dict[str, dict[str, Any]] = {"activation-boundary": {"transfer_weight": 64.0}}
# The teacher's. With a student's seed both would start from the same weights.
TEACHER_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      seeds: how many, or a list such as 0,3.
      force: train finished runs again.
    """

    seeds: cli.SeedList = (0, 1, 2, 3, 4)
    force: bool = False


def main(console: Console) -> None:
    """Trains the teacher and all students, prints a table and draws a picture."""
    arguments = cli.parse(Arguments, "experiments.quickstart", __doc__)
    began = time.perf_counter()
    require_writable(arguments.workdir)
    cli.cache_compilation(arguments.workdir)
    train = load("digits", "train")
    reporter = cli.progress(arguments, console)
    common: dict[str, Any] = {
        "test": load("digits", "test"),
        "protocol": "official",
        "workdir": arguments.workdir,
        "force": arguments.force,
        "reporter": reporter,
    }
    with reporter.shown():
        teacher_run = teach(train, **common)
        assert teacher_run.directory is not None
        teacher = load_network(TEACHER, teacher_run.directory / "student.safetensors")
        records = {
            method: [
                learn(method, teacher, train, seeds=seed, evaluate_every=5, **common).record
                for seed in arguments.seeds
            ]
            for method in METHODS
        }
    console.print(_table(records, teacher_run.record), soft_wrap=True)
    console.print(f"\n{_comparison(records)}\n", soft_wrap=True)
    picture = arguments.workdir / "quickstart.png"
    title = f"{STUDENT} taught by {TEACHER} on {100 * FRACTION:g} % of the digits"
    plots.curves(records, picture, f"{title} ({len(arguments.seeds)} seeds, mean ± std)")
    seconds = time.perf_counter() - began
    console.print(f"picture: {picture}   total: {seconds:.0f} s", soft_wrap=True)


def teach(data: Dataset, **common: Any) -> Result:
    """Trains the teacher."""
    return distill(
        MODELS[TEACHER](), None, data, method="cross-entropy", epochs=(0, TEACHER_EPOCHS),
        batch_size=64, evaluate_every=4, seeds=TEACHER_SEED, **common,
    )  # fmt: skip


def learn(method: str, teacher: Network, data: Dataset, **settings: Any) -> Result:
    """Trains a student."""
    return distill(
        MODELS[STUDENT](), teacher, data, method=method, epochs=EPOCHS, batch_size=32,
        fraction=FRACTION, **OPTIONS.get(method, {}), **settings,
    )  # fmt: skip


def _table(records: dict[str, list[dict[str, Any]]], teacher: dict[str, Any]) -> Table:
    title = (
        f"{STUDENT} on {100 * FRACTION:g} % of the digits; teacher {TEACHER}, all of them: "
        f"{percent(teacher['result']['test_error'])} % error\n"
        "layers: the share of held-out neurons that fire where the teacher's do"
    )
    layers = sorted(next(iter(records.values()))[0]["result"]["agreement"])
    columns = ("method", "test error %", *(f"{layer} %" for layer in layers), "s")
    table = cli.make_table(columns, title)
    for method, runs in records.items():
        results = [run["result"] for run in runs]
        table.add_row(
            method,
            mean_and_std([run["test_error"] for run in results]),
            *(mean_and_std([run["agreement"][layer] for run in results], 1) for layer in layers),
            f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
        )
    return table


def _comparison(records: dict[str, list[dict[str, Any]]]) -> str:
    """Compares activation boundaries with the others seed by seed, with 95 % intervals."""
    errors = {
        method: {run["config"]["seeds"]["weights"]: run["result"]["test_error"] for run in runs}
        for method, runs in records.items()
    }
    own = errors.pop("activation-boundary")
    parts = []
    for method, others in errors.items():
        difference = paired_difference(others, own)
        assert difference is not None  # they have the same seeds
        parts.append(f"{describe_points(difference)} below {method}")
    return f"The error of activation-boundary is {' and '.join(parts)}."


if __name__ == "__main__":
    cli.main(main)
