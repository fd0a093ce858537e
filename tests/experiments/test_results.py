"""README, RESULTS.md, BENCH.md and RELIABILITY.md say what the committed records say."""

import json
from types import SimpleNamespace

from abflax.config import RunConfig
from abflax.training.record import write_record
from experiments.bench import PUBLISHED
from experiments.benchmark import report
from experiments.paper_tables.records import DIVERGED, RECORDS, add, committed, finished, new
from experiments.results import FIGURES, README, RESULTS, begun, overview, page, with_table
from tests import crash


def test_results_are_rebuilt_byte_for_byte():
    records, diverged = committed(), committed(DIVERGED)
    assert RESULTS.read_text() == page(records, diverged)
    readme = README.read_text()
    assert readme == with_table(readme, overview(records, diverged))


def test_the_other_pages_are_rebuilt_byte_for_byte():
    kept = sorted(PUBLISHED.glob("*.json"))
    benchmark = report.page([json.loads(path.read_text()) for path in kept])
    assert (PUBLISHED.parent.parent / "BENCH.md").read_text() == benchmark
    assert crash.PAGE.read_text() == crash.page(json.loads(crash.FACTS.read_text()))


def test_every_table_has_its_picture():
    names = {
        f"table{each.table.name}-{each.table.scale}.png"
        for each in begun(committed())
        if each.table.picture
    }
    assert {path.name for path in FIGURES.iterdir()} == names


def test_records_are_named_by_their_configuration():
    for name, record in committed().items():
        assert RunConfig.from_json(record["config"]).hash == name
        assert (RECORDS / f"{name}.json").is_file()


def test_outdated_runs_are_not_added(tmp_path):
    """A record whose constants are no longer those of its method's name is another run's."""
    name, record = next(iter(committed().items()))
    moved = {**record, "hash": "0123456789ab"}
    digits = {**record, "hash": "ba9876543210", "config": {**record["config"], "dataset": "digits"}}
    for each in (record, moved, digits):
        folder = tmp_path / "workdir" / "runs" / each["hash"]
        folder.mkdir(parents=True)
        write_record(folder / "record.json", each)
    found, outdated = new(finished(tmp_path / "workdir"), tmp_path / "records")
    assert found == {name: record} and outdated == 1
    add(found, tmp_path / "records")
    assert committed(tmp_path / "records") == {name: record}
    write_record(tmp_path / "workdir" / "runs" / name / "record.json", {**record, "seconds": 1.0})
    again = finished(tmp_path / "workdir")
    assert new(again, tmp_path / "records") == ({}, 1)  # what is there stays


def _hash_of_recorded_phases(record, monkeypatch):
    """The hash with the phases that the record states, not those of today's protocol."""
    phases = [SimpleNamespace(as_json=lambda p=p: p["objective"]) for p in record["phases"]]
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "phases", lambda self: phases)
        return RunConfig.from_json(record["config"]).hash


def test_every_committed_record_is_named_by_its_configuration(monkeypatch):
    runs = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    runs += [json.loads(path.read_text()) for path in sorted(DIVERGED.glob("*.json"))]
    searches = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("search/*.json"))]
    # A search's points are in units of the protocol's constant of its time, which it has replaced.
    points = [record for search in searches for point in search for record in point["records"]]
    assert len(runs) >= 89 and len(points) >= 37
    for record in runs:
        assert RunConfig.from_json(record["config"]).hash == record["hash"]
    for record in (*runs, *points):
        if record["state"] == "finished":
            assert _hash_of_recorded_phases(record, monkeypatch) == record["hash"]
