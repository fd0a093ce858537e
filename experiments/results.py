"""Rebuild experiments/RESULTS.md with its pictures, and the README's table, from the records.

No number is typed by hand: all of them come from records under experiments/records.

Examples:
  python -m experiments.results
  python -m experiments.results --add workdir
      copy the finished runs of a workdir on CIFAR-10 into the records first
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

from experiments.common import cli
from experiments.common.networks import is_shipped
from experiments.paper_tables import figures
from experiments.paper_tables import records as stored
from experiments.paper_tables.cells import Filled, fill, identities, markdown
from experiments.paper_tables.definitions import SCALES, TABLES
from experiments.paper_tables.plan import jobs, unfinished
from experiments.paper_tables.spec import Record

HERE = Path(__file__).parent
RESULTS, FIGURES, README = HERE / "RESULTS.md", HERE / "figures", HERE.parent / "README.md"
_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
      add: a workdir whose finished runs are copied into the records first.
    """

    add: Path | None = None


def main(console: Console) -> None:
    """Runs the command."""
    arguments = cli.parse(Arguments, "experiments.results", __doc__)
    if arguments.add:
        added, outdated = stored.new(stored.finished(arguments.add))
        page(stored.committed() | added)  # raises if they do not belong in one table
        stored.add(added)
        ended, _ = stored.new(stored.diverged(arguments.add), stored.DIVERGED)
        stored.add(ended, stored.DIVERGED)
        console.print(
            f"{len(added)} records added"
            + f", {len(ended)} of runs that diverged" * bool(ended)
            + f", {outdated} outdated left" * bool(outdated)
        )
    records, diverged = stored.committed(), stored.committed(stored.DIVERGED)
    RESULTS.write_text(page(records, diverged), "utf-8")
    README.write_text(with_table(README.read_text("utf-8"), overview(records, diverged)), "utf-8")
    FIGURES.mkdir(exist_ok=True)
    for filled in tables_with_records(records, diverged):
        if filled.table.picture:
            figures.draw(filled, FIGURES / _picture(filled))
    console.print(f"{RESULTS} and {README}, from {len(records)} records", soft_wrap=True)


def tables_with_records(
    records: Mapping[str, Record], diverged: Mapping[str, Record] | None = None
) -> Iterator[Filled]:
    """Fills the tables that have at least one record."""
    for tables in TABLES.values():
        for table in tables.values():
            filled = fill(table, records, diverged=diverged)
            if filled.records:
                yield filled


def page(records: Mapping[str, Record], diverged: Mapping[str, Record] | None = None) -> str:
    """Writes RESULTS.md."""
    parts = [
        "# Results\n",
        "Rebuilt by `python -m experiments.results` from the records in `experiments/records`. "
        "Left of the bar are the numbers of Heo et al. (2019), right of it what was measured here. "
        "Differences are paired by seed: their mean with its 95 % interval by the t-test. They are "
        "undecided where the interval contains 0, or where there is a single pair. In pictures a "
        "hollow mark is a single number, without deviation. Scales:\n",
        "\n".join(f"- `{name}`: {scale.summary}" for name, scale in SCALES.items()) + "\n",
    ]
    for filled in tables_with_records(records, diverged):
        table = filled.table
        parts += [f"## Table {table.name}, scale {table.scale}: {table.title}\n", markdown(filled)]
        if table.picture:
            parts.append(f"![{table.title}]({FIGURES.name}/{_picture(filled)})\n")
    return "\n".join([*parts, effort(records)])


def effort(records: Mapping[str, Record]) -> str:
    """Writes how many runs and steps each table takes, and how many runs are recorded."""
    lines = [
        "## What the tables take\n",
        "Runs of all seeds, and of teachers that are not shipped; what tables share counts in "
        "each.\n",
        "| table | scale | runs | recorded | steps |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for table in (table for tables in TABLES.values() for table in tables.values()):
        shipped = [name for name in table.teachers if is_shipped(name, table.run.dataset)]
        plan = jobs([table], range(SCALES[table.scale].seeds), shipped)
        left = unfinished(plan, identities(table, records, {}), records)
        steps = sum(sum(job.steps.values()) for job in plan)
        lines.append(
            f"| {table.name} | {table.scale} | {len(plan):,} | {len(plan) - len(left):,} "
            f"| {steps:,} |"
        )
    return "\n".join(lines) + "\n"


def overview(records: Mapping[str, Record], diverged: Mapping[str, Record] | None = None) -> str:
    """Writes the table of the README."""
    return markdown(fill(TABLES["medium"]["2"], records, diverged=diverged))


def with_table(readme: str, table: str) -> str:
    """Replaces the table between the two markers of the README."""
    before, rest = readme.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n{table}{_END}{after}"


def _picture(filled: Filled) -> str:
    return f"table{filled.table.name}-{filled.table.scale}.png"


if __name__ == "__main__":
    cli.main(main)
