"""Draw the activation boundaries of networks in two dimensions (after the paper's Figure 1).

A teacher learns to separate the two arms of a spiral. Students with a narrower first layer learn
from it by l2 on activations or by activation boundaries, 320 steps each, then both by the same
distillation of logits, 320 steps. Above: decision regions, and the activation boundaries of the
tapped layer's neurons; below: how strongly the teacher responds, which l2 weighs, and where each
student's neurons do not fire as the teacher's do.

The figure is an illustration, not evidence: problem and sizes were chosen so that it shows the
boundaries. The students differ much in where they fire, but here not in error. The transfer weight
of each method is the best of 10, 30, 100, 300, 1000 by the mean error of three seeds, 0 to 2, on
held-out points of seed 1. The figure measures on other points, with other seeds. Less than a minute
on two CPU cores.

Examples:
  python -m experiments.figure1
  python -m experiments.figure1 --seeds 10 --workdir /tmp/abflax
"""

import dataclasses
import json
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from rich.console import Console

from abflax import Dataset, Network, Resources, Result, Tapped, distill
from abflax.errors import InputError
from abflax.losses import activation_indicator
from abflax.taps import run_model
from abflax.training.record import require_writable
from experiments.common import cli
from experiments.common.plots import COLOURS, STYLE
from experiments.common.stats import mean_and_std, percent

TEACHER, STUDENT = (32, 12), (24, 12)  # neurons of both hidden layers; the second is tapped
POINTS = {"teacher": 2048, "student": 512, "test": 8192}
TEACHER_EPOCHS, EPOCHS = 100, (40, 40)
TRANSFER_WEIGHTS = {"l2": 100.0, "activation-boundary": 300.0}
TEACHER_SEED = 1000
_SQUARE = 2.0  # points lie in [-2, 2]²
_GRID = 300


class Mlp(nn.Module):
    """Dense layers with ReLUs, without taps."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, points: Any) -> Any:
        """Logits `[batch, 2]` of points `[batch, 1, 1, 2]`."""
        x = points.reshape(len(points), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(2)(x)


def network(widths: tuple[int, ...]) -> Tapped:
    """An `Mlp` tapped at its last hidden layer, before the ReLU."""
    return Tapped(Mlp(widths), {"layer1": f"Dense_{len(widths) - 1}"})


def spiral(count: int, seed: int) -> Dataset:
    """Draws points evenly from the square, labelled with the arm that each lies on."""
    points = np.random.default_rng(seed).uniform(-_SQUARE, _SQUARE, (count, 2))
    return Dataset(points.reshape(count, 1, 1, 2).astype(np.float32), arm(points), 2)


def arm(points: np.ndarray) -> np.ndarray:
    """1 where φ/π + 0.8 r lies in [0, 1) modulo 2, else 0, of points `[…, 2]`."""
    angle = np.arctan2(points[..., 1], points[..., 0])
    turns = angle / np.pi + 0.8 * np.linalg.norm(points, axis=-1)
    return (turns % 2 < 1).astype(int)


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      seeds: how many, or a list such as 0,3.
    """

    seeds: cli.SeedList = (3, 4, 5, 6, 7)


def main(console: Console) -> None:
    """Trains the teacher and all students, draws the figure and prints a table."""
    arguments = cli.parse(Arguments, "experiments.figure1", __doc__)
    began = time.perf_counter()
    require_writable(arguments.workdir)
    cli.cache_compilation(arguments.workdir)
    teacher, teacher_run = train_teacher()
    results = {
        method: [train_student(teacher, method, seed) for seed in arguments.seeds]
        for method in TRANSFER_WEIGHTS
    }
    picture = arguments.workdir / "figure1.png"
    draw(teacher, teacher_run, results).savefig(picture, dpi=200)
    columns = ("method", "test error %", "agreement after initialising %", "at the end %")
    table = cli.make_table(columns, left=len(columns))
    for method, runs in results.items():
        table.add_row(method, *(mean_and_std(shares(runs, key)) for key in _MEASURES))
    cli.print_table(console, table)
    console.print(
        f"teacher: {percent(teacher_run.record['result']['test_error'])} % error; "
        f"seeds: {json.dumps(arguments.seeds)}"
    )
    seconds = time.perf_counter() - began
    console.print(f"picture: {picture}   total: {seconds:.0f} s", soft_wrap=True)


def train_teacher() -> tuple[Network, Result]:
    """Trains the teacher on points and labels."""
    result = distill(
        network(TEACHER),
        None,
        spiral(POINTS["teacher"], 0),
        test=spiral(POINTS["test"], 3),
        method="cross-entropy",
        protocol="official",
        epochs=(0, TEACHER_EPOCHS),
        evaluate_every=TEACHER_EPOCHS,
        seeds=TEACHER_SEED,
        resources=_RESOURCES,
    )
    return Network(network(TEACHER), result.variables), result


def train_student(teacher: Network, method: str, seed: int) -> Result:
    """Trains a student by one of the methods in `TRANSFER_WEIGHTS`."""
    return distill(
        network(STUDENT),
        teacher,
        spiral(POINTS["student"], 2),
        test=spiral(POINTS["test"], 3),
        method=method,
        protocol="official",
        epochs=EPOCHS,
        batch_size=64,
        evaluate_every=sum(EPOCHS),
        seeds=seed,
        resources=_RESOURCES,
        transfer_weight=TRANSFER_WEIGHTS[method],
    )


# On CPUs dense layers are as fast inside a loop, so one dispatch makes many steps.
_RESOURCES = Resources(devices=1, steps_per_dispatch=100)
_MEASURES = ("test_error", "initialise_agreement", "agreement")


def shares(runs: list[Result], key: str) -> list[float]:
    """One number for each run, from the result in its record."""
    values = [run.record["result"][key] for run in runs]
    return [value["layer1"] if isinstance(value, dict) else value for value in values]


def draw(teacher: Network, teacher_run: Result, results: dict[str, list[Result]]) -> Figure:
    """Draws the figure: the first seed's students, and the numbers of all seeds."""
    if not all(results.values()):
        raise InputError("there is no student to draw")
    line = np.linspace(-_SQUARE, _SQUARE, _GRID, dtype=np.float32)
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 1, 1, 2)
    teacher_grid = _on_grid(teacher, grid)
    seeds = len(next(iter(results.values())))
    with plt.rc_context(STYLE | {"font.size": 8.5, "axes.grid": False, "axes.titlesize": 9}):
        figure, axes = plt.subplots(2, 3, figsize=(7.2, 7.0),
                                    layout=ConstrainedLayoutEngine(hspace=0.05),
                                    sharex=True, sharey=True)  # fmt: skip
        _regions(axes[0, 0], line, teacher_grid, teacher_grid["taps"])
        error = percent(teacher_run.record["result"]["test_error"], 1)
        axes[0, 0].set_title(f"teacher\nerror {error} %")
        strength = np.square(np.maximum(teacher_grid["taps"], 0)).sum(axis=-1)
        axes[1, 0].set_title("how strongly\nthe teacher responds")
        _map(axes[1, 0], line, strength, "Σ σ(T)², no unit", cmap="cividis")
        for column, (method, runs) in enumerate(results.items(), start=1):
            model = Network(network(STUDENT), runs[0].variables)
            student_grid = _on_grid(model, grid)
            _regions(axes[0, column], line, student_grid, teacher_grid["taps"])
            axes[0, column].set_title(
                f"student: {method}\nerror {mean_and_std(shares(runs, 'test_error'), 1)} %"
            )
            disagreement = 100 * (student_grid["fires"] != teacher_grid["fires"]).mean(axis=-1)
            agreement = mean_and_std(shares(runs, "agreement"), 1)
            axes[1, column].set_title(f"where student and teacher differ\nagreement {agreement} %")
            _map(axes[1, column], line, disagreement, "neurons, %", cmap="Greys", vmin=0, vmax=50)
        for axis in axes.flat:
            axis.set(aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
            axis.set(xlabel="x₁", ylabel="x₂")
            axis.label_outer()
        handles = [
            Line2D([], [], color="black", linewidth=1.1),
            Line2D([], [], color=COLOURS[5], linewidth=1.1, linestyle="--"),
        ]
        figure.legend(handles, ["its own activation boundaries", "the teacher's"],
                      loc="outside lower center", ncols=2)  # fmt: skip
        figure.suptitle(
            f"{TEACHER[1]} neurons' activation boundaries and two classes' regions "
            f"(drawn: the first of {seeds} seeds; mean ± std of all)\n",
            fontsize=9,
        )
    return figure


def _on_grid(model: Network, grid: np.ndarray) -> dict[str, np.ndarray]:
    """Classes, pre-activations and which neurons fire, at the grid's points."""
    forward = run_model(model.model, model.variables, jnp.asarray(grid), train=False)
    return {
        "class": np.asarray(forward.logits.argmax(axis=-1)).reshape(_GRID, _GRID),
        "taps": np.asarray(forward.taps["layer1"]).reshape(_GRID, _GRID, -1),
        "fires": np.asarray(activation_indicator(forward.taps["layer1"])).reshape(_GRID, _GRID, -1),
    }


def _regions(axis: Axes, line: np.ndarray, own: dict[str, np.ndarray], teacher: np.ndarray) -> None:
    """Draws the regions of both classes, a network's boundaries, and the teacher's."""
    colours = ListedColormap(["#cfe4f3", "#fbeccb"])
    axis.pcolormesh(line, line, own["class"], cmap=colours, vmin=0, vmax=1, rasterized=True)
    lines = [(teacher, COLOURS[5], "--")]
    if own["taps"] is not teacher:
        lines.append((own["taps"], "black", "-"))
    for taps, colour, style in lines:
        for neuron in range(taps.shape[-1]):
            axis.contour(line, line, taps[..., neuron], levels=[0.0], colors=colour,
                         linewidths=0.9, linestyles=style)  # fmt: skip


def _map(axis: Axes, line: np.ndarray, values: np.ndarray, unit: str, **colours: Any) -> None:
    shown = axis.pcolormesh(line, line, values, rasterized=True, **colours)
    plt.colorbar(shown, ax=axis, label=unit, location="bottom", shrink=0.9, aspect=25)


if __name__ == "__main__":
    cli.main(main)
