"""The paper's tables, made from tables.toml (what varies) and paper_tables.json (its numbers)."""

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from abflax.config import RunConfig, Seeds
from experiments.paper_tables import spec
from experiments.paper_tables.spec import Axis, Point, Scale, Table

_HERE = Path(__file__).parent
_DATA = tomllib.loads((_HERE / "tables.toml").read_text("utf-8"))
_PAPER = json.loads((_HERE.parent / "paper_tables.json").read_text("utf-8"))
_MEASURES: Mapping[str, Callable[..., spec.Measure]] = {
    "agreement": spec.agreement,
    "dead": spec.dead_neurons,
    "seconds": lambda: spec.SECONDS,
}

SCALES = {
    name: Scale(scale["summary"], scale["seeds"], scale["caveat"])
    for name, scale in _DATA["scales"].items()
}
TEACHER = RunConfig(
    dataset="cifar10",
    student="wrn22-4",
    method="cross-entropy",
    protocol="official",  # the published recipe: the classify schedule over 200 epochs
    epochs=(0, 200),
    # A seed of its own: with a student's, both would begin from the same weights.
    seeds=Seeds.all(1000),
)


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Makes fields of `RunConfig` of TOML, which has no tuples and no None."""
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    if "options" in values:
        options = _fields(values["options"]).items()
        fields["options"] = tuple((name, None if v == "all" else v) for name, v in options)
    return fields


def _axis(axis: str | list[str | Mapping[str, Any]]) -> Axis:
    """Makes the axis of a name in [axes], or one of methods."""
    if isinstance(axis, list):
        return Axis("method", tuple(map(_point, axis)))
    return Axis(_DATA["axes"][axis]["name"], tuple(map(_point, _DATA["axes"][axis]["points"])))


def _point(values: str | Mapping[str, Any]) -> Point:
    """Makes a point; a name alone is that of a method."""
    if isinstance(values, str):
        return Point(values, {"method": values})
    changes = _fields(values)
    own = ("label", "note", "place", "alone", "only", "measure")
    fields = {name: changes.pop(name) for name in own if name in changes}
    if "measure" in fields:
        kind, *layer = fields["measure"].split()
        fields["measure"] = _MEASURES[kind](*layer)
    return Point(changes=changes, **fields)


def _table(scale: str, values: Mapping[str, Any]) -> Table:
    """Makes one of the tables; those without transfer learning train their teachers."""
    paper = _PAPER[str(values["number"])]
    run = RunConfig(**_fields(_DATA["scales"][scale]["run"] | values.get("run", {})))
    share = "all" if run.fraction == 1 else f"{100 * run.fraction:g} % of the"
    words = _DATA["texts"] | {
        "networks": f"{run.teacher} → {run.student}",
        "training": f"{share} training images, {run.epochs[0]}+{run.epochs[1]} epochs",
    }
    shown = values.get("paper_column") or {column: column for column in paper["columns"]}
    transfers = run.setting.startswith("transfer")
    teacher = {"dataset": run.dataset} | _fields(values.get("teacher", {}))
    return Table(
        name=values.get("name", str(values["number"])),
        title=values.get("title", paper["title"]),
        scale=scale,
        run=run,
        rows=_axis(values["rows"]),
        columns=_axis(values["columns"]),
        competing=values.get("competing", "rows"),
        setting=values.get("setting", "CIFAR-10, {networks}, {training}").format_map(words),
        paper={
            (row, shown[column]): number
            for row, numbers in paper["rows"].items()
            for column, number in zip(paper["columns"], numbers, strict=True)
            if column in shown
        },
        paper_setting=paper["setting"],
        teacher_run=None
        if transfers
        else dataclasses.replace(TEACHER, **(teacher | _fields(values.get("teacher_run", {})))),
        picture=values.get("picture", "points") or None,
        examples=values.get("examples", 50_000),
        classes=values.get("classes", 10),
        shows=spec.ACCURACY if paper["metric"] == "test accuracy" else spec.ERROR,
        caveat=values.get("caveat", "").format_map(words),
    )


# scale -> name -> table
TABLES: Mapping[str, Mapping[str, Table]] = {
    scale: dict(sorted((table.name, table) for table in (_table(scale, v) for v in tables)))
    for scale, tables in _DATA["tables"].items()
}
EVERY_METHOD = TABLES["small"]["methods"]
