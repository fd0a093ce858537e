"""Plans the runs of some tables: teachers first, each run once, in shares and groups."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from abflax.config import RunConfig, Seeds
from abflax.training.history import phases_and_schedules
from experiments.common.networks import ANCHOR, architecture
from experiments.paper_tables.cells import seeded
from experiments.paper_tables.spec import Table

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a plan.

    Attributes:
      run: its configuration, with the architecture for a teacher.
      examples: of its training data.
      teaches: whether it trains a teacher.
      anchors: the names of the anchors that it keeps, in their order.
    """

    run: RunConfig
    seed: int
    examples: int
    teaches: bool = False
    anchors: tuple[str, ...] = ()

    @property
    def taught(self) -> tuple[str, ...]:
        """The names of the teachers that it trains."""
        return self.anchors or (self.run.student,) if self.teaches else ()

    def configuration(self, teachers: Mapping[str, str]) -> RunConfig | None:
        """Completes the configuration; None while its teacher or first weights are missing."""
        return seeded(self.run, teachers, self.seed)

    @property
    def group_key(self) -> tuple[Any, ...]:
        """What is the same for all jobs that can be trained in one program."""
        seeded = dataclasses.replace(self.run, seeds=Seeds.all(self.seed))
        return (self.teaches, *seeded.group_key.values())

    @property
    def steps(self) -> dict[str, int]:
        """Phase -> optimization steps."""
        phases, schedules = phases_and_schedules(self.run, round(self.run.fraction * self.examples))
        pairs = zip(phases, schedules, strict=True)
        return {phase.name: schedule.steps for phase, schedule in pairs}

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Method and options, networks, share of the data, epochs."""
        run = self.run
        options = "".join(f" {name}={_plain(value)}" for name, value in run.options)
        return (
            run.method + options,
            run.student if run.teacher is None else f"{run.teacher} → {run.student}",
            f"{100 * run.fraction:g} %",
            f"{run.epochs[0]}+{run.epochs[1]}",
        )

    @property
    def label(self) -> str:
        """One phrase that names the run, without its seed."""
        method, networks, share_of_data, epochs = self.words
        return f"{method}, {networks}, {share_of_data} of {self.run.dataset}, {epochs} epochs"


def _plain(value: object) -> str:
    """Formats an option's value; None means all layers."""
    if value is None:
        return "all"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def teacher_jobs(table: Table, given: Collection[str] = ()) -> list[Job]:
    """Lists the runs that train a table's teachers, except those with given weights."""
    run = table.teacher_run
    if run is None:
        return []
    anchors: dict[str, list[str]] = {}  # architecture -> those that its run keeps
    for name in table.teachers:
        if name not in given:
            kept = anchors.setdefault(architecture(name), [])
            kept += [name] if ANCHOR in name else []
    return [
        Job(
            dataclasses.replace(run, student=name), run.seeds.weights, table.examples, True,
            tuple(kept),
        )
        for name, kept in anchors.items()
    ]  # fmt: skip


def jobs(
    tables: Sequence[Table], seeds: Sequence[int], given: Collection[str] = ()
) -> tuple[Job, ...]:
    """Lists all runs of some tables, each once: seed by seed, table by table, group by group.

    A teacher comes right before the first table that needs it; the architectures in `given` have
    weights and are not trained. The list does not depend on which runs are finished, so its shares
    stay the same.
    """
    plan: dict[tuple[str, int, bool], Job] = {}
    for seed in seeds:
        for table in tables:
            students = [Job(run, seed, table.examples_of(run)) for run in table.runs]
            for job in (*teacher_jobs(table, given), *students):
                plan.setdefault((job.run.hash, job.seed, job.teaches), job)
    return tuple(plan.values())


def unfinished(
    plan: Sequence[Job], teachers: Mapping[str, str], records: Collection[str]
) -> list[Job]:
    """Lists the jobs without a record; teachers: architecture -> identity; records: by hash."""
    configs = [(job, job.configuration(teachers)) for job in plan]
    return [job for job, config in configs if config is None or config.hash not in records]


def share(elements: Sequence[_T], index: int, count: int) -> tuple[_T, ...]:
    """The index-th of count shares, from 1. Every element is in exactly one share.

    Each round of `count` elements begins with the next share, so that no share gets the same
    method in every round.
    """
    return tuple(one for i, one in enumerate(elements) if (i + i // count) % count == index - 1)


def group_jobs(plan: Sequence[Job], most: int) -> tuple[tuple[Job, ...], ...]:
    """Groups jobs that can be trained in one program, `most` at a time.

    The groups are in the order of their first jobs.
    """
    left, groups = [(job.group_key, job) for job in plan], []
    while left:
        group_key = left[0][0]
        chosen = [pair for pair in left if pair[0] == group_key][:most]
        left = [pair for pair in left if pair not in chosen]
        groups.append(tuple(job for _, job in chosen))
    return tuple(groups)
