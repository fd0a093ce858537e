"""Measurements as tables, and experiments/BENCH.md from those that are published."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.compile_ahead import TARGETS
from experiments.paper_tables.records import short

PUBLISHED = Path(__file__).parent.parent / "records" / "bench"
COMPILED = PUBLISHED.with_name("compiled")
Measurements = dict[str, Any]

_TITLES = {
    "steps": "What a run is made of",
    "parts": "Where an initialise step goes: the teacher; the student's parts on its targets, each "
    "with the forward pass; all of it with augmentation and optimiser",
    "convolutions": "The convolutions of a step one by one: the teacher's forward, the student's "
    "with their gradients; times are of all that are alike",
    "methods": "One step of every method of one data set, each phase in turn with a step of "
    "cross-entropy",
    "seeds": "Initialise steps of several students in one program, in turn with that of one",
    "epochs": "A run of one initialise epoch, its compilation included; measured once",
    "cache": "Memory of cached targets, initialise phase; measured once",
    "precision": "The effect of half precision: the quickstart's digits, activation boundaries, "
    "protocol `official`, 5 seeds",
    "nst": "NST at [32, 8, 8, 256], value and gradient",
    "depthwise": "MobileNets, 8 images of 112×112, a step of cross-entropy: depthwise convolutions "
    "as they are here, in turn with XLA's own",
    "startup": "From the command to the first step and to the end: the quickstart with one seed, "
    "a teacher and three students; measured once",
    "whole": "A whole run, its compilation and evaluation included",
}


def page(published: Sequence[Measurements], compiled: Sequence[Measurements] = ()) -> str:
    """The whole of BENCH.md, from measurements and from what was compiled for other machines."""
    parts = [
        "# Benchmark\n",
        "Rebuilt by `python -m experiments.bench --publish`: the engine's own programs on made-up "
        "images, protocol `paper` unless a section says otherwise. Milliseconds are medians (and "
        "the range); a ratio is the median over pairs that ran in turn, above 1 where this code is "
        "faster. Steps here crop, flip and normalise their images; PyTorch's lie there normalised. "
        "FLOP: a multiply-add is two, counted by XLA on the program as written, the body of a loop "
        "once. Evaluation is of 1,000 images in batches of 250 a device. The columns after "
        "PyTorch's are the same program with `channels_last`, with `torch.compile`, with both, and "
        "with both in bfloat16 where "
        'the processor multiplies it (AMX). "To its best" is the ratio to the fastest of them, '
        "which may compute in bfloat16 while this code computes in float32.\n",
    ]
    for measurements in published:
        setting, host = measurements["setting"], measurements["environment"]
        versions = ", ".join(f"{k} {host[k]}" for k in ("jax", "jaxlib", "flax", "optax"))
        # A whole run is measured once.
        repeated = f"; {setting['repetitions']} repetitions" * (
            set(measurements["sections"]) != {"whole"}
        )
        parts.append(
            f"## {host['device']}: {setting['teacher']} → {setting['student']}, batch "
            f"{setting['batch']}, {setting['precision']}\n\n"
            f"{host['devices']} × {host['device']}; Python {host['python']}, {versions}; PyTorch "
            f"{host['torch'] or 'not there'}; commit {short(host['commit'])}{repeated}. A "
            f"large matrix product reaches "
            f"{measurements['peak_flops'] / 1e9:,.0f} GFLOP/s a device.\n"
        )
        parts += [section(name, measurements) for name in measurements["sections"]]
    if compiled:
        parts.append(
            "## Compiled, not run\n\n"
            "The programs of the paper's headline run (wrn22-4 → wrn16-2, batch 128, 100 steps a "
            "dispatch; evaluation in batches of 250 a device), compiled ahead of time on a CPU by "
            "`python -m experiments.bench --compile-for TARGET`. Nothing here was run. Memory, "
            "FLOP, bytes, kernels and collectives are of one device, the last four of one step. "
            "FLOP are counted on the program as written; bytes are XLA's estimate for the compiled "
            "one, where a gather reads its rows and not the whole table; what a TPU pads is left "
            "out. The roofline is the longer of FLOP at the data sheet's peak and bytes at its "
            "bandwidth, without the time to launch kernels. In float32 the peak is the one at "
            "which JAX multiplies by default: in TF32 on an H100, in bfloat16 on a TPU. Seconds to "
            "compile are the processor's, of all threads.\n"
        )
    parts += [compiled_section(target) for target in compiled]
    return "\n".join(parts)


def compiled_section(target: Measurements) -> str:
    """What one target's programs were compiled to, as Markdown."""
    name, made = target["target"], target["environment"]
    rows = [dict(row) for row in target["rows"]]
    for row in rows:
        if "failure" not in row:
            work = row["precision"], row["flops"], row["moved_bytes"]
            row["roofline_seconds"] = TARGETS[name].roofline(*work)
    versions = f"jax {made['jax']}, jaxlib {made['jaxlib']}, commit {short(made['commit'])}"
    return f"### {name} ({versions})\n\n{_table('program', rows)}\n"


def section(name: str, measurements: Measurements) -> str:
    """One section as Markdown: a title and a table of the columns that have something to say."""
    rows = [dict(row) for row in measurements["sections"][name]]
    for row in rows:
        if row.get("flops_per_second") is not None:
            peak = measurements["peak_flops"] * row.get("devices", 1)
            row["percent_of_peak"] = 100 * row["flops_per_second"] / peak
    text = f"### {_TITLES[name]}\n\n{_table('work', rows)}\n"
    return text + (f"\n{_SUMMARIES[name](rows)}\n" if name in _SUMMARIES else "")


def _table(heading: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A row each, with the columns that have something to say."""
    columns = {
        title: (key, show)
        for title, (key, show) in _COLUMNS.items()
        if any(row.get(key) is not None for row in rows)
    }
    lines = [[heading, *columns], ["---", *("---:" for _ in columns)]]
    for row in rows:
        cells = ("–" if row.get(key) is None else show(row[key]) for key, show in columns.values())
        lines.append([row["name"], *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def _convolved(rows: Sequence[Mapping[str, Any]]) -> str:
    """What all convolutions of each network take together."""
    kinds = {
        "seconds": "here",
        "torch_channels_last": "in PyTorch with channels_last",
        "torch_bfloat16": "in bfloat16",
    }
    sums = []
    for role in ("teacher", "student"):
        own = [row for row in rows if row["role"] == role]
        times = {
            shown: 1000 * sum(statistics.median(row[kind]) for row in own)
            for kind, shown in kinds.items()
            if kind in own[0]
        }
        told = ", ".join(f"{time:.0f} ms {shown}" for shown, time in times.items())
        sums.append(f"the {role}'s convolutions take {told}")
    return f"In all, {'; '.join(sums)}."


def _milliseconds(seconds: Sequence[float]) -> str:
    times = [1000 * time for time in seconds]
    return f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"


def _number(digits: int, scale: float = 1) -> Callable[[float], str]:
    return lambda value: f"{value * scale:,.{digits}f}"


# title -> (key of a row, how its value is shown)
_COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "ms": ("seconds", _milliseconds),
    "PyTorch, ms": ("torch_seconds", _milliseconds),
    "channels_last, ms": ("torch_channels_last", _milliseconds),
    "compiled, ms": ("torch_compiled", _milliseconds),
    "both, ms": ("torch_compiled_channels_last", _milliseconds),
    "both, bfloat16, ms": ("torch_compiled_channels_last_bfloat16", _milliseconds),
    "bfloat16, ms": ("torch_bfloat16", _milliseconds),
    "ratio": ("ratio", _number(2)),
    "to its best": ("ratio_to_best", _number(2)),
    "lax.conv, ms": ("convolved_seconds", _milliseconds),
    "times as fast": ("times_convolved", _number(1)),
    "time, × cross-entropy": ("times_cross_entropy", _number(2)),
    "time, × one student": ("times_one", _number(2)),
    "of it, each": ("share_each", _number(2)),
    "s": ("epoch_seconds", _number(1)),
    "s to the first step": ("first_seconds", _number(1)),
    "s in all": ("whole_seconds", _number(0)),
    "test error %": ("test_error", str),
    "agreement %": ("agreement", str),
    "images/s": ("images_per_second", _number(0)),
    "GFLOP a step": ("flops", _number(1, 1e-9)),
    "GFLOP/s": ("flops_per_second", _number(0, 1e-9)),
    "% of matrix product": ("percent_of_peak", _number(0)),
    "MB held": ("bytes", _number(0, 1e-6)),
    "lax.conv, MB held": ("convolved_bytes", _number(0, 1e-6)),
    "s to compile": ("compile_seconds", _number(1)),
    "precision": ("precision", str),
    "MB held at most": ("peak_bytes", _number(0, 1e-6)),
    "MB moved": ("moved_bytes", _number(0, 1e-6)),
    "kernels": ("kernels", _number(0)),
    "collectives": ("collectives", _number(0)),
    "roofline, ms": ("roofline_seconds", _number(2, 1e3)),
    "failed": ("failure", str),
}

_SUMMARIES: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "parts": _shares,
    "convolutions": _convolved,
    "seeds": _epochs,
}
