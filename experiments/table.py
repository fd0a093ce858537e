"""The paper's tables, with error bars: run what is missing, then show them.

examples:
  python -m experiments.table 1 --scale small
      train what Table 1 still needs at a size for two CPU cores, and print it
  python -m experiments.table all --scale paper --dry-run
      what would run for all tables, in how many steps and about how long
  python -m experiments.table 3 --seeds 5 --only 2/8
      the second of eight shares of the runs, for a job array on one workdir
  python -m experiments.table all --scale paper --steps 2
      show that every cell starts: two steps of each phase, of which nothing is kept
  python -m experiments.table 6,8 --scale small --abreast 4
      up to four runs of a seed in one program: their teacher is asked once for all
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

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from abflax import Network, NonFiniteError, Resources, distill
from abflax.config import RunConfig
from abflax.errors import BusyError, InputError, unknown
from abflax.files import write_whole
from abflax.models import MODELS
from abflax.progress import Reporter
from abflax.record import require_writable
from abflax.taps import Model
from abflax.weights import load_network
from experiments import archive, cli, figures
from experiments.cells import Filled, fill, identities, markdown
from experiments.layout import Record, Table, architecture, pretrained
from experiments.plan import Job, jobs, share, together, unfinished
from experiments.rehearsal import forecast, start_every_cell
from experiments.tables import SCALES, TABLES
from experiments.teachers import begun, find_teacher, is_shipped, read


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    choices = {
        "tables": _titles(),
        "scales": {name: scale.summary for name, scale in SCALES.items()},
    }
    parser = cli.Parser("experiments.table", __doc__, choices, trains=True)
    add = parser.add_argument
    add("tables", metavar="N", help="number of a table, several such as 1,3, or all")
    add("--scale", default="paper", help=f"{' or '.join(SCALES)} (default paper)")
    add("--rows", type=cli.names_type, metavar="NAMES", help="some of the rows, by their names")
    add("--columns", type=cli.names_type, metavar="NAMES", help="some of the columns")
    add("--methods", type=cli.names_type, metavar="NAMES", help="some of the methods")
    add("--seeds", type=cli.seeds_type, metavar="N",
        help="how many, or a list such as 0,3 (default 5; 2 at scale small)")  # fmt: skip
    add("--abreast", type=int, default=1, metavar="N",
        help="train up to N runs that see the same batches in one program (default 1)")  # fmt: skip
    add("--only", type=share_type, default=(1, 1), metavar="K/N", help="a share of the runs")
    add("--dry-run", action="store_true", help="tell what would run, and run nothing")
    add("--steps", type=int, metavar="K", help="make K steps of every cell, and keep nothing")
    add("--teacher-weights", type=weights_type, action="append", default=[], metavar="NAME=FILE",
        help="a teacher's weights: file or run; may be given again")  # fmt: skip
    add("--student-weights", type=weights_type, action="append", default=[], metavar="NAME=FILE",
        help="published weights that a student begins with")  # fmt: skip
    add("--data-dir", help="of TensorFlow Datasets; default: TFDS_DATA_DIR")
    add("--workdir", type=Path, default=cli.WORKDIR, help="where all goes (default ./workdir)")
    add("--devices", type=int, help="how many (default all)")
    add(
        "--steps-per-dispatch", type=int, help="default: 1 on CPUs; elsewhere 100, of photographs 8"
    )
    add("--checkpoint-seconds", type=float, default=60.0)
    return parser.parse_args(arguments)


def _titles() -> dict[str, str]:
    """Of all tables, with the scale where there is but one."""
    found: dict[str, str] = {}
    for scale, tables in TABLES.items():
        for name, table in tables.items():
            alone = sum(name in other for other in TABLES.values()) == 1
            found[name] = table.title + f" (scale {scale})" * alone
    return found


def share_type(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8)."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdigit() for part in parts):
        index, count = map(int, parts)
        if 1 <= index <= count:
            return index, count
    raise argparse.ArgumentTypeError(f"'{text}' is not K/N with 1 <= K <= N, such as 2/8")


def weights_type(text: str) -> tuple[str, str]:
    """ "wrn22-4=FILE" -> ("wrn22-4", "FILE")."""
    name, _, weights = text.partition("=")
    if not weights:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=FILE, such as wrn22-4=t.npz")
    return name, weights


def main(console: Console) -> None:
    arguments = parse()
    whole = find_tables(arguments.tables, arguments.scale)
    chosen = [table.select(arguments.rows, arguments.columns, arguments.methods) for table in whole]
    given = dict(arguments.teacher_weights)
    given |= {pretrained(name): file for name, file in arguments.student_weights}
    require_used(given, chosen)
    if arguments.abreast < 1:
        raise InputError(f"--abreast must be at least 1, not {arguments.abreast}")
    if arguments.dry_run and arguments.steps is not None:
        raise InputError("give --dry-run or --steps, not both")
    if arguments.abreast > 1 and (arguments.dry_run or arguments.steps is not None):
        raise InputError("--dry-run and --steps are of runs alone: leave --abreast out")
    seeds = arguments.seeds or range(SCALES[arguments.scale].seeds)
    teachers = look_for_teachers(chosen, given, arguments.workdir, {})
    there = {name for table in chosen for name in table.teachers
             if name in given or is_shipped(name, table.run.dataset)}  # fmt: skip
    groups = share(together(jobs(chosen, seeds, there), arguments.abreast), *arguments.only)
    mine = [job for group in groups for job in group]
    if arguments.steps is not None:
        cli.cache_compilation(arguments.workdir)
        start_every_cell(
            console, mine, arguments.steps, teachers, arguments.data_dir, _resources(arguments)
        )
        return
    records = archive.committed() | archive.finished(arguments.workdir)
    if arguments.dry_run:
        known: dict[str, str] = {}
        for table in chosen:
            known |= identities(table, records, _names(teachers))
        forecast(console, mine, known, records)
        return
    require_writable(arguments.workdir)
    cli.cache_compilation(arguments.workdir)
    live = cli.progress(arguments, console)
    with live.shown():
        left, failures = run(mine, chosen, given, teachers, records, arguments, live)
    records = archive.committed() | archive.finished(arguments.workdir)
    diverged = archive.committed(archive.DIVERGED) | archive.diverged(arguments.workdir)
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
    for name in cli.names_type(names):
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
    """architecture -> teacher: those found before, given, shipped, or trained in the workdir; and
    so for students with published weights, which must be given."""
    found = dict(found)
    for name in {name for table in tables for name in table.given if name in given} - set(found):
        load = load_network if architecture(name) == name else begun
        found[name] = load(architecture(name), given[name])
    for job in jobs(tables, ()):
        name, dataset = job.run.student, job.run.dataset
        trained = job.configuration({})
        if name in found or trained is None:
            continue
        if name in given or is_shipped(name, dataset):
            found[name] = find_teacher(name, dataset, given.get(name), workdir)
        elif trained.hash in archive.finished(workdir):
            found[name] = find_teacher(name, dataset, trained.hash, workdir)
    return found


def run(
    mine: Sequence[Job],
    tables: Sequence[Table],
    given: Mapping[str, str],
    teachers: dict[str, Network],
    records: Mapping[str, Record],
    arguments: argparse.Namespace,
    reporter: Reporter,
) -> tuple[list[tuple[Job, str]], list[str]]:
    """Runs what is not finished. Returns (what was left to others or for later, and why; what went
    wrong).

    Args:
      teachers: those that are there; those that are trained here come to them.
    """
    left: list[tuple[Job, str]] = []
    failures: list[str] = []
    # A teacher's record is of no use without the weights, which a workdir has.
    here = archive.finished(arguments.workdir)

    def is_left(job: Job) -> bool:
        config = job.configuration(_names(teachers))
        return config is None or config.hash not in (here if job.teaches else records)

    for group in together([job for job in mine if is_left(job)], arguments.abreast):
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
    arguments: argparse.Namespace,
    reporter: Reporter,
) -> list[tuple[Job, BusyError | NonFiniteError]]:
    """Trains a group, and returns what went wrong: where it did, those that are left are tried
    alone, which tells whose error it is."""
    if not group:
        return []
    try:
        train(group, teachers, arguments, reporter)
        return []
    except (BusyError, NonFiniteError) as error:
        if len(group) == 1:
            return [(group[0], error)]
    found = archive.finished(arguments.workdir)
    left = [job for job in group if _configured(job, teachers).hash not in found]
    return [wrong for job in left for wrong in attempt([job], teachers, arguments, reporter)]


def train(
    group: Sequence[Job],
    teachers: Mapping[str, Network],
    arguments: argparse.Namespace,
    reporter: Reporter,
) -> None:
    """Trains the students of jobs that have their lesson in common, in one program."""
    run = group[0].run
    data, test = (read(run.dataset, split, arguments.data_dir) for split in ("train", "test"))
    first, *others = (_keywords(job, teachers, data.num_classes) for job in group)
    distill(
        teacher=teachers[run.teacher] if run.teacher is not None else None,
        data=data,
        test=test,
        abreast=tuple(others),
        workdir=arguments.workdir,
        resources=_resources(arguments),
        reporter=reporter,
        **first,
    )


def _keywords(job: Job, teachers: Mapping[str, Network], classes: int) -> dict[str, Any]:
    """What a job's own student is trained with."""
    config = _configured(job, teachers)
    model = MODELS[architecture(job.run.student)](num_classes=classes)
    student: Model | Network = model
    if job.run.student in teachers and job.run.student != config.student:
        student = dataclasses.replace(teachers[job.run.student], model=model)
    return {"student": student, **config.arguments}


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
    """architecture -> identity."""
    return {name: str(network.name) for name, network in teachers.items()}


def _resources(arguments: argparse.Namespace) -> Resources:
    return Resources(arguments.devices, arguments.steps_per_dispatch, arguments.checkpoint_seconds)


if __name__ == "__main__":
    cli.main(main)
