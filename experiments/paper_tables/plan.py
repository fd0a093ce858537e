"""What is to be run for some tables: teachers first, each run once, in shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from abflax.config import RunConfig, Seeds
from abflax.training.history import phases_and_schedules
from experiments.paper_tables.cells import seeded
from experiments.paper_tables.spec import Table

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a plan.

    Attributes:
      run: its configuration; a teacher is an architecture yet.
      seed: of the run.
      examples: of its training data.
      teaches: whether it trains a teacher.
    """

    run: RunConfig
    seed: int
    examples: int
    teaches: bool = False

    def configuration(self, teachers: Mapping[str, str]) -> RunConfig | None:
        """The configuration of the run; None until its teacher and first weights are there.

        Args:
          teachers: architecture -> identity.
        """
        return seeded(self.run, teachers, self.seed)

    @property
    def group_key(self) -> tuple[Any, ...]:
        """What jobs have in common whose runs can be trained in one program."""
        seeded = dataclasses.replace(self.run, seeds=Seeds.all(self.seed))
        return (self.teaches, *seeded.group_key.values())

    @property
    def steps(self) -> dict[str, int]:
        """Phase -> optimisation steps.

        Raises:
          ValueError: if a phase has none.
        """
        phases, spans = phases_and_schedules(self.run, round(self.run.fraction * self.examples))
        return {phase.name: span.steps for phase, span in zip(phases, spans, strict=True)}

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
        """The same as a sentence has it."""
        method, networks, share_of_data, epochs = self.words
        return f"{method}, {networks}, {share_of_data} of {self.run.dataset}, {epochs} epochs"


def _plain(value: object) -> str:
    """An option's value; None stands for all layers."""
    if value is None:
        return "all"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def jobs(
    tables: Sequence[Table], seeds: Sequence[int], given: Collection[str] = ()
) -> tuple[Job, ...]:
    """All runs of some tables, each once: teachers, then group by group, seed by seed.

    It depends on the arguments, not on what is finished, so shares of it stay the same.

    Args:
      tables: those to fill.
      seeds: of each run.
      given: the architectures whose weights are there already, so that nobody trains them.
    """
    teachers: dict[str, Job] = {}
    students: dict[tuple[str, int], Job] = {}
    for table in tables:
        for group in table.groups:
            runs = {
                run.hash: run for cell in group if (run := table.configuration(*cell)) is not None
            }
            for seed in seeds:
                for name, run in runs.items():
                    students.setdefault((name, seed), Job(run, seed, table.examples_of(run)))
        for name in table.teachers:
            if name in given or table.teacher_run is None:
                continue
            run = dataclasses.replace(table.teacher_run, student=name)
            job = Job(run, run.seeds.weights, table.examples, teaches=True)
            teachers.setdefault(run.hash, job)
    return (*teachers.values(), *students.values())


def unfinished(
    plan: Sequence[Job], teachers: Mapping[str, str], records: Collection[str]
) -> list[Job]:
    """Those that have no record.

    Args:
      plan: all runs.
      teachers: architecture -> identity, as far as they are known.
      records: by their hashes.
    """
    configs = [(job, job.configuration(teachers)) for job in plan]
    return [job for job, config in configs if config is None or config.hash not in records]


def share(everything: Sequence[_T], index: int, count: int) -> tuple[_T, ...]:
    """The index-th of count shares, from 1. Everything is in exactly one.

    Each round of `count` begins one share further on, so that no share gets the same method of
    every round.
    """
    return tuple(each for i, each in enumerate(everything) if (i + i // count) % count == index - 1)


def group_jobs(plan: Sequence[Job], most: int) -> tuple[tuple[Job, ...], ...]:
    """Groups jobs that can be trained in one program, `most` at a time.

    The groups are in the order of their first jobs.
    """
    left, found = [(job.group_key, job) for job in plan], []
    while left:
        group_key = left[0][0]
        chosen = [each for each in left if each[0] == group_key][:most]
        left = [each for each in left if each not in chosen]
        found.append(tuple(job for _, job in chosen))
    return tuple(found)
