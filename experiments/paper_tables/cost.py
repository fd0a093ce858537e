"""Estimates how long runs take, from records' seconds per FLOP and the networks' FLOP."""

import functools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from abflax.config import RunConfig
from abflax.models import MODELS
from experiments.common.flops import count_flops
from experiments.common.networks import architecture
from experiments.paper_tables.plan import Job
from experiments.paper_tables.spec import Record

# (data set, method, phase) -> seconds per FLOP, with FLOP as counted by `_step`
Rates = Mapping[tuple[str, str, str], float]


def rates(records: Mapping[str, Record], device: str) -> Rates:
    """Estimates the rates of a device from records.

    Rates without a record of this device are another device's, times the median ratio of the
    rates that both devices have.
    """
    here, borrowed = measured(records, device), defaultdict(list)
    for other in {record["environment"]["device"] for record in records.values()} - {device}:
        there = measured(records, other)
        ratios = [here[key] / there[key] for key in here.keys() & there.keys()]
        for key in there.keys() - here.keys() if ratios else ():
            borrowed[key].append(there[key] * statistics.median(ratios))
    return {key: statistics.median(values) for key, values in borrowed.items()} | dict(here)


def measured(records: Mapping[str, Record], device: str) -> Rates:
    """Reads a device's rates from records: medians, evaluation and compilation included.

    Runs that were trained in one program with others are left out.
    """
    measurements = defaultdict(list)
    for record in records.values():
        if record["environment"]["device"] != device or "abreast" in record["environment"]:
            continue
        run = RunConfig.from_json(record["config"])
        for phase in record["phases"]:
            seconds = phase["seconds"] / phase["steps"]
            measurements[run.dataset, run.method, phase["name"]].append(seconds / _step(run))
    return {key: statistics.median(values) for key, values in measurements.items()}


def seconds(job: Job, known: Rates) -> float | None:
    """Estimates how long a run takes; None: there is no rate for its data set.

    A phase without a rate takes the median of the other rates.
    """
    run = job.run
    others = [rate for (dataset, _, _), rate in known.items() if dataset == run.dataset]
    if not others:
        return None
    usual = statistics.median(others)
    return _step(run) * sum(
        steps * known.get((run.dataset, run.method, phase), usual)
        for phase, steps in job.steps.items()
    )


def total(plan: Sequence[Job], known: Rates) -> tuple[float, int]:
    """(seconds of all runs with an estimate, how many have none)."""
    estimates = [seconds(job, known) for job in plan]
    return sum(time for time in estimates if time is not None), estimates.count(None)


def _step(run: RunConfig) -> float:
    """FLOP of a step: the teacher's forward pass, the student's, and its backward pass, twice that.

    The rates of a method's records include everything else that it computes.
    """
    teacher = 0.0 if run.teacher is None else _forward(architecture(run.teacher))
    return run.batch_size * (teacher + 3 * _forward(architecture(run.student)))


@functools.cache
def _forward(name: str) -> float:
    """FLOP of a network's forward pass for one image of CIFAR's size; only ratios matter."""
    model = MODELS[name](num_classes=10)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), image)
    return count_flops(functools.partial(model.apply, train=False), variables, image)
