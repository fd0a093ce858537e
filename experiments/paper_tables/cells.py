"""A table filled from records: which cell has which numbers, and how it reads in Markdown."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence

from abflax.config import RunConfig, Seeds
from abflax.errors import InputError
from experiments.common.networks import architecture
from experiments.common.stats import beyond_error_bars, mean_and_std
from experiments.paper_tables.definitions import SCALES
from experiments.paper_tables.records import short
from experiments.paper_tables.spec import Axis, Measure, Point, Record, Table

_LISTED = 6  # reversed pairs that are named; the others are counted


@dataclasses.dataclass(frozen=True)
class Cell:
    """What there is of one cell.

    Attributes:
      row, column: where it is.
      measure: what it shows.
      run: of which run; None: the table does not have this cell.
      paper: the paper's number, in percent.
      records: of its seeds, by seed.
      diverged: how many further seeds have ended in numbers that are none.
      values: what the records say, as shares; empty where they are of a method that has no such
        number.
    """

    row: Point
    column: Point
    measure: Measure
    run: RunConfig | None
    paper: float | None
    records: tuple[Record, ...]
    diverged: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Filled:
    """A table, and its cells by (row, column) in the order of its groups."""

    table: Table
    cells: Mapping[tuple[str, str], Cell]

    @property
    def groups(self) -> tuple[tuple[Cell, ...], ...]:
        """The cells that compete with each other."""
        return tuple(
            tuple(self.cells[row.label, column.label] for row, column in group)
            for group in self.table.groups
        )

    @property
    def records(self) -> tuple[Record, ...]:
        """All that it was filled from, each once."""
        found = {record["hash"]: record for cell in self.cells.values() for record in cell.records}
        return tuple(found.values())


def seeded(run: RunConfig, networks: Mapping[str, str], seed: int) -> RunConfig | None:
    """Completes a cell's configuration by its networks' identities and a seed.

    Args:
      run: the cell's.
      networks: name -> identity, of teachers and of students with published weights.
      seed: of everything.

    Returns:
      The configuration of the run; None where a network's identity is not known.
    """
    begins = run.student if architecture(run.student) != run.student else None
    if not {run.teacher, begins} - {None} <= set(networks):
        return None
    return dataclasses.replace(
        run,
        student=run.student if begins is None else networks[begins],
        teacher=None if run.teacher is None else networks[run.teacher],
        seeds=Seeds.all(seed),
    )


def fill(
    table: Table,
    records: Mapping[str, Record],
    teachers: Mapping[str, str] | None = None,
    diverged: Mapping[str, Record] | None = None,
) -> Filled:
    """Finds the records of each cell.

    Args:
      table: to be filled.
      records: hash -> record.
      teachers: architecture -> identity, where it is known, and so for students with published
        weights. Records of another network do not count then; where it is not known, the records
        must agree in one.
      diverged: hash -> how it ended, of runs without a record because their numbers went wrong.

    Raises:
      ValueError: naming two teachers that records of one table have, or a record that lacks what
        the table shows.
    """
    ended = {name: each for name, each in (diverged or {}).items() if name not in records}
    both = {**records, **ended}
    seeds, teachers = _seeds(both), identities(table, both, teachers or {})
    cells = {}
    for row, column in itertools.chain.from_iterable(table.groups):
        run, measure = table.configuration(row, column), table.measure(row, column)
        found, lost = (
            _records_of(run, known, seeds, teachers) if run is not None else ()
            for known in (records, ended)
        )
        values = [value for record in found if (value := measure.read(record)) is not None]
        paper = table.paper.get((row.label, column.label))
        cells[row.label, column.label] = Cell(
            row, column, measure, run, paper, found, len(lost), tuple(values)
        )
    return Filled(table, cells)


def _seeds(records: Mapping[str, Record]) -> list[int]:
    return sorted({record["config"]["seeds"]["weights"] for record in records.values()})


def identities(
    table: Table, records: Mapping[str, Record], known: Mapping[str, str]
) -> dict[str, str]:
    """Finds the networks whose records a table shows: teachers, and students' published weights.

    Args:
      table: the table.
      records: hash -> record.
      known: architecture -> identity, of networks that are known already.

    Returns:
      Architecture -> identity.

    Raises:
      ValueError: where it is not known, and the records have several.
    """
    found, seeds = dict(known), _seeds(records)
    for name in {*table.teachers, *table.given} - set(known):
        role = "teacher" if name in table.teachers else "student"
        candidates = {str(record["config"][role]) for record in records.values()}
        used = [
            each
            for each in sorted(candidates)
            if each.startswith(f"{architecture(name)}:")
            and any(_records_of(run, records, seeds, {name: each}) for run in table.runs
                    if getattr(run, role) == name)
        ]  # fmt: skip
        if len(used) > 1:
            raise InputError(
                f"records of table {table.name}, scale {table.scale}, come from different "
                f"{role}s, {' and '.join(used)}: they do not belong into one table"
            )
        if used:
            found[name] = used[0]
    return found


def _records_of(
    run: RunConfig, records: Mapping[str, Record], seeds: Sequence[int], teachers: Mapping[str, str]
) -> tuple[Record, ...]:
    runs = (seeded(run, teachers, seed) for seed in seeds)
    return tuple(records[run.hash] for run in runs if run is not None and run.hash in records)


def markdown(filled: Filled) -> str:
    """The table with its caption, what is missing, and how its order compares."""
    table = filled.table
    winners = {id(cell) for group in filled.groups for cell in best(group)}
    compared = {
        id(cell)
        for group in filled.groups
        for cell in group
        if any(other.paper is not None for other in group)
    }
    header = [f"{table.rows.name} \\ {table.columns.name}", *(p.shown for p in table.columns)]
    lines = [header, ["---", *("---:" for _ in table.columns)]]
    for row in table.rows:
        cells = [filled.cells[row.label, column.label] for column in table.columns]
        shown = (_shown(c, id(c) in winners, id(c) in compared) for c in cells)
        lines.append([row.shown, *shown])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts = [rows, _caption(filled), missing(filled), order(filled)]
    return "\n\n".join(part for part in parts if part) + "\n"


def best(group: Sequence[Cell]) -> list[Cell]:
    """The cells of a group with the best mean; none where fewer than two have been run."""
    run = [cell for cell in group if cell.values]
    if len(run) < 2 or run[0].measure.lower_is_better is None:
        return []
    choose = min if run[0].measure.lower_is_better else max
    winner = choose(cell.mean for cell in run)
    return [cell for cell in run if cell.mean == winner]


def _shown(cell: Cell, wins: bool, compared: bool) -> str:
    """Formats a cell: "paper │ here", or "here" if the paper has no number in its group."""
    if cell.values:
        here = mean_and_std(cell.values, cell.measure.digits, cell.measure.factor)
        lost = f"; {cell.diverged} diverged" * (cell.diverged > 0)
        here = f"{f'**{here}**' if wins else here} ({len(cell.values)}{lost})"
    elif cell.diverged:
        here = f"diverged ({cell.diverged})"
    else:
        here = "–" if cell.run is None or cell.records else "not run"
        if cell.run is not None and architecture(cell.run.student) != cell.run.student:
            here = "not available"
    if not compared:
        return here
    paper = "–" if cell.paper is None else f"{cell.paper:.{cell.measure.digits}f}"
    return f"{paper} │ {here}"


def _caption(filled: Filled) -> str:
    """What the numbers are of, and where they come from."""
    table, runs = filled.table, [record["environment"] for record in filled.records]
    measures = sorted({cell.measure.name for cell in filled.cells.values()})
    what = "; ".join(measures)
    when = "last epoch" if len(measures) == 1 else "of the last epoch unless said otherwise"
    teachers = _listed(record["config"]["teacher"] for record in filled.records)
    made = ""
    if runs:
        devices = _listed((each["device"] for each in runs), between="; ")
        commits = _listed(short(each["commit"]) for each in runs)
        made = f" Teacher: {teachers}. Device: {devices}. Commit: {commits}."
    return (
        f"{what[0].upper() + what[1:]}: paper │ here, mean ± sample standard deviation (number of "
        f"seeds), {when}; the best in bold. Here, scale `{table.scale}`: {table.setting}; "
        f"protocol `{table.run.protocol}`, batch {table.run.batch_size}.{made} "
        f"Paper: {table.paper_setting}. {SCALES[table.scale].caveat} {table.caveat}"
    ).rstrip()


def _listed(names: Iterable[str | None], between: str = ", ") -> str:
    return between.join(sorted({name for name in names if name is not None})) or "none"


def missing(filled: Filled) -> str:
    """Says which cells lack runs or seeds, and the command that runs them; "" if none does."""
    table, seeds = filled.table, SCALES[filled.table.scale].seeds
    cells = [cell for cell in filled.cells.values() if cell.run is not None]
    absent = [cell for cell in cells if len(cell.records) + cell.diverged < seeds]
    if not absent:
        return ""
    begun = sum(bool(cell.records) for cell in absent)
    told = f"Not run yet: {len(absent) - begun} of {len(cells)} cells"
    told += f"; begun, with fewer than {seeds} seeds: {begun}" * (begun > 0)
    command = f"python -m experiments.table {table.name} --scale {table.scale}"
    for flag, axis, labels in (
        ("--rows", table.rows, {cell.row.label for cell in absent}),
        ("--columns", table.columns, {cell.column.label for cell in absent}),
    ):
        if _varies(axis) and (axis.selected or len(labels) < len(axis.points)):
            chosen = ",".join(point.label for point in axis if point.label in labels)
            command += f" {flag} {shlex.quote(chosen)}"
    return f"{told}. `{command}`"


def _varies(axis: Axis) -> bool:
    """Whether the points of an axis are different runs, and not readings of the same."""
    return any(point.changes for point in axis)


def order(filled: Filled) -> str:
    """Whether the paper's order holds here, counted over the pairs of cells that compete.

    A pair keeps or reverses the paper's order where its means ± deviations do not overlap.
    """
    kept = within = single = 0
    against: list[str] = []
    for group in filled.groups:
        for one, other in itertools.combinations([cell for cell in group if cell.values], 2):
            if one.paper is None or other.paper is None or one.paper == other.paper:
                continue
            sign = 1 if one.measure.lower_is_better else -1
            first = sign * one.paper < sign * other.paper
            better, worse = (one, other) if first else (other, one)
            found = beyond_error_bars(better.values, worse.values)
            if found is None:
                single += 1
            elif found == 0:
                within += 1
            elif found == -sign:
                kept += 1
            else:
                against.append(_pair(filled.table, worse, better))
    total = kept + within + len(against)
    alone = f" Pairs with a single seed, which has no error bar: {single}." if single else ""
    if not total:
        return f"The paper's order: nothing to compare yet.{alone}"
    verdict = (
        ("holds" if not within else "holds wherever the error bars decide" if kept else "is open")
        if not against
        else ("holds in part" if kept else "does not hold")
    )
    return (
        f"The paper's order {verdict} here: of {total} pair{'s' * (total > 1)}, {kept} in the same "
        f"order beyond the error bars, {within} within them, {len(against)} reversed"
        f"{_named(against)}.{_leaders(filled)}{alone}"
    )


def _pair(table: Table, first: Cell, second: Cell) -> str:
    if table.competing == "rows":
        return f"{first.row.label} before {second.row.label} at {first.column.label}"
    return f"{first.column.label} before {second.column.label} at {first.row.label}"


def _named(pairs: Sequence[str]) -> str:
    if not pairs:
        return ""
    more = f" and {len(pairs) - _LISTED} more" if len(pairs) > _LISTED else ""
    return f" ({'; '.join(pairs[:_LISTED])}{more})"


def _leaders(filled: Filled) -> str:
    """In how many groups the paper's best is the best here, where both are known."""
    same = known = 0
    for group in filled.groups:
        told = [(cell, cell.paper) for cell in group if cell.paper is not None]
        if len(told) < 2:
            continue
        choose = min if told[0][0].measure.lower_is_better else max
        top = choose(paper for _, paper in told)
        leaders = [cell for cell, paper in told if paper == top]
        if all(cell.values for cell in leaders) and (winners := best(group)):
            known += 1
            same += any(cell in leaders for cell in winners)
    kind = "column" if filled.table.competing == "rows" else "row"
    if not known:
        return ""
    return f" The paper's best is the best here in {same} of {known} {kind}{'s' * (known > 1)}."
