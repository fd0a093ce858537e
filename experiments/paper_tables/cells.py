"""Fills a table from records, and writes it as Markdown."""

import dataclasses
import itertools
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from abflax.config import RunConfig, Seeds
from abflax.errors import InputError
from experiments.common.networks import architecture
from experiments.common.stats import describe_points, mean_and_std, paired_difference
from experiments.paper_tables.definitions import SCALES
from experiments.paper_tables.records import short
from experiments.paper_tables.spec import Measure, Point, Record, Table

_LISTED = 6  # reversed pairs that are named; the others are counted


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a filled table.

    Attributes:
      run: None: the table does not have this cell.
      paper: the paper's number, in percent.
      records: of its seeds, in order.
      diverged: how many further seeds ended with non-finite numbers.
      by_seed: seed -> the record's number, as a share; empty if the method has no such number.
    """

    row: Point
    column: Point
    measure: Measure
    run: RunConfig | None
    paper: float | None
    records: tuple[Record, ...]
    diverged: int
    by_seed: Mapping[int, float]

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers of all seeds."""
        return tuple(self.by_seed.values())

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
    """A table with its cells by (row, column), in the order of its groups."""

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
        """The records that it was filled from, each once."""
        records = [record for cell in self.cells.values() for record in cell.records]
        return tuple({record["hash"]: record for record in records}.values())


def seeded(run: RunConfig, networks: Mapping[str, str], seed: int) -> RunConfig | None:
    """Completes a cell's configuration by a seed of everything and its networks' identities.

    `networks` has the identities of teachers and of students with published weights, by name. If
    one of the run's is not among them, the result is None.
    """
    names = {} if run.teacher is None else {"teacher": run.teacher}
    if architecture(run.student) != run.student:
        names["student"] = run.student
    anchors = run.anchors or ()
    if not {*names.values(), *anchors} <= set(networks):
        return None
    changes: dict[str, Any] = {role: networks[name] for role, name in names.items()}
    if anchors:
        changes["anchors"] = tuple(networks[name] for name in anchors)
    return dataclasses.replace(run, seeds=Seeds.all(seed), **changes)


def fill(
    table: Table,
    records: Mapping[str, Record],
    teachers: Mapping[str, str] | None = None,
    diverged: Mapping[str, Record] | None = None,
) -> Filled:
    """Finds the records of each cell.

    `teachers` has the identities of teachers and of students with published weights, by
    architecture. Records of other networks are ignored. Where no identity is given, all records
    must have the same. `diverged` has the runs whose numbers became non-finite.
    """
    diverged = {name: end for name, end in (diverged or {}).items() if name not in records}
    known = {**records, **diverged}
    seeds, teachers = _seeds(known), identities(table, known, teachers or {})
    cells = {}
    for row, column in itertools.chain.from_iterable(table.groups):
        run, measure = table.configuration(row, column), table.measure(row, column)
        finished, lost = (
            _records_of(run, part, seeds, teachers) if run is not None else ()
            for part in (records, diverged)
        )
        by_seed = {
            record["config"]["seeds"]["weights"]: value
            for record in finished
            if (value := measure.read(record)) is not None
        }
        paper = table.paper.get((row.label, column.label))
        cells[row.label, column.label] = Cell(
            row, column, measure, run, paper, finished, len(lost), by_seed
        )
    return Filled(table, cells)


def _seeds(records: Mapping[str, Record]) -> list[int]:
    return sorted({record["config"]["seeds"]["weights"] for record in records.values()})


def identities(
    table: Table, records: Mapping[str, Record], known: Mapping[str, str]
) -> dict[str, str]:
    """The networks that are known or named by a table's records: architecture -> identity."""
    networks, seeds = _identities_of_anchors(table, records) | dict(known), _seeds(records)
    for name in {*table.teachers, *table.given} - set(networks):
        role = "teacher" if name in table.teachers else "student"
        candidates = {str(record["config"][role]) for record in records.values()}
        runs = [run for run in table.runs if getattr(run, role) == name]
        used = [
            identity
            for identity in sorted(candidates)
            if identity.startswith(f"{architecture(name)}:")
            and any(_records_of(run, records, seeds, {name: identity}) for run in runs)
        ]
        if len(used) > 1:
            raise InputError(
                f"records of table {table.name}, scale {table.scale}, come from different "
                f"{role}s, {' and '.join(used)}: they do not belong in one table"
            )
        if used:
            networks[name] = used[0]
    return networks


def _identities_of_anchors(table: Table, records: Mapping[str, Record]) -> dict[str, str]:
    """The anchors that a table's records name, in the order of its routes."""
    seeds, found = _seeds(records), dict[str, str]()
    configs = [record["config"] for record in records.values()]
    routes = {(*each["anchors"], each["teacher"]) for each in configs if each.get("anchors")}
    for run in table.runs:
        if run.anchors is None:
            continue
        for route in sorted(routes):
            names = dict(zip((*run.anchors, str(run.teacher)), route, strict=False))
            if _records_of(run, records, seeds, names):
                found |= names
    return found


def _records_of(
    run: RunConfig, records: Mapping[str, Record], seeds: Sequence[int], teachers: Mapping[str, str]
) -> tuple[Record, ...]:
    runs = (seeded(run, teachers, seed) for seed in seeds)
    return tuple(records[run.hash] for run in runs if run is not None and run.hash in records)


def markdown(filled: Filled) -> str:
    """Writes a table with its caption, what is missing, and how its order compares."""
    table = filled.table
    shown = {}
    for group in filled.groups:
        winners, compared = best(group), any(cell.paper is not None for cell in group)
        for cell in group:
            place = cell.row.label, cell.column.label
            shown[place] = _shown(cell, cell in winners, compared)
    header = [f"{table.rows.name} \\ {table.columns.name}", *(p.shown for p in table.columns)]
    lines = [header, ["---", *("---:" for _ in table.columns)]]
    for row in table.rows:
        lines.append([row.shown, *(shown[row.label, column.label] for column in table.columns)])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts = [rows, order(filled), _caption(filled), missing(filled)]
    return "\n\n".join(part for part in parts if part) + "\n"


def best(group: Sequence[Cell]) -> list[Cell]:
    """The cells of a group with the best mean; none if fewer than two have numbers."""
    measured = [cell for cell in group if cell.values]
    if len(measured) < 2 or measured[0].measure.lower_is_better is None:
        return []
    choose = min if measured[0].measure.lower_is_better else max
    winner = choose(cell.mean for cell in measured)
    return [cell for cell in measured if cell.mean == winner]


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
    """Says what the numbers are in one sentence, and folds away where they come from."""
    table, environments = filled.table, [record["environment"] for record in filled.records]
    measures = sorted({cell.measure.name for cell in filled.cells.values()})
    what = "; ".join(measures)
    when = "last epoch" if len(measures) == 1 else "of the last epoch unless said otherwise"
    facts = [
        f"Here, scale `{table.scale}`: {table.setting}; protocol `{table.run.protocol}`, "
        f"batch {table.run.batch_size}.",
        f"Paper: {table.paper_setting}. {SCALES[table.scale].caveat} {table.caveat}".strip(),
    ]
    if environments:
        teachers = _listed(record["config"]["teacher"] for record in filled.records)
        devices = _listed((run["device"] for run in environments), between="; ")
        commits = _listed(short(run["commit"]) for run in environments)
        facts.append(f"Teacher: {teachers}. Device: {devices}. Commit: {commits}.")
    return (
        f"{what[0].upper() + what[1:]}: paper │ here, mean ± sample standard deviation (number of "
        f"seeds), {when}; the best in bold.\n\n"
        f"<details><summary>Where the numbers come from</summary>\n\n{' '.join(facts)}\n\n"
        "</details>"
    )


def _listed(names: Iterable[str | None], between: str = ", ") -> str:
    return between.join(sorted({name for name in names if name is not None})) or "none"


def missing(filled: Filled) -> str:
    """Says which cells lack runs or seeds, and the command that runs them; "" if none does."""
    table, seeds = filled.table, SCALES[filled.table.scale].seeds
    cells = [cell for cell in filled.cells.values() if cell.run is not None]
    absent = [cell for cell in cells if len(cell.records) + cell.diverged < seeds]
    if not absent:
        return ""
    started = sum(bool(cell.records) for cell in absent)
    note = f"Not run yet: {len(absent) - started} of {len(cells)} cells"
    note += f"; begun, with fewer than {seeds} seeds: {started}" * (started > 0)
    command = f"python -m experiments.table {table.name} --scale {table.scale}"
    for flag, axis, labels in (
        ("--rows", table.rows, {cell.row.label for cell in absent}),
        ("--columns", table.columns, {cell.column.label for cell in absent}),
    ):
        varies = any(point.changes for point in axis)  # points may be measures of the same runs
        if varies and (axis.selected or len(labels) < len(axis.points)):
            chosen = ",".join(point.label for point in axis if point.label in labels)
            command += f" {flag} {shlex.quote(chosen)}"
    return f"{note}. `{command}`"


def order(filled: Filled) -> str:
    """Says who is ahead here and by how much, then how the paper's order compares, a line each."""
    return "\n\n".join(line for line in (_ahead(filled), _pairs(filled)) if line)


def _ahead(filled: Filled) -> str:
    """Says by how much the best of each group is ahead: of all others, or of the next best.

    There is one group, or there are several.
    """
    groups = [group for group in filled.groups if best(group)]
    parts = []
    for group in groups:
        measured = [cell for cell in group if cell.values]
        winner, *others = sorted(measured, key=lambda cell: _sign(cell) * cell.mean)
        measure = winner.measure
        others = others if len(groups) == 1 else others[:1]
        found = [
            f"{_competitor(filled.table, other)} by "
            + describe_points(difference, measure.digits, _sign(winner) * measure.factor)
            for other in others
            if (difference := paired_difference(other.by_seed, winner.by_seed)) is not None
        ]
        if found:
            place = f"{_place(filled.table, winner)}: " * (len(groups) > 1)
            parts.append(f"{place}{_competitor(filled.table, winner)} beats {', '.join(found)}")
    return "; ".join(parts) + "." if parts else ""


def _sign(cell: Cell) -> int:
    """1 where the smaller number wins, else -1."""
    return 1 if cell.measure.lower_is_better else -1


def _pairs(filled: Filled) -> str:
    """Counts the pairs of competing cells that have the paper's order here."""
    same = undecided = 0
    against: list[str] = []
    for group in filled.groups:
        for one, other in itertools.combinations([cell for cell in group if cell.values], 2):
            if one.paper is None or other.paper is None or one.paper == other.paper:
                continue
            first = _sign(one) * one.paper < _sign(one) * other.paper
            better, worse = (one, other) if first else (other, one)
            difference = paired_difference(better.by_seed, worse.by_seed)
            if difference is None or difference.sign == 0:
                undecided += 1
            elif difference.sign == -_sign(one):
                same += 1
            else:
                here, there = (_competitor(filled.table, cell) for cell in (worse, better))
                against.append(f"{here} before {there} at {_place(filled.table, one)}")
    total = same + undecided + len(against)
    if not total:
        return ""
    examples = "; ".join(against[:_LISTED])
    examples += f"; {len(against) - _LISTED} more" * (len(against) > _LISTED)
    reversed_ = f"{len(against)} reversed ({examples})" if against else "0 reversed"
    return (
        f"Pairs that have the paper's order here: {same} of {total}; {reversed_}; "
        f"{undecided} undecided."
    )


def _competitor(table: Table, cell: Cell) -> str:
    return cell.row.label if table.competing == "rows" else cell.column.label


def _place(table: Table, cell: Cell) -> str:
    return cell.column.label if table.competing == "rows" else cell.row.label
