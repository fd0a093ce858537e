"""The search looks at validation data alone, and a point that diverges loses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from abflax import NonFiniteError, Result
from abflax.data import holdout, load
from abflax.methods import METHODS
from experiments import cli, search
from tests.conftest import save_random_network

SEARCHES = Path(search.__file__).parent / "records" / "search"


def _point(weight, errors, failure=None):
    records = [{"result": {"test_error": error}} for error in errors]
    return {"transfer_weight": weight, "records": records, "failure": failure}


def test_best():
    points = [_point(0.1, [0.3, 0.5]), _point(1.0, [0.2, 0.3]), _point(10.0, [0.1], "diverged")]
    assert search.best(points) == 1.0
    with pytest.raises(search.InputError, match="every point of the grid diverged"):
        search.best([_point(1.0, [], "diverged")])


def test_search(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "cache_compilation", lambda workdir: None)
    seen = []
    distill = search.distill
    monkeypatch.setattr(
        search, "distill", lambda *a, **k: seen.append((a[2], k["test"])) or distill(*a, **k)
    )
    teacher = tmp_path / "teacher.npz"
    save_random_network("wrn10-1", teacher)
    monkeypatch.setattr(sys, "argv", [
        "x", "--method", "fitnet", "--dataset", "digits", "--teacher", "wrn10-1",
        "--teacher-weights", str(teacher), "--student", "wrn10-1", "--epochs", "1+1", "--fraction",
        "0.05", "--batch-size", "32", "--grid", "1,0.1", "--workdir", str(tmp_path),
    ])  # fmt: skip
    with pytest.raises(SystemExit) as left:
        cli.main(search.main)
    out = capsys.readouterr().out
    assert left.value.code == 0 and out.count("<- best") == 1
    points = json.loads(
        (tmp_path / "search" / "fitnet-paper-digits-wrn10-1-wrn10-1.json").read_text()
    )
    assert [point["transfer_weight"] for point in points] == [0.1, 1.0]
    fitted, validation = holdout(load("digits", "train"), search.HELD_OUT, search.SPLIT_SEED)
    for trained_on, measured_on in seen:
        assert (trained_on.name, measured_on.name) == (fitted.name, validation.name)
        np.testing.assert_array_equal(measured_on.images, validation.images)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "kd"), "method kd has no transfer loss"),
        (("--method", "nts"), "did you mean nst"),
        (("--method", "nst", "--grid", "1,-1"), "must be above 0"),
        (("--method", "nst", "--grid", "one"), "'one' is no list of numbers"),
    ],
)
def test_mistakes(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main(search.main)
    err = capsys.readouterr().err
    assert left.value.code == 2 and sentence in err and err.count("\n") == 1


def test_a_point_that_diverges_does_not_end_the_search(monkeypatch, capsys, tmp_path):
    def distill(*_, transfer_weight, **__):
        if transfer_weight == 1.0:
            raise NonFiniteError("training diverged: the loss from 1 to 1e9 grew")
        record = {"result": {"test_error": 0.5 - transfer_weight / 1000}}
        return Result(record, None, tmp_path)

    monkeypatch.setattr(cli, "cache_compilation", lambda workdir: None)
    monkeypatch.setattr(search, "find_teacher", lambda *_: None)
    monkeypatch.setattr(search, "distill", distill)
    monkeypatch.setattr(sys, "argv", [
        "x", "--method", "l2", "--dataset", "digits", "--grid", "0.1,1,10", "--workdir",
        str(tmp_path),
    ])  # fmt: skip
    with pytest.raises(SystemExit) as left:
        cli.main(search.main)
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 0
    assert [line.split()[0] for line in lines if "best" in line] == ["10"]
    points = json.loads((tmp_path / "search" / "l2-paper-digits-wrn16-2-wrn16-1.json").read_text())
    assert [bool(point["failure"]) for point in points] == [False, True, False]
    assert "diverged: the loss from 1" in points[1]["failure"] and not points[1]["records"]


@pytest.mark.parametrize("path", sorted(SEARCHES.glob("*.json")), ids=lambda path: path.stem)
def test_the_weight_in_use_is_the_best_of_the_committed_search(path):
    """By validation error, whatever the unit of the grid was when the search was made."""
    points = {point["transfer_weight"]: point for point in json.loads(path.read_text())}
    record = points[search.best(list(points.values()))]["records"][0]
    config = record["config"]
    assert config["test"].startswith("validation of ")
    found = [term for phase in record["phases"] for term in phase["objective"]["terms"]]
    used = METHODS[config["method"]](protocol=config["protocol"], setting=config["setting"])
    weighted = [(weight, type(term).__name__) for phase in used for weight, term in phase.terms]
    assert weighted == [(pytest.approx(weight), kind) for weight, kind, _ in found]
