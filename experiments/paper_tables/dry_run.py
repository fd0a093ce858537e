"""Shows what a plan would do: its cost, or the first steps of every cell."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from rich.console import Console

from abflax import InputError, Network, NonFiniteError, Resources, distill
from abflax.config import RunConfig, Seeds
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

    `teachers` has the identities of known architectures, `records` finished runs by hash.
    """
    device = device_name(jax.devices()[0])
    known, here = rates(records, device), measured(records, device)
    waiting = unfinished(plan, teachers, records)
    left: dict[RunConfig, list[Job]] = defaultdict(list)
    for job in waiting:
        left[job.run].append(job)
    columns = ("to run", "networks", "data", "epochs", "seeds", "steps each", "time each")
    table = cli.make_table(columns, left=2, pad_edge=False)
    for group in left.values():
        seeds = ",".join(str(job.seed) for job in group)
        steps, estimate = sum(group[0].steps.values()), seconds(group[0], known)
        guess = estimate is not None and not _is_measured(group[0], here)
        table.add_row(*group[0].words, seeds, f"{steps:,}", _duration(estimate) + "?" * guess)
    if left:
        cli.print_table(console, table)
    steps = sum(sum(job.steps.values()) for job in waiting)
    whole, unknown = total(waiting, known)
    time_left = "time unknown" if unknown == len(waiting) else f"about {_duration(whole)}"
    console.print(
        f"{len(plan)} runs, {sum(job.teaches for job in plan)} of them of teachers; "
        f"{len(plan) - len(waiting)} finished, {len(waiting)} to run in {steps:,} steps"
        + (f"; {time_left} on {device}" if waiting else "")
        + (f" for {len(waiting) - unknown}, unknown for {unknown}" * (0 < unknown < len(waiting))),
        soft_wrap=True,
    )
    guesses = sum(not _is_measured(job, here) for job in waiting)
    if guesses and unknown < len(waiting):
        console.print(
            f"?: {guesses} runs of methods without a record of this device: estimated from another "
            "device's records, or from other methods'",
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
    """Makes a few steps of each phase of every cell, once for all lengths and shares of the data.

    The networks, the method, its options and the batch size are those of the real runs. The
    training data are as many images as the steps need, and one evaluation batch is measured.
    Nothing is written. An untrained network replaces a missing teacher. Runs that differ only in
    their length or share of the data are the same program; each phase of each must have a step.
    """
    if steps < 1:
        raise InputError(f"--steps must be at least 1, not {steps}")
    groups: dict[RunConfig, list[Job]] = defaultdict(list)
    for job in plan:
        each = 1 + len(job.run.anchors or ())  # of either phase: one for each teacher
        alike = dataclasses.replace(
            job.run, epochs=(each, each), fraction=1.0, per_class=None, evaluate_every=1,
            seeds=Seeds(),
        )  # fmt: skip
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
    starting = f"{len(groups) - len(failures)} of {len(groups)} start"
    console.print(f"{starting}, for {len(plan)} runs; nothing was kept", soft_wrap=True)
    if failures:
        raise InputError(f"{len(failures)} of {len(groups)} do not start: {failures[0]}")


def _start(
    run: RunConfig,
    steps: int,
    teachers: Mapping[str, Network],
    data_dir: str | None,
    resources: Resources,
) -> str:
    data, test = (read(run.dataset, split, data_dir) for split in ("train", "test"))

    def untrained(name: str) -> Network:
        model = MODELS[architecture(name)](num_classes=data.num_classes)
        variables = init_variables(model, jax.random.key(1000), data.image_shape)
        return Network(model, variables, f"{name}:untrained")

    names = [name for name in (*(run.anchors or ()), run.teacher) if name is not None]
    result = distill(
        MODELS[architecture(run.student)](num_classes=data.num_classes),
        [teachers.get(name) or untrained(name) for name in names] or None,
        data.take(np.arange(steps * run.batch_size) % len(data)),
        test=test.take(np.arange(min(len(test), 250))),
        resources=resources,
        **run.settings,
    )
    phases = {phase["name"]: phase["steps"] for phase in result.record["phases"]}
    losses = {entry["phase"]: entry["loss"] for entry in result.record["history"]}
    return ", ".join(f"{name} {phases[name]} steps, loss {losses[name]:.3g}" for name in phases)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds >= 360_000:
        return f"{seconds / 3600:,.0f} h"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
