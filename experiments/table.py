"""The paper's tables, with error bars: run what is missing, then show them.

Examples:
  python -m experiments.table 1 --scale small
      train what Table 1 still needs at a size for two CPU cores, and print it
  python -m experiments.table all --scale paper --dry-run
      what would run for all tables, in how many steps and about how long
  python -m experiments.table 3 --seeds 5 --only 2/8
      the second of eight shares of the runs, for a job array on one workdir
  python -m experiments.table all --scale paper --steps 2
      show that every cell starts: two steps of each phase, of which nothing is kept
  python -m experiments.table 6,8 --scale small --group 4
      up to four runs of a seed in one program, with one forward pass of the teacher for all
  python -m experiments.table 6 --teacher-weights wrn22-4=teacher.safetensors
  python -m experiments.table 4,5 --teacher-weights resnet50=resnet50.pth
      transfer learning; --student-weights mobilenet-v1=FILE for the row of pre-trained students

A run is named by its configuration: what is finished, here or among the committed records, is
not run again, and the same command goes on where it stopped. A teacher that is neither given nor
shipped is trained once, before its students; an ImageNet teacher must be given, and tables 4 and
5 are not among "all". What another process is at, and students whose
teacher is not trained yet, are left for the next call: the exit code is 75 then. Markdown and a
picture of the whole table go to WORKDIR/tables.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from abflax import Network, NonFiniteError, Resources, distill_group
from abflax.config import RunConfig
from abflax.errors import BusyError, InputError, unknown
from abflax.models import MODELS
from abflax.runtime.reporter import Reporter
from abflax.storage.files import write_whole
from abflax.taps import Model
from abflax.training.record import require_writable
from abflax.weights import load_network
from experiments.common import cli
from experiments.common.networks import (
    architecture,
    find_teacher,
    is_shipped,
    pretrained,
    pretrained_backbone,
    read,
)
from experiments.paper_tables import figures
from experiments.paper_tables import records as stored
from experiments.paper_tables.cells import Filled, fill, identities, markdown
from experiments.paper_tables.definitions import SCALES, TABLES
from experiments.paper_tables.dry_run import forecast, start_every_cell
from experiments.paper_tables.plan import Job, group_jobs, jobs, share, unfinished
from experiments.paper_tables.spec import Record, Table


def read_share(text: str) -> tuple[int, int]:
    """Reads "2/8" as (2, 8)."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdigit() for part in parts):
        index, count = map(int, parts)
        if 1 <= index <= count:
            return index, count
    raise ValueError(f"'{text}' is not K/N with 1 <= K <= N, such as 2/8")


def read_weights(text: str) -> dict[str, str]:
    """Reads "wrn22-4=FILE,…" as {"wrn22-4": "FILE", …}."""
    pairs = [part.partition("=") for part in text.split(",")]
    for name, _, file in pairs:
        if not file:
            raise ValueError(f"'{name}' is not NAME=FILE, such as wrn22-4=teacher.npz")
    return {name: file for name, _, file in pairs}


Share = Annotated[
    tuple[int, int], cli.text(read_share, "K/N", lambda share: "/".join(map(str, share)))
]
Weights = Annotated[
    dict[str, str],
    cli.text(read_weights, "NAME=FILE,…", lambda files: ",".join(map("=".join, files.items()))),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      tables: number of a table, several such as 1,3, or all.
      scale: paper, medium or small.
      rows: some of the rows, by their names.
      columns: some of the columns.
      methods: some of the methods.
      seeds: how many, or a list such as 0,3; left out: what the scale says.
      group: train up to N runs that see the same batches in one program.
      only: a share of the runs.
      dry_run: print what would run, and run nothing.
      steps: make K steps of every cell, and keep nothing.
      teacher_weights: of teachers, files or runs.
      student_weights: published weights that students begin with.
      data_dir: folder of TensorFlow Datasets; left out: TFDS_DATA_DIR.
      resources: what changes the runs' speed.
    """

    tables: Annotated[str, tyro.conf.Positional]
    scale: str = "paper"
    rows: cli.Names | None = None
    columns: cli.Names | None = None
    methods: cli.Names | None = None
    seeds: cli.SeedList | None = None
    group: int = 1
    only: Share = (1, 1)
    dry_run: bool = False
    steps: int | None = None
    teacher_weights: Weights = dataclasses.field(default_factory=dict)
    student_weights: Weights = dataclasses.field(default_factory=dict)
    data_dir: str | None = None
    resources: Resources = Resources()

    def __post_init__(self) -> None:
        if self.group < 1:
            raise InputError(f"--group must be at least 1, not {self.group}")
        if self.dry_run and self.steps is not None:
            raise InputError("give --dry-run or --steps, not both")
        if self.group > 1 and (self.dry_run or self.steps is not None):
            raise InputError("--dry-run and --steps are of runs alone: leave --group out")


def parse() -> Arguments:
    """Reads the command line."""
    choices = {
        "tables": _titles(),
        "scales": {name: scale.summary for name, scale in SCALES.items()},
    }
    return cli.parse(Arguments, "experiments.table", __doc__, choices)


def _titles() -> dict[str, str]:
    """Of all tables, with the scale where there is but one."""
    found: dict[str, str] = {}
    for scale, tables in TABLES.items():
        for name, table in tables.items():
            alone = sum(name in other for other in TABLES.values()) == 1
            found[name] = table.title + f" (scale {scale})" * alone
    return found


def main(console: Console) -> None:
    """Runs the command."""
    arguments = parse()
    whole = find_tables(arguments.tables, arguments.scale)
    chosen = [table.select(arguments.rows, arguments.columns, arguments.methods) for table in whole]
    given = dict(arguments.teacher_weights)
    given |= {pretrained(name): file for name, file in arguments.student_weights.items()}
    require_used(given, chosen)
    seeds = arguments.seeds or range(SCALES[arguments.scale].seeds)
    teachers = look_for_teachers(chosen, given, arguments.workdir, {})
    there = {name for table in chosen for name in table.teachers
             if name in given or is_shipped(name, table.run.dataset)}  # fmt: skip
    groups = share(group_jobs(jobs(chosen, seeds, there), arguments.group), *arguments.only)
    mine = [job for group in groups for job in group]
    if arguments.steps is not None:
        cli.cache_compilation(arguments.workdir)
        start_every_cell(
            console, mine, arguments.steps, teachers, arguments.data_dir, arguments.resources
        )
        return
    records = stored.committed() | stored.finished(arguments.workdir)
    if arguments.dry_run:
        names = [identities(table, records, _names(teachers)) for table in chosen]
        forecast(console, mine, dict(ChainMap(*names)), records)
        return
    require_writable(arguments.workdir)
    cli.cache_compilation(arguments.workdir)
    reporter = cli.progress(arguments, console)
    with reporter.shown():
        left, failures = run(mine, chosen, given, teachers, records, arguments, reporter)
    records = stored.committed() | stored.finished(arguments.workdir)
    diverged = stored.committed(stored.DIVERGED) | stored.diverged(arguments.workdir)
    teachers = look_for_teachers(whole, given, arguments.workdir, teachers)
    for table, part in zip(whole, chosen, strict=True):
        show(console, fill(part, records, _names(teachers), diverged))
        write(fill(table, records, _names(teachers), diverged), arguments.workdir / "tables")
    others = unfinished([job for job, _ in left], _names(teachers), records)
    notes = [f"{_named(job)}: {why}" for job, why in left if job in others]
    for note in notes:
        console.print(f"left: {note}", soft_wrap=True)
    if failures:
        raise NonFiniteError(f"{len(failures)} of {len(mine)} runs failed: {'; '.join(failures)}")
    if notes:
        raise BusyError(f"{len(notes)} of {len(mine)} runs are left for another call: {notes[0]}")


def find_tables(names: str, scale: str) -> list[Table]:
    """The tables of these names, in the given order."""
    if scale not in TABLES:
        raise unknown("scale", scale, TABLES)
    known = TABLES[scale]
    every = [name for name, table in known.items() if table.teacher_run is not None]
    wanted: dict[str, Table] = {}
    for name in cli.read_names(names):
        if name not in known and name != "all":
            raise unknown("table", name, [*known, "all"])
        wanted |= {each: known[each] for each in (every if name == "all" else [name])}
    return list(wanted.values())


def require_used(given: Mapping[str, str], tables: Sequence[Table]) -> None:
    """Raises `InputError` for weights of a teacher that no table has."""
    known = {name for table in tables for name in (*table.teachers, *table.given)}
    for name in given:
        if name not in known:
            raise unknown("teacher of these tables", name, known)


def look_for_teachers(
    tables: Sequence[Table], given: Mapping[str, str], workdir: Path, found: Mapping[str, Network]
) -> dict[str, Network]:
    """Finds teachers that are given, shipped or trained in the workdir, and students' weights.

    Args:
      tables: whose networks are looked for.
      given: architecture -> file or run; students' published weights are always given.
      workdir: where runs are.
      found: those found before.

    Returns:
      Architecture -> network.
    """
    found = dict(found)
    for name in {name for table in tables for name in table.given if name in given} - set(found):
        load = load_network if architecture(name) == name else pretrained_backbone
        found[name] = load(architecture(name), given[name])
    for job in jobs(tables, ()):
        name, dataset = job.run.student, job.run.dataset
        trained = job.configuration({})
        if name in found or trained is None:
            continue
        if name in given or is_shipped(name, dataset):
            found[name] = find_teacher(name, dataset, given.get(name), workdir)
        elif trained.hash in stored.finished(workdir):
            found[name] = find_teacher(name, dataset, trained.hash, workdir)
    return found


def run(
    mine: Sequence[Job],
    tables: Sequence[Table],
    given: Mapping[str, str],
    teachers: dict[str, Network],
    records: Mapping[str, Record],
    arguments: Arguments,
    reporter: Reporter,
) -> tuple[list[tuple[Job, str]], list[str]]:
    """Runs what is not finished.

    Args:
      mine: the jobs.
      tables: those that they belong to.
      given: architecture -> weights, see `look_for_teachers`.
      teachers: those that are there; those that are trained here are added.
      records: hash -> record, of what is finished.
      arguments: of the command.
      reporter: shows progress.

    Returns:
      (job, reason) for what was left to others or for later, and what went wrong.
    """
    left: list[tuple[Job, str]] = []
    failures: list[str] = []
    # A teacher's record is of no use without the weights, which a workdir has.
    here = stored.finished(arguments.workdir)

    def is_left(job: Job) -> bool:
        config = job.configuration(_names(teachers))
        return config is None or config.hash not in (here if job.teaches else records)

    for group in group_jobs([job for job in mine if is_left(job)], arguments.group):
        if None in (job.configuration(_names(teachers)) for job in group):
            teachers |= look_for_teachers(tables, given, arguments.workdir, teachers)
        ready = []
        for job in filter(is_left, group):
            if job.configuration(_names(teachers)) is not None:
                ready.append(job)
            else:
                left.append((job, _lacking(job, tables, teachers)))
        for job, error in attempt(ready, teachers, arguments, reporter):  # the others meanwhile
            if isinstance(error, BusyError):
                left.append((job, str(error)))
            else:
                failures.append(f"{_named(job)}: {error}")
        cli.forget_programs()
    return left, failures


def attempt(
    group: Sequence[Job],
    teachers: Mapping[str, Network],
    arguments: Arguments,
    reporter: Reporter,
) -> list[tuple[Job, BusyError | NonFiniteError]]:
    """Trains a group, and returns (job, error) for what went wrong.

    After an error the jobs that are left are tried alone, which shows whose error it is.
    """
    if not group:
        return []
    try:
        train(group, teachers, arguments, reporter)
        return []
    except (BusyError, NonFiniteError) as error:
        if len(group) == 1:
            return [(group[0], error)]
    found = stored.finished(arguments.workdir)
    left = [job for job in group if _configured(job, teachers).hash not in found]
    return [wrong for job in left for wrong in attempt([job], teachers, arguments, reporter)]


def train(
    group: Sequence[Job],
    teachers: Mapping[str, Network],
    arguments: Arguments,
    reporter: Reporter,
) -> None:
    """Trains the students of jobs with the same group key in one program."""
    run = group[0].run
    data, test = (read(run.dataset, split, arguments.data_dir) for split in ("train", "test"))
    settings = [_settings(job, teachers, data.num_classes) for job in group]
    distill_group(
        settings,
        student=settings[0]["student"],
        teacher=teachers[run.teacher] if run.teacher is not None else None,
        data=data,
        test=test,
        workdir=arguments.workdir,
        resources=arguments.resources,
        reporter=reporter,
    )


def _settings(job: Job, teachers: Mapping[str, Network], classes: int) -> dict[str, Any]:
    """The student of a job, and the settings it is trained with."""
    config = _configured(job, teachers)
    model = MODELS[architecture(job.run.student)](num_classes=classes)
    student: Model | Network = model
    if job.run.student in teachers and job.run.student != config.student:
        student = dataclasses.replace(teachers[job.run.student], model=model)
    return {"student": student, **config.settings}


def _named(job: Job) -> str:
    return f"{job.label}, seed {job.seed}"


def _configured(job: Job, teachers: Mapping[str, Network]) -> RunConfig:
    config = job.configuration(_names(teachers))
    assert config is not None  # its teacher is there
    return config


def _lacking(job: Job, tables: Sequence[Table], there: Mapping[str, Network]) -> str:
    """Which network a run waits for."""
    begins = architecture(job.run.student)
    if begins != job.run.student and job.run.student not in there:
        return f"the published weights of {begins} are not given (--student-weights {begins}=FILE)"
    name = job.run.teacher
    if any(name in table.given for table in tables):
        return f"the published weights of {name} are not given (--teacher-weights {name}=FILE)"
    return f"its teacher {name} is not trained yet"


def show(console: Console, filled: Filled) -> None:
    """Prints a table as Markdown."""
    table = filled.table
    console.print(f"\n## Table {table.name}, scale {table.scale}: {table.title}\n", soft_wrap=True)
    console.print(markdown(filled), soft_wrap=True, markup=False)


def write(filled: Filled, folder: Path) -> None:
    """Writes Markdown and, where there is a number, a picture."""
    name = f"table{filled.table.name}-{filled.table.scale}"
    write_whole(folder / f"{name}.md", markdown(filled).encode())
    if filled.records and filled.table.picture:
        figures.draw(filled, folder / f"{name}.png")


def _names(teachers: Mapping[str, Network]) -> dict[str, str]:
    """Architecture -> identity."""
    return {name: str(network.name) for name, network in teachers.items()}


if __name__ == "__main__":
    cli.main(main)
