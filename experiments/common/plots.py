"""Draws pictures that are legible at the width of a page and by the colour-blind."""

import dataclasses
import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from abflax.storage.files import write_whole

# Okabe and Ito's palette, and a marker each, so that colour is never the only difference.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "osD^vPX"
_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)
STYLE: dict[Any, Any] = {  # to matplotlib's stubs a key is one of the names of all its settings
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
Records = Mapping[str, Sequence[Mapping[str, Any]]]


def curves(records: Records, path: Path, title: str) -> None:
    """Draws test error, and the agreement of each layer, against epochs: one line a method.

    `records` has the records of each method, one a seed.
    """
    layers = sorted(
        {name for runs in records.values() for name in runs[0]["history"][-1]["agreement"]}
    )
    panels = 1 + len(layers)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, panels, figsize=(3.1 * panels, 3.4), layout="constrained", squeeze=False
        )
        error, *agreement = axes[0]
        styles = _styles(records)
        _error_panel(error, records, styles, 0.5)
        error.set(title="test error", ylabel="held-out examples wrong, %")
        for axis, layer in zip(agreement, layers, strict=True):
            _panel(axis, records, _agreement(layer), styles)
            axis.axhline(50, color="0.5", linewidth=0.8, linestyle=":")
            axis.set(title=f"agreement, {layer}", ylim=(45, 100))
        _shade_initialise(error, records, "initialise:\nclassifier\nuntrained", "bottom")
        for axis in agreement:
            _shade_initialise(axis, records)
        if agreement:
            agreement[0].set_ylabel("neurons that fire alike, %")
        handles, labels = error.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(records))
        figure.suptitle(title, fontsize=11)
        save(figure, path, 150)


def contact_sheet(
    images: np.ndarray, labels: np.ndarray, pixels: tuple[float, float], path: Path
) -> None:
    """Draws images as a table of one row a class, at most twenty of each, as PNG."""
    rows = [np.flatnonzero(labels == label)[:20] for label in np.unique(labels)]
    height, width, channels = images.shape[1:]
    gap, scale = 1, max(1, 48 // height)
    sheet = np.full(
        (len(rows) * (height + gap), max(map(len, rows)) * (width + gap), channels), pixels[1]
    )
    for row, chosen in enumerate(rows):
        for column, index in enumerate(chosen):
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = images[index]
    sheet = np.clip((sheet - pixels[0]) / (pixels[1] - pixels[0]), 0, 1)
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    buffer = io.BytesIO()
    plt.imsave(buffer, sheet if channels == 3 else sheet[..., 0], cmap="gray", format="png")
    write_whole(path, buffer.getvalue())


def _agreement(layer: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda entry: entry["agreement"].get(layer)


def learning_curves(
    panels: Mapping[str, Records], names: Sequence[str], path: Path, title: str
) -> None:
    """Draws test error against epochs: a panel for each group of records, one line a method.

    `names` has all methods, drawn or not: colour and marker follow from their order.
    """
    styles = _styles(names)
    used = {name: styles[name] for name in names if any(name in runs for runs in panels.values())}
    with _figure(len(panels), min(len(panels), 3), path, title, used) as axes:
        for axis, (name, records) in zip(axes, panels.items(), strict=True):
            _error_panel(axis, records, styles, 0.7)
            axis.set(title=name, ylabel="test error, %")
            _shade_initialise(axis, records)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Numbers over a few places, in percent.

    Attributes:
      places: (label, coordinate; None: the axis is of names), in order.
      series: name -> one (mean, standard deviation or None) for each place; None: there is none.
    """

    title: str
    ylabel: str
    xlabel: str
    places: Sequence[tuple[str, float | None]]
    series: Mapping[str, Sequence[tuple[float, float | None] | None]]


def points(panels: Sequence[Panel], names: Sequence[str], path: Path, title: str) -> None:
    """Draws means with error bars over a table's other axis.

    Numeric places are joined by lines over a logarithmic axis. At named places the series are
    drawn side by side. Panels with the same measure have the same range of the y axis. Colour and
    marker follow from the order of `names`, which has all series, whether drawn or not.
    """
    all_styles = _styles(names)
    styles = {name: all_styles[name] for panel in panels for name in panel.series}
    with _figure(len(panels), min(len(panels), 2), path, title, styles) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            _series(axis, panel, styles)
        for measure in {panel.ylabel for panel in panels}:
            same = [axis for axis in axes if axis.get_ylabel() == measure]
            low = min(axis.get_ylim()[0] for axis in same)
            high = max(axis.get_ylim()[1] for axis in same)
            for axis in same:
                axis.set_ylim(low - 0.03 * (high - low), high)


def rows(
    values: Mapping[str, Sequence[tuple[float, float | None] | None]],
    sources: Sequence[str],
    path: Path,
    title: str,
    measure: str,
) -> None:
    """Draws the numbers of a single column: a row for each name, a marker for each source.

    `values` has (mean, standard deviation or None) of each source, or None; names without any
    number are left out. A number without deviation is hollow.
    """
    drawn = {name: found for name, found in values.items() if any(found)}
    with plt.rc_context(STYLE):
        size = (6.0, 0.3 * len(drawn) + 1.5)
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        for index, source in enumerate(sources):
            colour, marker = COLOURS[index], MARKERS[index]
            for row, found in enumerate(drawn.values()):
                if (number := found[index]) is not None:
                    axis.errorbar(
                        number[0], row, xerr=number[1], fmt=marker, color=colour, capsize=3,
                        mfc="white" if number[1] is None else colour, label=source,
                    )  # fmt: skip
        handles, labels = axis.get_legend_handles_labels()
        axis.set_yticks(range(len(drawn)), labels=list(drawn))
        axis.set_ylim(len(drawn) - 0.5, -0.5)
        axis.set(xlabel=measure)
        once = dict(zip(labels, handles, strict=True))
        if len(once) > 1:
            figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=len(once))
        figure.suptitle(title, fontsize=11)
        save(figure, path, 120)


def _series(axis: Axes, panel: Panel, styles: Mapping[str, tuple[str, str]]) -> None:
    """Draws the series of one panel, side by side where the places are names."""
    numbers = [place for _, place in panel.places if place is not None]
    numeric = len(numbers) == len(panel.places)
    for index, (name, values) in enumerate(panel.series.items()):
        colour, marker = styles[name]
        beside = 0.0 if numeric else 0.7 * ((index + 0.5) / len(panel.series) - 0.5)
        drawn = [
            (place if numeric else position + beside, *value)
            for position, ((_, place), value) in enumerate(zip(panel.places, values, strict=True))
            if value is not None
        ]
        if drawn:
            x, mean, spread = zip(*drawn, strict=True)
            bars = [np.nan if deviation is None else deviation for deviation in spread]
            line = "-" if numeric else "none"
            axis.errorbar(x, mean, bars, color=colour, capsize=3, linewidth=1.2, linestyle=line)
            for single in (False, True):  # hollow where there is no deviation
                chosen = [deviation is None for deviation in spread] == np.full(len(x), single)
                fill = "white" if single else colour
                axis.plot(
                    *np.array([x, mean])[:, chosen], marker, color=colour, markersize=6, mfc=fill
                )
    labels = [label for label, _ in panel.places]
    if numeric:
        axis.set_xscale("log")
        axis.set_xlim(min(numbers) / 1.2, max(numbers) * 1.2)
        axis.set_xticks(numbers, labels=labels)
        axis.minorticks_off()
    else:
        axis.set_xticks(range(len(labels)), labels=[_folded(label) for label in labels])
        axis.set_xlim(-0.5, len(labels) - 0.5)
        axis.grid(visible=False, axis="x")
    axis.tick_params(axis="x", labelsize=8)
    axis.set(title=panel.title, ylabel=panel.ylabel, xlabel=panel.xlabel)


def _folded(label: str) -> str:
    return "\n".join(textwrap.fill(part, 11) for part in label.split(": "))


@contextmanager
def _figure(
    panels: int, columns: int, path: Path, title: str, styles: Mapping[str, tuple[str, str]]
) -> Iterator[list[Axes]]:
    """Gives the axes of a figure with one legend; saves it at the end of the context."""
    rows = -(-panels // columns)
    with plt.rc_context(STYLE):
        size = (max(3.9 * columns, 6.0), 3.5 * rows + 0.4)
        figure, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        flat = list(axes.flat)
        for unused in flat[panels:]:
            unused.set_axis_off()
        yield flat[:panels]
        handles = [
            Line2D([], [], color=colour, marker=marker, markersize=5, linestyle="none", label=name)
            for name, (colour, marker) in styles.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(styles), 4))
        figure.suptitle(title, fontsize=11)
        save(figure, path, 120)


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Writes the PNG, whole, and closes the figure."""
    content = io.BytesIO()
    # No version of matplotlib in the file: the same numbers are the same bytes.
    figure.savefig(content, dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    write_whole(path, content.getvalue())


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    count = len(COLOURS)  # there are as many markers
    return {
        name: (COLOURS[index % count], MARKERS[(index + index // count) % count])
        for index, name in enumerate(names)
    }


def _error_panel(
    axis: Axes, records: Records, styles: Mapping[str, tuple[str, str]], room: float
) -> None:
    """Draws test error on a logarithmic axis, from `room` times the smallest mean upward."""
    _panel(axis, records, lambda entry: entry["test_error"], styles)
    means = [np.mean([run["result"]["test_error"] for run in runs]) for runs in records.values()]
    axis.set_yscale("log")
    axis.set_yticks(_TICKS, labels=[f"{tick:g}" for tick in _TICKS])
    axis.minorticks_off()
    axis.set_ylim(room * (100 * float(min(means))), 110)


def _shade_initialise(
    axis: Axes,
    records: Records,
    text: str = "initialise",
    place: Literal["top", "bottom"] = "top",
) -> None:
    """Shades the epochs in which two-stage methods use no labels and no logits."""
    ends = [
        entry["epoch"]
        for runs in records.values()
        for entry in runs[0]["history"]
        if entry["phase"] == "initialise"
    ]
    if ends:
        axis.axvspan(0, max(ends), color="0.92", zorder=0, linewidth=0)
        y, transform = 1.0 if place == "top" else 0.02, axis.get_xaxis_transform()
        axis.text(0.4, y, text, transform=transform, fontsize=8, color="0.35", va=place)
    axis.set_xlim(left=0)


def _panel(
    axis: Axes,
    records: Records,
    value: Callable[[Mapping[str, Any]], float | None],
    styles: Mapping[str, tuple[str, str]],
) -> None:
    """Draws one line a method, with a band of one standard deviation."""
    for method, runs in records.items():
        table = [[(entry["epoch"], value(entry)) for entry in run["history"]] for run in runs]
        epochs = np.array([epoch for epoch, share in table[0] if share is not None])
        values = 100 * np.array([[share for _, share in row if share is not None] for row in table])
        if not epochs.size:
            continue
        mean = values.mean(axis=0)
        colour, marker = styles[method]
        every = -(-len(epochs) // 20)
        axis.plot(
            epochs, mean, "-" + marker, color=colour, markersize=3.5, label=method, markevery=every
        )
        if len(runs) > 1:
            spread = values.std(axis=0, ddof=1)
            low, high = np.maximum(mean - spread, 0.05), mean + spread
            axis.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_xlabel("epochs")
