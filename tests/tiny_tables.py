"""A table that digits and the smallest networks fill, and records made by hand."""

import dataclasses

from abflax.config import RunConfig, Seeds
from experiments.paper_tables.spec import Axis, Point, Table

RUN = RunConfig(
    dataset="digits",
    student="wrn10-1",
    teacher="wrn10-1",
    protocol="official",
    epochs=(1, 1),
    batch_size=13,
    fraction=0.05,
)
TABLE = Table(
    name="1",
    title="Digits",
    scale="small",
    run=RUN,
    rows=Axis(
        "method",
        tuple(Point(name, {"method": name}) for name in ("cross-entropy", "activation-boundary")),
    ),
    columns=Axis("epochs", (Point("1+1", {"epochs": (1, 1)}),)),
    competing="rows",
    setting="digits, wrn10-1 → wrn10-1",
    paper={("cross-entropy", "1+1"): 43.37, ("activation-boundary", "1+1"): 16.39},
    paper_setting="wrn22-4 → wrn16-2",
    teacher_run=dataclasses.replace(
        RUN,
        student="wrn10-1",
        teacher=None,
        method="cross-entropy",
        epochs=(0, 2),  # as long as its students' two epochs, so that they share a program
        seeds=Seeds.all(1000),
    ),
    picture="curves",
    examples=1297,
)
ROWS = ("cross-entropy", "kd", "attention", "activation-boundary")
# Four methods at two lengths.
GRID = dataclasses.replace(
    TABLE,
    rows=Axis("method", tuple(Point(name, {"method": name}) for name in ROWS)),
    columns=Axis(
        "epochs",
        (Point("1+1", {"epochs": (1, 1)}), Point("1+5", {"epochs": (1, 5)}, only=ROWS[:2])),
    ),
    paper={
        ("cross-entropy", "1+1"): 43.37,
        ("kd", "1+1"): 48.42,
        ("attention", "1+1"): 37.66,
        ("activation-boundary", "1+1"): 16.39,
        ("cross-entropy", "1+5"): 17.72,
    },
)
# A route of two anchors beside KD from the second.
ROUTE = dataclasses.replace(
    TABLE,
    run=dataclasses.replace(RUN, teacher="wrn10-1@2", epochs=(0, 2)),
    rows=Axis(
        "method",
        (Point("kd", {"method": "kd"}), Point("rco", {"method": "rco", "anchors": ("wrn10-1@1",)})),
    ),
    columns=Axis("epochs", (Point("1+1"),)),
    picture=None,
)


def record(run, seed, error, teacher="wrn10-1:0123456789ab", **changes):
    """Makes a finished run's record by hand: (hash, record)."""
    teacher = teacher if run.teacher is not None else None
    config = dataclasses.replace(run, teacher=teacher, seeds=Seeds.all(seed))
    entry = {
        "phase": "initialise",
        "step": 2,
        "loss": 1.0,
        "epoch": 1,
        "test_error": 0.9,
        "agreement": {"layer1": 0.875},
    }
    last = {
        "phase": "classify",
        "step": 4,
        "loss": 0.5,
        "epoch": 2,
        "test_error": error,
        "agreement": {},
    }
    values = {
        "schema": 1,
        "hash": config.hash,
        "config": config.as_json(),
        "state": "finished",
        "finished": "2026-01-01T00:00:00+00:00",
        "phases": [
            {"name": "initialise", "steps": 2, "epochs": 1, "seconds": 6.0},
            {"name": "classify", "steps": 2, "epochs": 1, "seconds": 2.0},
        ],
        "history": [entry, last],
        "result": {"test_error": error},
        "environment": {"device": "abacus", "commit": "0123456789abcdef+"},
    } | changes
    return config.hash, values


def run_of(table, row, column):
    """The run of a cell, by the labels."""
    pairs = ((table.rows, row), (table.columns, column))
    points = [next(point for point in axis if point.label == label) for axis, label in pairs]
    return table.configuration(*points)
