"""Pictures: legible at the width of a page, safe for the colour-blind, deviations shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
from matplotlib.axes import Axes  # noqa: E402

# Okabe and Ito's palette, and a marker each, so that colour is never the only difference.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "osD^vPX"
_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
Records = Mapping[str, Sequence[Mapping[str, Any]]]


def curves(records: Records, path: Path, title: str) -> None:
    """Test error, and the agreement of each layer, against epochs: one line a method.

    Args:
      records: method -> its records, one a seed.
      path: of the PNG.
      title: above the panels.
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
        _panel(error, records, lambda entry: entry["test_error"])
        error.set(title="test error", ylabel="held-out examples wrong, %", yscale="log")
        error.set_yticks(_TICKS, labels=[f"{tick:g}" for tick in _TICKS])
        error.minorticks_off()
        error.set_ylim(0.5 * min(_means(records)), 110)
        for axis, layer in zip(agreement, layers, strict=True):
            _panel(axis, records, lambda entry, layer=layer: entry["agreement"].get(layer))
            axis.axhline(50, color="0.5", linewidth=0.8, linestyle=":")
            axis.set(title=f"agreement, {layer}", ylim=(45, 100))
        for axis in axes[0]:
            _shade_initialise(axis, records)
        if agreement:
            agreement[0].set_ylabel("neurons that fire alike, %")
        figure.legend(
            *error.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(records),
        )
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _means(records: Records) -> list[float]:
    """The mean test error of each method at the end, in percent."""
    return [
        100 * float(np.mean([run["result"]["test_error"] for run in runs]))
        for runs in records.values()
    ]


def _shade_initialise(axis: Axes, records: Records) -> None:
    """Shades the epochs in which a two-stage method sees no label and no logit."""
    ends = [
        entry["epoch"]
        for runs in records.values()
        for entry in runs[0]["history"]
        if entry["phase"] == "initialise"
    ]
    if ends:
        axis.axvspan(0, max(ends), color="0.92", zorder=0, linewidth=0)
        axis.text(0.4, 1.0, "initialise", transform=axis.get_xaxis_transform(), fontsize=8,
                  color="0.35", va="top")  # fmt: skip
    axis.set_xlim(left=0)


def _panel(
    axis: Axes, records: Records, value: Callable[[Mapping[str, Any]], float | None]
) -> None:
    """One line a method, with a band of one standard deviation."""
    for index, (method, runs) in enumerate(records.items()):
        table = [[(entry["epoch"], value(entry)) for entry in run["history"]] for run in runs]
        epochs = np.array([epoch for epoch, found in table[0] if found is not None])
        values = 100 * np.array([[f for _, f in row if f is not None] for row in table])
        if not epochs.size:
            continue
        mean = values.mean(axis=0)
        colour, marker = COLOURS[index % 7], MARKERS[index % 7]
        axis.plot(epochs, mean, color=colour, marker=marker, markersize=3.5, label=method)
        if len(runs) > 1:
            spread = values.std(axis=0, ddof=1)
            axis.fill_between(
                epochs, np.maximum(mean - spread, 0.05), mean + spread, color=colour, alpha=0.2,
                linewidth=0,
            )  # fmt: skip
    axis.set_xlabel("epochs")
