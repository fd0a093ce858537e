"""Draws what `experiments.analyse` measures."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abflax.analysis import dead_neurons
from experiments.analysis.report import Findings
from experiments.common.plots import COLOURS, MARKERS, STYLE

_WIDTH = 7.2  # inches: the width of a page's text, so that nothing shrinks
_TEACHER = "0.35"
_LINES = ("-", "--", ":", "-.")
_SMALL: dict[str, Any] = {"ha": "right", "fontsize": 7.5}


def draw(findings: Findings, summary: dict[str, Any], directory: Path) -> list[Path]:
    """Draws all pictures there are numbers for, and returns the PNGs' paths."""
    pictures = {"firing.png": _firing}
    if "groups" in summary:
        pictures |= {"agreement.png": _agreement, "error.png": _error}
    if findings.distances[0]:
        pictures["distance.png"] = _distance
    paths = []
    for name, picture in pictures.items():
        with plt.rc_context(STYLE | {"font.size": 9}):
            figure = picture(findings, summary)
            figure.savefig(directory / name, dpi=200)
            plt.close(figure)
        paths.append(directory / name)
    return paths


def _figure(panels: int, height: float = 2.9, **options: Any) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1, panels, figsize=(_WIDTH, height), layout="constrained", squeeze=False, **options
    )
    return figure, list(axes[0])


def _legend(figure: Figure, axis: Axes, columns: int, title: str | None = None) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=columns)


def _seeds(summary: dict[str, Any]) -> str:
    count = len(summary["networks"])
    return f" (mean ± std of {count} networks)" if count > 1 else ""


def _spread(values: np.ndarray) -> np.ndarray:
    """The standard deviation over the networks; zero for one network."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def _agreement(findings: Findings, summary: dict[str, Any]) -> Figure:
    """Draws agreement by channel, in order of agreement, and by class."""
    figure, (channels, classes) = _figure(2, 3.4)
    matches = [each.match for each in findings.examinations]
    for index, layer in enumerate(matches[0]):
        colour, marker = COLOURS[index % 7], MARKERS[index % 7]
        sorted_ = 100 * np.array([np.sort(each[layer].by_channel) for each in matches])
        mean, spread = sorted_.mean(axis=0), _spread(sorted_)
        rank = 100 * (np.arange(len(mean)) + 0.5) / len(mean)
        label = f"{layer} ({len(mean)})"
        channels.plot(rank, mean, color=colour, linestyle=_LINES[index % 4], label=label)
        channels.fill_between(
            rank, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0
        )
        shares = 100 * np.array([each[layer].by_class for each in matches])
        at = np.arange(shares.shape[1])
        beside = 0.18 * (index - (len(matches[0]) - 1) / 2)
        mean, spread = shares.mean(axis=0), _spread(shares)
        classes.errorbar(
            at + beside, mean, spread, color=colour, fmt=marker, markersize=4, capsize=2
        )
        overall = 100 * float(np.mean([each[layer].agreement for each in matches]))
        classes.axhline(overall, color=colour, linewidth=0.8, linestyle=_LINES[index % 4])
    channels.axhline(50, color="0.5", linewidth=0.8, linestyle=(0, (1, 3)))
    channels.text(99, 50.3, "two coins", color="0.35", **_SMALL)
    channels.set(
        title="by channel",
        xlabel="channels in order of agreement, %",
        ylabel="neurons that fire alike, %",
        xlim=(0, 100),
    )
    _legend(figure, channels, len(matches[0]), "layer (channels)")
    classes.set(title="by class; lines: all images", xlabel="class", ylabel="")
    if shares.shape[1] <= 20:
        classes.set_xticks(at)
    figure.suptitle(f"Agreement with the teacher on held-out images{_seeds(summary)}", fontsize=10)
    return figure


def _error(findings: Findings, summary: dict[str, Any]) -> Figure:
    """Draws the error of student and teacher in groups of images of rising agreement."""
    figure, (axis,) = _figure(1, 3.2)
    groups = summary["groups"]
    lines = (
        ("error", "student's error", COLOURS[0], "o-"),
        ("differs_from_teacher", "student answers other than teacher", COLOURS[1], "^--"),
        ("teacher_error", "teacher's error", _TEACHER, "s:"),
    )
    x = 100 * np.mean([each["agreement"] for each in groups], axis=0)
    counts = np.array(groups[0]["examples"])
    for key, label, colour, style in lines:
        shares = np.array([each[key] for each in groups])
        mean = shares.mean(axis=0)
        bars = _spread(shares) if len(groups) > 1 else np.sqrt(mean * (1 - mean) / counts)
        axis.errorbar(
            x, 100 * mean, 100 * bars, color=colour, fmt=style, markersize=5, capsize=3, label=label
        )
    bars = "std over networks" if len(groups) > 1 else "binomial standard error"
    axis.set(
        xlabel=f"neurons that fire as the teacher's, % (group means; {counts[0]:,} images each)",
        ylabel=f"held-out images, %\n(bars: {bars})",
        title="Error where the activation pattern matches, and where it does not",
        ylim=(0, None),
    )
    axis.legend()
    return figure


def _firing(findings: Findings, summary: dict[str, Any]) -> Figure:
    """Draws how often neurons fire, layer by layer; says how many never or always fire."""
    layers = list(summary["layers"])
    figure, axes = _figure(len(layers), 2.7, sharey=True)
    edges = np.linspace(0, 100, 21)
    teacher = findings.examinations[0].teacher
    for axis, layer in zip(axes, layers, strict=True):
        rates = [each.student.firing_rate[layer] for each in findings.examinations]
        shown = [("student" if teacher else "network", rates, COLOURS[0], "-")]
        if teacher and layer in teacher.firing_rate:
            shown.append(("teacher", [teacher.firing_rate[layer]], _TEACHER, "--"))
        for row, (label, several, colour, line) in enumerate(shown):
            heights = [np.histogram(100 * each, edges)[0] / each.size for each in several]
            mean, spread = 100 * np.mean(heights, axis=0), 100 * _spread(np.array(heights))
            axis.stairs(mean, edges, color=colour, linestyle=line, label=label, linewidth=1.4)
            if len(several) > 1:
                middle = (edges[1:] + edges[:-1]) / 2
                axis.errorbar(middle, mean, spread, color=colour, linestyle="none", linewidth=0.8)
            never, always = np.mean(
                [[m.mean() for m in dead_neurons(each)] for each in several], axis=0
            )
            note = f"never {100 * never:.1f} %, always {100 * always:.1f} %"
            place = (0.97, 0.97 - 0.09 * row)
            axis.text(*place, note, transform=axis.transAxes, va="top", color=colour, **_SMALL)
        axis.set(title=layer, xlabel="images on which\na neuron fires, %", xlim=(0, 100))
    axes[0].set_ylabel("neurons, % (bins of 5 %)")
    axes[0].set_ylim(0, 1.25 * axes[0].get_ylim()[1])
    if teacher:
        _legend(figure, axes[0], 2)
    title = f"How often neurons fire on {summary['examples']:,} held-out images{_seeds(summary)}"
    figure.suptitle(title, fontsize=10)
    return figure


def _distance(findings: Findings, summary: dict[str, Any]) -> Figure:
    """Draws the share of images whose nearest boundary is closer than a distance."""
    layers = list(summary["layers"])
    figure, axes = _figure(len(layers), 2.7, sharey=True)
    for axis, layer in zip(axes, layers, strict=True):
        shown = [
            ("student" if summary["teacher"] else "network", each[layer], COLOURS[0], "-")
            for each in findings.distances
        ]
        if layer in findings.teacher_distances:
            shown.append(("teacher", findings.teacher_distances[layer], _TEACHER, "--"))
        for index, (label, distances, colour, line) in enumerate(shown):
            again = index and label == shown[index - 1][0]  # a line a network, one legend entry
            name = None if again else label
            nearest = np.sort(distances.min(axis=1))
            share = 100 * (np.arange(len(nearest)) + 1) / len(nearest)
            axis.step(nearest, share, where="post", color=colour, linestyle=line, label=name)
        axis.set(title=layer, xscale="log", xlabel="distance, pixel values", ylim=(0, 100))
    axes[0].set_ylabel("images, %")
    neurons = summary["layers"][layers[0]]["distance"][0]["neurons"]
    if summary["teacher"]:
        _legend(figure, axes[0], 2)
    figure.suptitle(
        f"Distance to the nearest of {neurons} neurons' boundaries, to first order", fontsize=10
    )
    return figure
