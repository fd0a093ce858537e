"""README, RESULTS.md, BENCH.md and RELIABILITY.md say what the committed records say."""

import json
from types import SimpleNamespace

from abflax.config import RunConfig
from abflax.training.record import write_record
from experiments.bench import COMPILED, PUBLISHED
from experiments.benchmark import report
from experiments.paper_tables.records import DIVERGED, RECORDS, add, committed, finished, new
from experiments.results import (
    FIGURES,
    README,
    RESULTS,
    overview,
    page,
    tables_with_records,
    with_table,
)
from tests import crash


def test_results_are_rebuilt_byte_for_byte():
    records, diverged = committed(), committed(DIVERGED)
    assert RESULTS.read_text() == page(records, diverged)
    readme = README.read_text()
    assert readme == with_table(readme, overview(records, diverged))


def test_the_other_pages_are_rebuilt_byte_for_byte():
    benchmark = report.page(*(
        [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        for folder in (PUBLISHED, COMPILED)
    ))  # fmt: skip
    assert (PUBLISHED.parent.parent / "BENCH.md").read_text() == benchmark
    assert crash.PAGE.read_text() == crash.page(json.loads(crash.FACTS.read_text()))


def test_every_table_has_its_picture():
    names = {
        f"table{each.table.name}-{each.table.scale}.png"
        for each in tables_with_records(committed())
        if each.table.picture
    }
    assert {path.name for path in FIGURES.iterdir()} == names


def test_records_are_named_by_their_configuration():
    for name, record in committed().items():
        assert RunConfig.from_json(record["config"]).hash == name
        assert (RECORDS / f"{name}.json").is_file()


def test_outdated_runs_are_not_added(tmp_path):
    """A record whose constants are no longer those of its method's name is another run's."""
    records = committed().items()
    name, record = next(each for each in records if each[1]["config"]["dataset"] == "cifar10")
    moved = {**record, "hash": "0123456789ab"}
    digits = {**record, "hash": "ba9876543210", "config": {**record["config"], "dataset": "digits"}}
    larger = RunConfig.from_json({**record["config"], "dataset": "cifar10-64"})
    larger = {**record, "hash": larger.hash, "config": larger.as_json()}
    for each in (record, moved, digits, larger):
        folder = tmp_path / "workdir" / "runs" / each["hash"]
        folder.mkdir(parents=True)
        write_record(folder / "record.json", each)
    found, outdated = new(finished(tmp_path / "workdir"), tmp_path / "records")
    assert found == {name: record, larger["hash"]: larger} and outdated == 1
    found.pop(larger["hash"])
    add(found, tmp_path / "records")
    assert committed(tmp_path / "records") == {name: record}
    write_record(tmp_path / "workdir" / "runs" / name / "record.json", {**record, "seconds": 1.0})
    again = finished(tmp_path / "workdir")
    assert new(again, tmp_path / "records") == ({larger["hash"]: larger}, 1)  # others stay


def _hash_of_recorded_phases(record, monkeypatch):
    """The hash with the phases that the record states, not those that its method has today."""
    phases = [SimpleNamespace(as_json=lambda p=p: p["objective"]) for p in record["phases"]]
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "phases", property(lambda self: phases))
        return RunConfig.from_json(record["config"]).hash


def _differences(recorded, current):
    """(recorded, current) of the leaves of two JSON values of one shape that differ."""
    if isinstance(recorded, dict):
        assert recorded.keys() == current.keys()
        recorded, current = ([value[key] for key in sorted(value)] for value in (recorded, current))
    if isinstance(recorded, list):
        pairs = zip(recorded, current, strict=True)
        return [leaf for pair in pairs for leaf in _differences(*pair)]
    return [] if recorded == current else [(recorded, current)]


def test_every_committed_record_is_named_by_its_configuration():
    runs = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    runs += [json.loads(path.read_text()) for path in sorted(DIVERGED.glob("*.json"))]
    assert len(runs) >= 89
    for record in runs:
        assert RunConfig.from_json(record["config"]).hash == record["hash"]


def test_every_record_of_a_search_is_named_by_its_configuration(monkeypatch):
    """With the transfer weight of its time: the search's result has replaced it in the protocol.

    So these configurations have other hashes today, but for methods whose weight stayed. All else
    in their phases is as it was, and one method's weight has changed by one factor.
    """
    count = 0
    for path in sorted(RECORDS.glob("search/*.json")):
        records = [record for point in json.loads(path.read_text()) for record in point["records"]]
        count += len(records)
        factors = set()
        for record in records:
            config = RunConfig.from_json(record["config"])
            assert _hash_of_recorded_phases(record, monkeypatch) == record["hash"]
            phases = json.loads(json.dumps([phase.as_json() for phase in config.phases]))
            changed = _differences([phase["objective"] for phase in record["phases"]], phases)
            factors |= {round(new / old, 9) for old, new in changed} or {1.0}
            assert (config.hash == record["hash"]) == (not changed)
        assert len(factors) == 1, path
    assert count >= 37
