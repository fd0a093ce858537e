"""The records there are: those that the repository holds, and a workdir's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from abflax.config import RunConfig
from abflax.errors import InputError
from abflax.record import read_record

RECORDS = Path(__file__).parent / "records"
Record = dict[str, Any]


def committed(folder: Path = RECORDS) -> dict[str, Record]:
    """hash -> record, by hash.

    Raises:
      ValueError: naming a file that is no record, or not the one that it is called after.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        assert record is not None  # the file is there
        if record["hash"] != path.stem:
            raise InputError(f"{path} holds the record of another run, {record['hash']}")
        found[path.stem] = record
    return found


def finished(workdir: Path) -> dict[str, Record]:
    """hash -> record, of a workdir's finished runs."""
    records = (read_record(path) for path in sorted((workdir / "runs").glob("*/record.json")))
    return {record["hash"]: record for record in records if record is not None}


def add(workdir: Path, folder: Path = RECORDS) -> tuple[int, int]:
    """Copies a workdir's finished CIFAR-10 runs into the records. Returns (how many, how many were
    left because their names are not those of their configurations, as a constant has changed)."""
    chosen = [r for r in finished(workdir).values() if r["config"]["dataset"] == "cifar10"]
    current = [r["hash"] for r in chosen if RunConfig.from_json(r["config"]).hash == r["hash"]]
    for name in current:
        shutil.copyfile(workdir / "runs" / name / "record.json", folder / f"{name}.json")
    return len(current), len(chosen) - len(current)
