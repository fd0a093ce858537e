"""The search uses validation data alone, and a point that diverges loses."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from abflax import NonFiniteError, Result
from abflax.data import holdout, load
from abflax.methods import METHODS
from experiments import search
from tests.conftest import save_random_network
from tests.experiments.conftest import plain

SEARCHES = Path(search.__file__).parent / "records" / "search"


def _point(weight, errors, failure=None):
    records = [{"result": {"test_error": error}} for error in errors]
    return {"transfer_weight": weight, "records": records, "failure": failure}


def test_best():
    points = [_point(0.1, [0.3, 0.5]), _point(1.0, [0.2, 0.3]), _point(10.0, [0.1], "diverged")]
    assert search.best(points) == 1.0
    with pytest.raises(search.InputError, match="every point of the grid diverged"):
        search.best([_point(1.0, [], "diverged")])


@pytest.mark.parametrize("group", [pytest.param(group, marks=pytest.mark.slow) for group in (1, 2)])
def test_search(call_command, monkeypatch, tmp_path, group):
    calls = []
    distill_group = search.distill_group

    def record_call(runs, **settings):
        calls.append((len(runs), settings["data"], settings["test"]))
        return distill_group(runs, **settings)

    monkeypatch.setattr(search, "distill_group", record_call)
    teacher = tmp_path / "teacher.npz"
    save_random_network("wrn10-1", teacher)
    code, out, err = call_command(
        search.main, "--method", "fitnet", "--dataset", "digits", "--teacher", "wrn10-1",
        "--teacher-weights", teacher, "--student", "wrn10-1", "--epochs", "1+1", "--fraction",
        "0.05", "--batch-size", "32", "--grid", "1,0.1", "--group", group, "--workdir", tmp_path,
    )  # fmt: skip
    assert code == 0 and out.count("<- best") == 1, err
    (path,) = (tmp_path / "search").glob("fitnet-paper-digits-wrn10-1-wrn10-1-????????.json")
    points = json.loads(path.read_text())
    assert [point["transfer_weight"] for point in points] == [0.1, 1.0]
    assert [len(point["records"]) for point in points] == [1, 1]
    fitted, validation = holdout(load("digits", "train"), search.HELD_OUT, search.SPLIT_SEED)
    assert [size for size, *_ in calls] == [group] * (2 // group)
    for _, trained_on, measured_on in calls:
        assert (trained_on.name, measured_on.name) == (fitted.name, validation.name)
        np.testing.assert_array_equal(measured_on.images, validation.images)


def test_other_searches_are_not_written_over(call_command, monkeypatch, tmp_path):
    """Of another grid, length, share of the data, seed, or teacher of the same architecture."""
    weights = []
    monkeypatch.setattr(
        search, "find_teacher", lambda *_: SimpleNamespace(name=f"wrn16-2:{weights[-1]}")
    )
    monkeypatch.setattr(search, "distill_group", lambda runs, **_: [
        Result({"result": {"test_error": 0.5}}, None, tmp_path) for _ in runs])  # fmt: skip
    for name, *flags in (
        ("a",), ("b",), ("a", "--grid", "1,2"), ("a", "--epochs", "1+1"), ("a", "--seeds", "1,"),
        ("a", "--fraction", "0.5"), ("a", "--grid", "2,1"), ("a",),
    ):  # fmt: skip
        weights.append(name)
        code, _, err = call_command(search.main, "--method", "l2", "--dataset", "digits",
                                    "--workdir", tmp_path, *flags)  # fmt: skip
        assert code == 0, err
    assert len(list((tmp_path / "search").glob("*.json"))) == 6  # a grid's order is no difference


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "kd"), "method kd has no transfer loss"),
        (("--method", "nts"), "did you mean nst"),
        (("--method", "nst", "--grid", "1,-1"), "must be above 0"),
        (("--method", "nst", "--grid", "one"), "'one' is no list of numbers"),
        (("--method", "nst", "--group", "0"), "--group must be at least 1, not 0"),
        ((), "Missing from python -m experiments.search: --method"),
    ],
)
def test_mistakes(call_command, arguments, sentence):
    code, _, err = call_command(search.main, *arguments)
    assert code == 2 and sentence in plain(err)


@pytest.mark.parametrize("group", [1, 3])
def test_a_point_that_diverges_does_not_end_the_search(call_command, monkeypatch, tmp_path, group):
    def distill_group(runs, **_):
        weights = [run["transfer_weight"] for run in runs]
        if 1.0 in weights:
            raise NonFiniteError("training diverged: the loss from 1 to 1e9 grew")
        errors = [0.5 - weight / 1000 for weight in weights]
        return [Result({"result": {"test_error": error}}, None, tmp_path) for error in errors]

    monkeypatch.setattr(search, "find_teacher", lambda *_: SimpleNamespace(name="wrn16-2:1"))
    monkeypatch.setattr(search, "distill_group", distill_group)
    code, out, _ = call_command(
        search.main, "--method", "l2", "--dataset", "digits", "--grid", "0.1,1,10",
        "--group", group, "--workdir", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "best" in line] == ["10"]
    (path,) = (tmp_path / "search").glob("l2-paper-digits-wrn16-2-wrn16-1-*.json")
    points = json.loads(path.read_text())
    assert [bool(point["failure"]) for point in points] == [False, True, False]
    assert "diverged: the loss from 1" in points[1]["failure"] and not points[1]["records"]


@pytest.mark.parametrize("path", sorted(SEARCHES.glob("*.json")), ids=lambda path: path.stem)
def test_the_weight_in_use_is_the_best_of_the_committed_search(path):
    """By validation error, whatever the unit of the grid was when the search was made."""
    points = {point["transfer_weight"]: point for point in json.loads(path.read_text())}
    record = points[search.best(list(points.values()))]["records"][0]
    config = record["config"]
    assert config["test"].startswith("validation of ")
    searched = [term for phase in record["phases"] for term in phase["objective"]["terms"]]
    used = METHODS[config["method"]](protocol=config["protocol"], setting=config["setting"])
    weighted = [(weight, type(term).__name__) for phase in used for weight, term in phase.terms]
    assert weighted == [(pytest.approx(weight), kind) for weight, kind, _ in searched]
