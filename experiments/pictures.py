"""Draw what the pages show: how firing patterns converge, how they relate to error, two losses.

`firing.gif`: a student learns a tenth of scikit-learn's digits by activation boundaries, as in the
quickstart. Each frame is one epoch of its first phase: which neurons of one layer fire on a
held-out digit, in the teacher and in the student, and where the two differ. `agreement.png`: the
test error of every committed record over the agreement that its first phase ended with.
`losses.png`: what one neuron pays under l2 on activations, and under activation boundaries.

About two minutes on two CPU cores; the teacher and the student of the quickstart are used if the
workdir has them.

Examples:
  python -m experiments.pictures
  python -m experiments.pictures --layer layer2 --digit 7 --workdir /tmp/abflax
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from rich.console import Console

from abflax import Dataset, Network, Resources, load
from abflax.losses import activation_indicator, activation_transfer_hinge, feature_difference
from abflax.metrics import activation_agreement
from abflax.models import MODELS
from abflax.taps import run_model
from abflax.training.record import require_writable
from abflax.weights import read_variables
from experiments import quickstart
from experiments.common import cli, plots
from experiments.paper_tables.records import RECORDS

_CHANNELS = 16  # in a square
_STILL = 8  # frames for which the last one stays
_FIRES = ListedColormap(["#F4F4F4", plots.COLOURS[0]])
_DIFFERS = ListedColormap(["#F4F4F4", plots.COLOURS[5]])


@dataclasses.dataclass(frozen=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      layer: the tap that is drawn.
      digit: the class of the held-out image.
    """

    layer: str = "layer1"
    digit: int = 3


def main(console: Console) -> None:
    """Trains what is missing and draws all pictures."""
    arguments = cli.parse(Arguments, "experiments.pictures", __doc__)
    require_writable(arguments.workdir)
    cli.cache_compilation(arguments.workdir)
    train, test = load("digits", "train"), load("digits", "test")
    reporter = cli.progress(arguments, console)
    common: dict[str, Any] = {
        "test": test, "protocol": "official", "workdir": arguments.workdir, "reporter": reporter,
    }  # fmt: skip
    with reporter.shown():
        teacher = quickstart.teach(train, **common).student
        first, _ = quickstart.EPOCHS
        students = quickstart.learn(
            "activation-boundary", teacher, train, seeds=0, epochs=(first, 1), evaluate_every=1,
            resources=Resources(keep_anchors=first + 1), **common,
        )  # fmt: skip
    assert students.directory is not None
    paths = sorted(
        students.directory.glob("anchors/*.safetensors"), key=lambda path: int(path.stem)
    )
    networks = [
        Network(MODELS[quickstart.STUDENT](), read_variables(path)) for path in paths[:first]
    ]
    firing, scatter, losses = (
        arguments.workdir / name for name in ("firing.gif", "agreement.png", "losses.png")
    )
    _save_frames([teacher, *networks], test, arguments, firing)
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    _draw_agreement(records, scatter)
    _draw_losses(losses)
    console.print(f"pictures: {firing}, {scatter}, {losses}", soft_wrap=True)


def _save_frames(
    networks: Sequence[Network], test: Dataset, arguments: Arguments, path: Any
) -> None:
    """Writes one frame for each student, the first network being the teacher."""
    one = int(np.flatnonzero(np.asarray(test.labels) == arguments.digit)[0])
    pixels = np.asarray(test.images, np.float32)
    images = jnp.asarray((pixels - test.preprocessing.mean) / test.preprocessing.std)
    passes = (run_model(each.model, each.variables, images, train=False) for each in networks)
    taps = [each.taps[arguments.layer] for each in passes]
    maps = [_square(np.asarray(activation_indicator(tap[one]))) for tap in taps]
    agreement = [100 * float(activation_agreement(tap, taps[0]).mean()) for tap in taps]
    frames = [
        _frame(test.images[one], maps[0], maps[epoch], epoch, agreement[epoch])
        for epoch in range(1, len(networks))
    ]
    frames += frames[-1:] * _STILL
    palette = frames[0].quantize(32)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=350, loop=0, optimize=True
    )


def _square(fires: np.ndarray) -> np.ndarray:
    """The first channels of `[height, width, channels]` beside and below each other, with gaps."""
    height, width, channels = fires.shape
    side = int(np.sqrt(min(channels, _CHANNELS)))
    found = np.full((side * (height + 1) - 1, side * (width + 1) - 1), np.nan)
    for channel in range(side * side):
        top, left = channel // side * (height + 1), channel % side * (width + 1)
        found[top : top + height, left : left + width] = fires[:, :, channel]
    return found


def _frame(
    image: np.ndarray, teacher: np.ndarray, student: np.ndarray, epoch: int, agreement: float
) -> Image.Image:
    """Draws the image, the neurons that fire in teacher and student, and those that differ."""
    with plt.rc_context(plots.STYLE | {"axes.grid": False}):
        layout = ConstrainedLayoutEngine(wspace=0.06)
        figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.8), layout=layout)
        differs = np.where(np.isnan(teacher), np.nan, teacher != student)
        panels = (
            (image.squeeze(), "a held-out digit", "gray_r"),
            (teacher, "fires in the teacher", _FIRES),
            (student, "fires in the student", _FIRES),
            (differs, "where they differ", _DIFFERS),
        )
        for axis, (values, title, colours) in zip(axes, panels, strict=True):
            axis.imshow(values, cmap=colours, interpolation="nearest")
            axis.set(title=title, xticks=[], yticks=[])
            axis.axis("off")
        figure.suptitle(
            f"epoch {epoch:2d} of the first phase: {agreement:.1f} % of the layer's neurons agree, "
            "over all held-out digits"
        )
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
        plt.close(figure)
    return Image.fromarray(pixels)


def _draw_agreement(records: Sequence[dict[str, Any]], path: Any) -> None:
    """Draws test error over the mean agreement of the layers after the first phase."""
    found = defaultdict(list)
    for record in records:
        if layers := record["result"].get("initialise_agreement"):
            mean = 100 * float(np.mean(list(layers.values())))
            found[record["config"]["method"]].append((mean, 100 * record["result"]["test_error"]))
    names = sorted(found, key=lambda name: -len(found[name]))
    with plt.rc_context(plots.STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        for name, colour, marker in zip(names, plots.COLOURS, plots.MARKERS, strict=False):
            x, y = np.transpose(found[name])
            axis.plot(x, y, marker, color=colour, markersize=5, alpha=0.8, label=name)
        axis.axvline(50, color="0.5", linewidth=0.8, linestyle=":")
        axis.set(
            xlabel="neurons that fire as the teacher's do after the first phase, % (50: by chance)",
            ylabel="test error at the end, %",
        )
        axis.legend(loc="upper right", fontsize=8)
        plots.save(figure, path, 150)


def _draw_losses(path: Any) -> None:
    """Draws the loss of one neuron over the student's pre-activation, for two methods."""
    student = jnp.linspace(-2.5, 3.5, 241)
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(
            1, 2, figsize=(7.2, 3.0), layout="constrained", sharey=True, squeeze=False
        )
        strength, boundary = axes[0]
        for colour, response in zip(plots.COLOURS, (0.1, 1.0, 2.0), strict=False):
            loss = feature_difference(jax.nn.relu(student), jnp.full_like(student, response))
            strength.plot(student, loss, color=colour, label=f"teacher's response {response:g}")
        for colour, response in zip(plots.COLOURS[4:6], (1.0, -1.0), strict=True):
            loss = activation_transfer_hinge(student, jnp.full_like(student, response), margin=1.0)
            name = "teacher fires" if response > 0 else "teacher does not"
            boundary.plot(student, loss, color=colour, label=name)
        strength.set(title="l2: how strongly?", ylabel="loss of one neuron")
        boundary.set(title="activation boundaries: fires or not?")
        for axis in axes[0]:
            axis.axvline(0, color="0.5", linewidth=0.8, linestyle=":")
            axis.set(xlabel="the student's pre-activation", ylim=(0, 7))
        strength.legend(loc="upper center", fontsize=8)
        boundary.legend(loc="center right", fontsize=8)
        plots.save(figure, path, 120)


if __name__ == "__main__":
    cli.main(main)
