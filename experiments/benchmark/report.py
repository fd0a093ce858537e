"""Measurements as tables, and experiments/BENCH.md from those that are published."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.paper_tables.records import short

PUBLISHED = Path(__file__).parent.parent / "records" / "bench"
Found = dict[str, Any]

_TITLES = {
    "steps": "What a run is made of",
    "parts": "Where an initialise step goes: the teacher; the student's parts on its targets, each "
    "with the forward pass; all of it with augmentation and optimiser",
    "methods": "One step of every method, each phase in turn with a step of cross-entropy",
    "seeds": "Initialise steps of several students in one program, in turn with that of one",
    "epochs": "A run of one initialise epoch, its compilation included; measured once",
    "cache": "Memory of kept targets, initialise phase; measured once",
    "precision": "The effect of half precision: the quickstart's digits, activation boundaries, "
    "protocol `official`, 5 seeds",
    "nst": "NST at [32, 8, 8, 256], value and gradient",
    "depthwise": "MobileNets, 8 images of 112×112, a step of cross-entropy: depthwise convolutions "
    "as they are here, in turn with XLA's own",
    "whole": "A whole run, its compilation and evaluation included",
}


def page(all_found: Sequence[Found]) -> str:
    """The whole of BENCH.md."""
    parts = [
        "# Benchmark\n",
        "Rebuilt by `python -m experiments.bench --publish`: the engine's own programs on made-up "
        "images, protocol `paper` unless a section says otherwise. Milliseconds are medians (and "
        "the range); a ratio is the median over pairs that ran in turn, above 1 where this code is "
        "faster. Steps here crop, flip and normalise their images; PyTorch's lie there normalised. "
        "FLOP: a multiply-add is two, counted by XLA on the program as written.\n",
    ]
    for found in all_found:
        setting, made = found["setting"], found["environment"]
        versions = ", ".join(f"{k} {made[k]}" for k in ("jax", "jaxlib", "flax", "optax"))
        # A whole run is measured once.
        repeated = f"; {setting['repetitions']} repetitions" * (set(found["sections"]) != {"whole"})
        parts.append(
            f"## {made['device']}: {setting['teacher']} → {setting['student']}, batch "
            f"{setting['batch']}, {setting['precision']}\n\n"
            f"{made['devices']} × {made['device']}; Python {made['python']}, {versions}; PyTorch "
            f"{made['torch'] or 'not there'}; commit {short(made['commit'])}{repeated}. A "
            f"large matrix product reaches "
            f"{found['peak_flops'] / 1e9:,.0f} GFLOP/s a device.\n"
        )
        parts += [section(name, found) for name in found["sections"]]
    return "\n".join(parts)


def section(name: str, found: Found) -> str:
    """One section as Markdown: a title and a table of the columns that have something to say."""
    rows = found["sections"][name]
    columns = {
        title: show
        for title, (key, show) in _COLUMNS.items()
        if any(row.get(key) is not None for row in rows)
    }
    lines = [
        " | ".join(["", "work", *columns, ""]).strip(),
        " | ".join(["", "---", *("---:" for _ in columns), ""]).strip(),
    ]
    for row in rows:
        cells = [show(row, found) for show in columns.values()]
        lines.append(" | ".join(["", row["name"], *cells, ""]).strip())
    text = f"### {_TITLES[name]}\n\n" + "\n".join(lines) + "\n"
    return text + (f"\n{_SUMMARIES[name](rows)}\n" if name in _SUMMARIES else "")


def _epochs(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the times of several students are in seconds an epoch."""
    times = [
        f"{50_000 / row['images_per_second']:,.0f} s ({row['name']})"
        for row in rows
        if "images_per_second" in row
    ]
    return f"So an epoch of 50,000 images takes {', '.join(times)}."


def _shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where a step goes, in percent of it: what each measurement of `parts` adds."""
    times = {row["name"]: statistics.median(row["seconds"]) for row in rows}
    whole, teacher, forward = (times[n] for n in ("whole step", "teacher", "student forward"))
    plain = times["forward and backward, of the taps' squares"]
    student = times["forward and backward, of the loss"]
    parts = {
        "the teacher": teacher,
        "the student's forward pass": forward,
        "its backward pass": plain - forward,
        "connectors and hinge": student - plain,
        "augmentation, optimiser and what the parts cost less alone": whole - teacher - student,
    }
    shares = ", ".join(f"{name} {100 * part / whole:.0f} %" for name, part in parts.items())
    return f"By their medians, of a whole step: {shares}."


def _milliseconds(key: str) -> Callable[[dict[str, Any], Found], str]:
    def show(row: dict[str, Any], found: Found) -> str:
        del found
        if not row.get(key):
            return "–"
        times = [1000 * each for each in row[key]]
        return f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"

    return show


def _number(key: str, scale: float, digits: int) -> Callable[[dict[str, Any], Found], str]:
    def show(row: dict[str, Any], found: Found) -> str:
        del found
        return "–" if row.get(key) is None else f"{row[key] * scale:,.{digits}f}"

    return show


def _text(key: str) -> Callable[[dict[str, Any], Found], str]:
    return lambda row, found: row.get(key, "–")


def _share(row: dict[str, Any], found: Found) -> str:
    if row.get("flops_per_second") is None:
        return "–"
    peak = found["peak_flops"] * row.get("devices", 1)
    return f"{100 * row['flops_per_second'] / peak:.0f}"


_COLUMNS: Mapping[str, tuple[str, Callable[[dict[str, Any], Found], str]]] = {
    "ms": ("seconds", _milliseconds("seconds")),
    "PyTorch, ms": ("torch_seconds", _milliseconds("torch_seconds")),
    "ratio": ("ratio", _number("ratio", 1, 2)),
    "lax.conv, ms": ("convolved_seconds", _milliseconds("convolved_seconds")),
    "times as fast": ("times_convolved", _number("times_convolved", 1, 1)),
    "time, × cross-entropy": ("times_cross_entropy", _number("times_cross_entropy", 1, 2)),
    "time, × one student": ("times_one", _number("times_one", 1, 2)),
    "of it, each": ("share_each", _number("share_each", 1, 2)),
    "s": ("epoch_seconds", _number("epoch_seconds", 1, 1)),
    "s in all": ("whole_seconds", _number("whole_seconds", 1, 0)),
    "test error %": ("test_error", _text("test_error")),
    "agreement %": ("agreement", _text("agreement")),
    "images/s": ("images_per_second", _number("images_per_second", 1, 0)),
    "GFLOP a step": ("flops", _number("flops", 1e-9, 1)),
    "GFLOP/s": ("flops_per_second", _number("flops_per_second", 1e-9, 0)),
    "% of matrix product": ("flops_per_second", _share),
    "MB held": ("bytes", _number("bytes", 1e-6, 0)),
    "lax.conv, MB held": ("convolved_bytes", _number("convolved_bytes", 1e-6, 0)),
    "s to compile": ("compile_seconds", _number("compile_seconds", 1, 1)),
}

_SUMMARIES: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "parts": _shares,
    "seeds": _epochs,
}
