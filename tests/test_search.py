"""The search looks at validation data alone, and a point that diverges loses."""

import json
import sys

import jax
import numpy as np
import pytest

from abflax import Network
from abflax.data import holdout, load
from abflax.step import init_variables
from experiments import cli, search
from tests.conftest import Small, save_random_network


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
    points = json.loads((tmp_path / "search" / "fitnet-paper.json").read_text())
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
    teacher = Network(Small(), init_variables(Small(), jax.random.key(1), (8, 8, 1)), "teacher")
    monkeypatch.setattr(cli, "cache_compilation", lambda workdir: None)
    monkeypatch.setattr(search, "find_teacher", lambda *_: teacher)
    monkeypatch.setattr(search, "MODELS", {"small": Small})
    monkeypatch.setattr(sys, "argv", [
        "x", "--method", "l2", "--dataset", "digits", "--student", "small", "--epochs", "1+1",
        "--fraction", "0.05", "--batch-size", "32", "--grid", "1,1e25,1e30", "--workdir",
        str(tmp_path),
    ])  # fmt: skip
    with pytest.raises(SystemExit) as left:
        cli.main(search.main)
    out = capsys.readouterr().out
    assert left.value.code == 0 and out.count("diverged") == 2
    first, *others = json.loads((tmp_path / "search" / "l2-paper.json").read_text())
    assert first["failure"] is None and len(first["records"]) == 1
    for point in others:
        assert "of phase initialise" in point["failure"] and not point["records"]
        assert "every tap is finite, the gradient" in point["failure"]
