"""Draws tables: learning curves, or the numbers beside the paper's."""

import textwrap
from pathlib import Path

from experiments.common import plots
from experiments.paper_tables.cells import Cell, Filled
from experiments.paper_tables.definitions import TABLES
from experiments.paper_tables.spec import Axis, Point


def draw(filled: Filled, path: Path) -> None:
    """Writes the PNG of a table that has at least one number."""
    table = filled.table
    title = f"Table {table.name}, scale {table.scale}. {table.title}\n"
    single = table.picture == "points" and len(table.columns.points) == 1
    kind = "rows" if single else table.picture or "points"
    title += textwrap.fill(f"here: {table.setting}", 65 if kind == "rows" else 90)
    {"curves": _curves, "points": _points, "rows": _rows}[kind](filled, path, title)


def _curves(filled: Filled, path: Path, title: str) -> None:
    over = filled.table.columns if filled.table.competing == "rows" else filled.table.rows
    panels = {}
    for group in filled.groups:
        records = {_split(cell, over)[1].label: cell.records for cell in group if cell.records}
        if records:
            panels[f"{_split(group[0], over)[0].label} {over.name}"] = records
    plots.learning_curves(panels, _styled_names(filled, over), path, title)


def _points(filled: Filled, path: Path, title: str) -> None:
    """Draws two panels for each measure: the numbers here, and the paper's."""
    table = filled.table
    numeric = all(point.place is not None for point in table.columns)
    over = table.columns if table.competing == "rows" or numeric else table.rows
    panels = []
    for measure in {cell.measure.name: None for cell in filled.cells.values()}:
        cells = [cell for cell in filled.cells.values() if cell.measure.name == measure]
        labels = {_split(cell, over)[0].label for cell in cells}
        places = [point for point in over if point.label in labels]
        for here in (True, False):
            series: dict[str, dict[str, tuple[float, float | None] | None]] = {}
            for cell in cells:
                place, competitor = _split(cell, over)
                number = _here(cell) if here else _paper(cell)
                series.setdefault(competitor.label, {})[place.label] = number
            if any(number is not None for line in series.values() for number in line.values()):
                panel = plots.Panel(
                    title=f"here, scale {table.scale}" if here else "paper",
                    ylabel=measure,
                    xlabel=over.name,
                    places=[(p.shown if here else p.label, p.place) for p in places],
                    series={k: [v[p.label] for p in places] for k, v in series.items()},
                )
                panels.append(panel)
    plots.points(panels, _styled_names(filled, over), path, title)


def _rows(filled: Filled, path: Path, title: str) -> None:
    """Draws the first measure of all rows, in one panel: the numbers here, and the paper's."""
    measure = next(iter(filled.cells.values())).measure.name
    cells = [cell for cell in filled.cells.values() if cell.measure.name == measure]
    numbers = {cell.row.label: (_here(cell), _paper(cell)) for cell in cells}
    plots.rows(numbers, ("here", "paper"), path, title, measure)


def _split(cell: Cell, over: Axis) -> tuple[Point, Point]:
    """(the cell's place on an axis, its point on the other)."""
    here = any(point is cell.column for point in over)
    return (cell.column, cell.row) if here else (cell.row, cell.column)


def _styled_names(filled: Filled, over: Axis) -> list[str]:
    """What has a colour of its own: all methods, in the same order in all pictures, then others."""
    known = [point.label for point in TABLES["paper"]["1"].rows]
    other = filled.table.rows if over is filled.table.columns else filled.table.columns
    return known + [point.label for point in other if point.label not in known]


def _here(cell: Cell) -> tuple[float, float | None] | None:
    if not cell.values:
        return None
    factor = cell.measure.factor
    return factor * cell.mean, None if cell.std is None else factor * cell.std


def _paper(cell: Cell) -> tuple[float, None] | None:
    return None if cell.paper is None else (cell.paper, None)
