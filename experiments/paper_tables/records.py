"""The records there are: those that the repository holds, and a workdir's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abflax.config import RunConfig
from abflax.errors import InputError
from abflax.training.record import read_record, write_record

RECORDS = Path(__file__).parent.parent / "records"
DIVERGED = RECORDS / "diverged"
Record = dict[str, Any]


def committed(folder: Path = RECORDS) -> dict[str, Record]:
    """Hash -> record, by hash.

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
    """Hash -> record, of a workdir's finished runs."""
    return _read(workdir, "record.json")


def diverged(workdir: Path) -> dict[str, Record]:
    """Hash -> how it ended, of a workdir's runs whose numbers went wrong."""
    return _read(workdir, "diverged.json")


def _read(workdir: Path, name: str) -> dict[str, Record]:
    records = (read_record(path) for path in sorted((workdir / "runs").glob(f"*/{name}")))
    return {record["hash"]: record for record in records if record is not None}


def short(commit: str | None) -> str:
    """Twelve digits, and the mark of changed code."""
    return "unknown" if commit is None else commit[:12] + "+" * commit.endswith("+")


def new(found: Mapping[str, Record], folder: Path = RECORDS) -> tuple[dict[str, Record], int]:
    """Selects a workdir's CIFAR-10 runs that are not among the records.

    Returns:
      These, by their hashes, and the number of runs that are outdated: a constant has changed, so
      their hash is no longer that of their configuration.
    """
    there = committed(folder)
    chosen = {
        name: record
        for name, record in found.items()
        if record["config"]["dataset"] == "cifar10" and name not in there
    }
    current = {
        name: record
        for name, record in chosen.items()
        if RunConfig.from_json(record["config"]).hash == name
    }
    return current, len(chosen) - len(current)


def add(records: Mapping[str, Record], folder: Path = RECORDS) -> None:
    """Keeps records, named by their hashes."""
    for name, record in records.items():
        write_record(folder / f"{name}.json", record)
