"""What a table is: a configuration, two axes that vary it, and what its cells show of a record.

A cell is a `RunConfig` whose teacher is an architecture yet, without weights, and whose seed is
open; a row or a column is what it replaces in the configuration that the table has in common.
Cells of different tables that are the same configuration are the same runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from abflax.config import RunConfig
from abflax.errors import InputError, unknown
from experiments.common.networks import architecture

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much a table takes.

    Attributes:
      summary: one line.
      seeds: how many, unless told otherwise.
      caveat: what a reader must know who compares with the paper.
    """

    summary: str
    seeds: int
    caveat: str = ""


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a cell shows of a record.

    Attributes:
      name: with its unit.
      lower_is_better: whether the smaller number wins; None: neither does.
      digits: behind the point.
      read: record -> number; None where there is no such number: the method has none, or the run's
        seconds were shared with others. Raises `InputError` where
        the record should have one and does not.
      factor: from the number to what is shown; 100 from shares to percent.
    """

    name: str
    lower_is_better: bool | None
    digits: int
    read: Callable[[Record], float | None]
    factor: float = 100.0


def _test_error(record: Record) -> float:
    if "test_error" not in record["result"]:
        raise InputError(f"record {record['hash']} has no test error: it saw no held-out data")
    return record["result"]["test_error"]


def _after_initialising(field: str, layer: str) -> Callable[[Record], float | None]:
    """Of the last evaluation of the initialise phase, on held-out images."""

    def read(record: Record) -> float | None:
        entries = [entry for entry in record["history"] if entry["phase"] == "initialise"]
        if not entries:
            return None
        if field not in entries[-1]:
            raise InputError(f"record {record['hash']} has no entry '{field}' in its history")
        return entries[-1][field].get(layer)

    return read


def _seconds_per_epoch(record: Record) -> float | None:
    """None where other runs were in the same program."""
    if "abreast" in record["environment"]:
        return None
    phases = record["phases"]
    return sum(phase["seconds"] for phase in phases) / sum(record["config"]["epochs"])


ERROR = Measure("test error, %", True, 2, _test_error)
ACCURACY = Measure("test accuracy, %", False, 2, lambda record: 1 - _test_error(record))
SECONDS = Measure("seconds an epoch", None, 0, _seconds_per_epoch, factor=1.0)


def agreement(layer: str) -> Measure:
    """Agreement of a layer with the teacher's after the initialise phase."""
    name = "agreement after initialising, %"
    return Measure(name, False, 1, _after_initialising("agreement", layer))


def silent(layer: str) -> Measure:
    """The share of a layer's neurons that never fire, after the initialise phase."""
    name = "never fire after initialising, %"
    return Measure(name, None, 1, _after_initialising("silent", layer))


@dataclasses.dataclass(frozen=True)
class Point:
    """One row or column.

    Attributes:
      label: as the paper has it where it can.
      changes: what it replaces in the configuration: fields of `RunConfig`.
      measure: what its cells show; None: the table's.
      note: shown beside the label.
      place: where it lies on a numeric axis of a picture; None: the axis is of names.
      alone: whether what the other axis changes leaves it as it is (KD knows no layers).
      only: labels of the other axis that it is run with; None: all.
    """

    label: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: Measure | None = None
    note: str = ""
    place: float | None = None
    alone: bool = False
    only: tuple[str, ...] | None = None

    @property
    def shown(self) -> str:
        """The label with its note."""
        return f"{self.label}: {self.note}" if self.note else self.label


@dataclasses.dataclass(frozen=True)
class Axis:
    """What varies, and its points in order; selected: they are some of a table's."""

    name: str
    points: tuple[Point, ...]
    selected: bool = False

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def select(self, labels: Sequence[str] | None, kind: str) -> Axis:
        """The axis with the points of these labels, in its own order; None: all of them."""
        if labels is None:
            return self
        known = [point.label for point in self.points]
        for label in labels:
            if label not in known:
                raise unknown(kind, label, known)
        chosen = tuple(point for point in self.points if point.label in labels)
        return Axis(self.name, chosen, self.selected or len(chosen) < len(known))


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: a configuration, and two axes that vary it.

    Attributes:
      name: "1", "2", …
      title: one line.
      scale: a name in `SCALES`.
      run: what all cells have in common.
      rows, columns: what varies.
      competing: the axis along which numbers compete: the best of each row or of each column
        is marked, and its order is compared with the paper's.
      setting: what the cells have in common, in words.
      paper: (row, column) -> the paper's number, in percent.
      paper_setting: what the paper's numbers are of.
      teacher_run: how a teacher is trained, but for its architecture; None: its weights are
        published, and must be given.
      examples, classes: of the training data, all of it.
      caveat: what a reader must know of its numbers, besides the scale's.
      shows: what its cells show where neither row nor column says so.
      picture: learning curves, a panel for each point that is not competing; numbers over those
        points; or None.
    """

    name: str
    title: str
    scale: str
    run: RunConfig
    rows: Axis
    columns: Axis
    competing: Literal["rows", "columns"]
    setting: str
    paper: Mapping[tuple[str, str], float]
    paper_setting: str
    teacher_run: RunConfig | None
    picture: Literal["curves", "points"] | None = "points"
    examples: int = 50_000
    classes: int = 10
    shows: Measure = ERROR
    caveat: str = ""

    def configuration(self, row: Point, column: Point) -> RunConfig | None:
        """The run of a cell; None where the table does not have that cell."""
        for point, other in ((row, column), (column, row)):
            if point.only is not None and other.label not in point.only:
                return None
        changes = {
            **({} if row.alone else column.changes),
            **({} if column.alone else row.changes),
        }
        run = dataclasses.replace(self.run, **changes)
        return run if run.needs_teacher else dataclasses.replace(run, teacher=None)

    def measure(self, row: Point, column: Point) -> Measure:
        """What a cell shows."""
        return row.measure or column.measure or self.shows

    def examples_of(self, run: RunConfig) -> int:
        """How many of the training data a run has at hand."""
        if run.per_class is None:
            return self.examples
        return min(run.per_class * self.classes, self.examples)

    def select(
        self,
        rows: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
    ) -> Table:
        """The table with some of its rows and columns; None: all.

        Raises:
          ValueError: for a name that the table does not have, or names that have no cell.
        """
        found = dataclasses.replace(
            self,
            rows=self.rows.select(rows, f"row of table {self.name}"),
            columns=self.columns.select(columns, f"column of table {self.name}"),
        )
        if methods is not None:
            axis = "rows" if any("method" in point.changes for point in found.rows) else "columns"
            chosen = getattr(found, axis).select(methods, f"method of table {self.name}")
            found = dataclasses.replace(found, **{axis: chosen})
        if not found.runs:
            raise InputError(f"table {self.name}, scale {self.scale}, has no cell there")
        return found

    @property
    def runs(self) -> tuple[RunConfig, ...]:
        """The runs of all cells, each once, in the order of the groups."""
        found: dict[str, RunConfig] = {}
        for group in self.groups:
            for row, column in group:
                if (run := self.configuration(row, column)) is not None:
                    found.setdefault(run.hash, run)
        return tuple(found.values())

    @property
    def teachers(self) -> tuple[str, ...]:
        """The architectures of its teachers, each once, by name."""
        return tuple(sorted({run.teacher for run in self.runs if run.teacher is not None}))

    @property
    def given(self) -> tuple[str, ...]:
        """The networks with published weights among its teachers and students, each once."""
        teachers = self.teachers if self.teacher_run is None else ()
        begun = {run.student for run in self.runs if architecture(run.student) != run.student}
        return (*teachers, *sorted(begun))

    @property
    def groups(self) -> tuple[tuple[tuple[Point, Point], ...], ...]:
        """The (row, column)s that compete with each other, group by group."""
        if self.competing == "rows":
            return tuple(tuple((r, c) for r in self.rows) for c in self.columns)
        return tuple(tuple((r, c) for c in self.columns) for r in self.rows)
