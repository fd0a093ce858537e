"""Reads and adds records: those committed to the repository, and those of a workdir."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abflax.config import RunConfig
from abflax.errors import InputError
from abflax.training.record import finished_records, read_record, write_record

RECORDS = Path(__file__).parent.parent / "records"
DIVERGED = RECORDS / "diverged"
Record = dict[str, Any]

_DATASETS = ("cifar10", "cifar10-64")


def committed(folder: Path = RECORDS) -> dict[str, Record]:
    """Reads the records of the repository: hash -> record, in order."""
    records = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        assert record is not None  # the file is there
        if record["hash"] != path.stem:
            raise InputError(f"{path} holds the record of another run, {record['hash']}")
        records[path.stem] = record
    return records


finished = finished_records
diverged = functools.partial(finished_records, name="diverged.json")
"""Reads how a workdir's runs with non-finite numbers ended: hash -> record."""


def short(commit: str | None) -> str:
    """Shortens a commit to twelve digits, and "+" if the code was changed."""
    return "unknown" if commit is None else commit[:12] + "+" * commit.endswith("+")


def new(records: Mapping[str, Record], folder: Path = RECORDS) -> tuple[dict[str, Record], int]:
    """Selects a workdir's runs on the tables' data sets that are not among the records.

    Returns:
      The new records by hash, and the number of outdated runs: a constant of the protocol has
      changed, so their hash is no longer that of their configuration.
    """
    existing = committed(folder)
    added = {
        name: record
        for name, record in records.items()
        if record["config"]["dataset"] in _DATASETS and name not in existing
    }
    current = {
        name: record
        for name, record in added.items()
        if RunConfig.from_json(record["config"]).hash == name
    }
    return current, len(added) - len(current)


def add(records: Mapping[str, Record], folder: Path = RECORDS) -> None:
    """Writes records to files named by their hashes."""
    for name, record in records.items():
        write_record(folder / f"{name}.json", record)
