"""What a plan would do, without doing it: its cost, or the first steps of every cell."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from rich.console import Console
from rich.table import Table as Printed

from abflax import InputError, Network, NonFiniteError, Resources, distill
from abflax.config import RunConfig, Seeds
from abflax.data import Dataset, ImageFiles
from abflax.models import MODELS
from abflax.models.variables import init_variables
from abflax.training.record import device_name
from experiments.common import cli
from experiments.common.networks import architecture, read
from experiments.paper_tables.cost import Rates, measured, rates, seconds, total
from experiments.paper_tables.plan import Job, unfinished
from experiments.paper_tables.spec import Record


def forecast(
    console: Console,
    plan: Sequence[Job],
    teachers: Mapping[str, str],
    records: Mapping[str, Record],
) -> None:
    """Prints what would run, in how many steps and about how long.

    Args:
      console: where it is printed.
      plan: the runs.
      records: hash -> record, of finished runs.
      teachers: architecture -> identity, as far as they are known.
    """
    device = device_name(jax.devices()[0])
    known, here = rates(records, device), measured(records, device)
    waiting = unfinished(plan, teachers, records)
    left: dict[RunConfig, list[Job]] = defaultdict(list)
    for job in waiting:
        left[job.run].append(job)
    table = Printed(box=None, pad_edge=False, header_style="bold")
    for column in ("to run", "networks", "data", "epochs", "seeds", "steps each", "time each"):
        right = column not in ("to run", "networks")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for group in left.values():
        seeds = ",".join(str(job.seed) for job in group)
        steps, each = sum(group[0].steps.values()), seconds(group[0], known)
        told = _duration(each) + "?" * (each is not None and not _is_measured(group[0], here))
        table.add_row(*group[0].words, seeds, f"{steps:,}", told)
    if left:
        console.print(table, soft_wrap=True)
    steps = sum(sum(job.steps.values()) for job in waiting)
    whole, unknown = total(waiting, known)
    told = _duration(whole)
    about = f"about {told} on {device}" if unknown < len(waiting) else f"time unknown on {device}"
    console.print(
        f"{len(plan)} runs, {sum(job.teaches for job in plan)} of them of teachers; "
        f"{len(plan) - len(waiting)} finished, {len(waiting)} to run in {steps:,} steps"
        + (f"; {about}" if waiting else "")
        + (f" for {len(waiting) - unknown}, unknown for {unknown}" * (0 < unknown < len(waiting))),
        soft_wrap=True,
    )
    guesses = sum(not _is_measured(job, here) for job in waiting)
    if guesses and unknown < len(waiting):
        console.print(
            f"?: {guesses} runs of methods that this device has no record of: in proportion to "
            "another's, or as long as other methods",
            soft_wrap=True,
        )


def _is_measured(job: Job, here: Rates) -> bool:
    """Whether a device has recorded all phases of the run's method."""
    return all((job.run.dataset, job.run.method, phase) in here for phase in job.steps)


def start_every_cell(
    console: Console,
    plan: Sequence[Job],
    steps: int,
    teachers: Mapping[str, Network],
    data_dir: str | None,
    resources: Resources,
) -> None:
    """Makes a few steps of each phase of every run that differs in more than its length or data.

    The networks, the method, its options and the batch size are the real ones; the training data
    are as many images as the steps need, and one evaluation batch is measured. Nothing is
    written. A teacher that is not there is an untrained network. Runs of other lengths or shares
    of the data are the same programs; that their phases have steps at all is looked at.

    Raises:
      ValueError: if a cell does not start; after the others.
    """
    if steps < 1:
        raise InputError(f"--steps must be at least 1, not {steps}")
    groups: dict[RunConfig, list[Job]] = defaultdict(list)
    for job in plan:
        alike = dataclasses.replace(
            job.run, epochs=(1, 1), fraction=1.0, per_class=None, evaluate_every=1, seeds=Seeds()
        )
        groups[alike].append(job)
    failures = []
    for run, group in groups.items():
        label, began = ", ".join(group[0].words[:2]), time.perf_counter()
        try:
            for job in group:
                _ = job.steps  # raises where a phase of the real run would have none
            losses = _start(run, steps, teachers, data_dir, resources)
        except (InputError, NonFiniteError, jax.errors.JaxRuntimeError) as error:
            failures.append(f"{label}: {error}")
            console.print(f"FAILS   {failures[-1]}", soft_wrap=True)
            continue
        finally:
            cli.forget_programs()
        runs = "1 run" if len(group) == 1 else f"{len(group)} runs"
        took = time.perf_counter() - began
        console.print(f"starts  {label} ({runs}): {losses}; {took:.0f} s", soft_wrap=True)
    console.print(
        f"{len(groups) - len(failures)} of {len(groups)} start, for {len(plan)} runs; "
        "nothing was kept",
        soft_wrap=True,
    )
    if failures:
        raise InputError(f"{len(failures)} of {len(groups)} do not start: {failures[0]}")


def _start(
    run: RunConfig,
    steps: int,
    teachers: Mapping[str, Network],
    data_dir: str | None,
    resources: Resources,
) -> str:
    """The losses of a few steps."""
    data, test = (read(run.dataset, split, data_dir) for split in ("train", "test"))
    teacher = teachers.get(run.teacher) if run.teacher is not None else None
    if run.teacher is not None and teacher is None:
        teacher = _untrained(run.teacher, data)
    result = distill(
        MODELS[architecture(run.student)](num_classes=data.num_classes),
        teacher,
        data.take(np.arange(steps * run.batch_size) % len(data)),
        test=test.take(np.arange(min(len(test), 250))),
        resources=resources,
        **run.settings,
    )
    phases = {phase["name"]: phase["steps"] for phase in result.record["phases"]}
    losses = {entry["phase"]: entry["loss"] for entry in result.record["history"]}
    return ", ".join(f"{name} {phases[name]} steps, loss {losses[name]:.3g}" for name in phases)


def _untrained(name: str, data: Dataset | ImageFiles) -> Network:
    model = MODELS[name](num_classes=data.num_classes)
    variables = init_variables(model, jax.random.key(1000), data.image_shape)
    return Network(model, variables, f"{name}:untrained")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds >= 360_000:
        return f"{seconds / 3600:,.0f} h"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
