"""Defines a table: a configuration, two axes that vary it, and what its cells show of a record.

A cell is a `RunConfig` whose teacher is the name of an architecture, without weights, and whose
seed is not set. A row or a column replaces fields of the table's configuration. Cells of different
tables with the same configuration are the same runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from abflax.config import RunConfig
from abflax.errors import InputError, unknown
from experiments.common.networks import architecture

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of the runs of a set of tables; `caveat`: what its readers must know."""

    summary: str
    seeds: int
    caveat: str


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a cell shows of a record.

    Attributes:
      name: with its unit.
      lower_is_better: whether the smaller number wins; None: neither does.
      digits: behind the point.
      read: record -> number; None if there is no such number: the method has none, or other runs
        shared the program. Raises `InputError` if the record lacks a number it should have.
      factor: from the number to what is shown; 100 from shares to percent.
    """

    name: str
    lower_is_better: bool | None
    digits: int
    read: Callable[[Record], float | None]
    factor: float = 100.0


def _test_error(record: Record) -> float:
    if "test_error" not in record["result"]:
        raise InputError(f"record {record['hash']} has no test error: it has no held-out data")
    return record["result"]["test_error"]


def _after_initialising(field: str, layer: str) -> Callable[[Record], float | None]:
    """Reads a field of the last evaluation of the initialise phase, on held-out images."""

    def read(record: Record) -> float | None:
        entries = [entry for entry in record["history"] if entry["phase"] == "initialise"]
        if not entries:
            return None
        if field not in entries[-1]:
            raise InputError(f"record {record['hash']} has no entry '{field}' in its history")
        return entries[-1][field].get(layer)

    return read


def _seconds_per_epoch(record: Record) -> float | None:
    """The seconds; None if other runs were trained in the same program."""
    if "abreast" in record["environment"]:
        return None
    phases = record["phases"]
    return sum(phase["seconds"] for phase in phases) / sum(record["config"]["epochs"])


ERROR = Measure("test error, %", True, 2, _test_error)
ACCURACY = Measure("test accuracy, %", False, 2, lambda record: 1 - _test_error(record))
SECONDS = Measure("seconds an epoch", None, 0, _seconds_per_epoch, factor=1.0)


def agreement(layer: str) -> Measure:
    """Measures a layer's agreement with the teacher after the initialise phase."""
    name = "agreement after initialising, %"
    return Measure(name, False, 1, _after_initialising("agreement", layer))


def dead_neurons(layer: str) -> Measure:
    """Measures the share of a layer's neurons that never fire after the initialise phase."""
    name = "never fire after initialising, %"
    return Measure(name, None, 1, _after_initialising("silent", layer))


@dataclasses.dataclass(frozen=True)
class Point:
    """One row or column.

    Attributes:
      label: the paper's, where it has one.
      changes: the fields of `RunConfig` that it replaces.
      measure: what its cells show; None: the table's.
      note: shown beside the label.
      place: its coordinate on a numeric axis of a picture; None: the axis is of names.
      alone: whether changes of the other axis are ignored (KD has no layers).
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
    """What varies, and its points in order; selected: whether some points were left out."""

    name: str
    points: tuple[Point, ...]
    selected: bool = False

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def select(self, labels: Sequence[str] | None, kind: str) -> Axis:
        """Selects points by their labels, in the order of the axis; None: all of them."""
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
      scale: a name in `SCALES`.
      run: what all cells have in common.
      rows, columns: what varies.
      competing: "rows": the best row of each column is marked, and the order of the rows is
        compared with the paper's; "columns": likewise, the columns of each row.
      setting: what the cells have in common, in words.
      paper: (row, column) -> the paper's number, in percent.
      paper_setting: what the paper's numbers are of.
      teacher_run: how a teacher is trained, except for its architecture; None: published weights
        must be given.
      examples, classes: of the training data, all of it.
      picture: "curves": learning curves, a panel for each point that does not compete; "points":
        numbers over those points; "rows": the first measure, a row each; None: no picture.
      shows: what cells show if neither row nor column has a measure.
      caveat: what readers must know of its numbers, besides the scale's caveat.
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
    picture: Literal["curves", "points", "rows"] | None = "points"
    examples: int = 50_000
    classes: int = 10
    shows: Measure = ERROR
    caveat: str = ""

    def configuration(self, row: Point, column: Point) -> RunConfig | None:
        """The run of a cell; None if the table does not have this cell."""
        for point, other in ((row, column), (column, row)):
            if point.only is not None and other.label not in point.only:
                return None
        changes: dict[str, Any] = {} if row.alone else dict(column.changes)
        changes |= {} if column.alone else row.changes
        run = dataclasses.replace(self.run, **changes)
        return run if run.needs_teacher else dataclasses.replace(run, teacher=None)

    def measure(self, row: Point, column: Point) -> Measure:
        """What a cell shows."""
        return row.measure or column.measure or self.shows

    def examples_of(self, run: RunConfig) -> int:
        """How many training examples there are for a run."""
        most = self.examples if run.per_class is None else run.per_class * self.classes
        return min(most, self.examples)

    def select(
        self,
        rows: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
    ) -> Table:
        """Selects some of the rows and columns; None: all."""
        table = dataclasses.replace(
            self,
            rows=self.rows.select(rows, f"row of table {self.name}"),
            columns=self.columns.select(columns, f"column of table {self.name}"),
        )
        if methods is not None:
            axis = "rows" if any("method" in point.changes for point in table.rows) else "columns"
            chosen = getattr(table, axis).select(methods, f"method of table {self.name}")
            table = dataclasses.replace(table, **{axis: chosen})
        if not table.runs:
            raise InputError(f"table {self.name}, scale {self.scale}, has no cell there")
        return table

    @functools.cached_property
    def runs(self) -> tuple[RunConfig, ...]:
        """The runs of all cells, each once, in the order of the groups."""
        found: dict[str, RunConfig] = {}
        for cell in itertools.chain.from_iterable(self.groups):
            if (run := self.configuration(*cell)) is not None:
                found.setdefault(run.hash, run)
        return tuple(found.values())

    @functools.cached_property
    def teachers(self) -> tuple[str, ...]:
        """The names of its teachers, each once: architectures, or anchors of one's training."""
        names = {name for run in self.runs for name in (run.teacher, *(run.anchors or ()))}
        return tuple(sorted(name for name in names if name is not None))

    @functools.cached_property
    def given(self) -> tuple[str, ...]:
        """The networks with published weights among its teachers and students, each once."""
        teachers = self.teachers if self.teacher_run is None else ()
        pretrained_students = {
            run.student for run in self.runs if architecture(run.student) != run.student
        }
        return (*teachers, *sorted(pretrained_students))

    @functools.cached_property
    def groups(self) -> tuple[tuple[tuple[Point, Point], ...], ...]:
        """Groups of (row, column) whose numbers compete."""
        if self.competing == "rows":
            return tuple(tuple((r, c) for r in self.rows) for c in self.columns)
        return tuple(tuple((r, c) for c in self.columns) for r in self.rows)
