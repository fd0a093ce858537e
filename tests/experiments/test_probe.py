"""A linear probe of a network's features."""

import json

import numpy as np
import pytest

from abflax import load
from abflax.weights import load_network
from experiments import probe
from tests.conftest import ROOT, save_random_network


def test_probe(call_command, tmp_path):
    """Ten images a class tell digits better than two, even by random features."""
    weights = tmp_path / "random.npz"
    save_random_network("wrn10-1", weights)
    line = ("--teacher", "wrn10-1", "--teacher-weights", weights, "--dataset", "digits")
    code, out, err = call_command(
        probe.main, *line, "--per-class", "2,10", "--workdir", tmp_path / "w"
    )
    assert code == 0, err
    record = json.loads((tmp_path / "w" / "probe" / "wrn10-1-digits.json").read_text())
    errors = record["test_error"]
    assert errors["10"] < errors["2"] < 0.9 and f"{100 * (1 - errors['10']):.2f} % right" in out
    assert record["teacher"] == load_network("wrn10-1", weights).name
    for wrong in ("1", "all", "0,5"):
        code, _, err = call_command(probe.main, *line, "--per-class", wrong)
        assert code == 2 and "is no list of numbers" in err


def test_features_are_those_of_every_example(tmp_path):
    """Also of the last, which shares its batch with padding."""
    save_random_network("wrn10-1", tmp_path / "random.npz")
    teacher = load_network("wrn10-1", tmp_path / "random.npz")
    data = load("digits", "test").take(np.arange(130))
    features = probe._features(teacher, data)
    alone = probe._features(teacher, data.take(np.arange(120, 130)))
    assert len(features) == 130 and features[120:] == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_the_page_says_what_was_measured():
    path = ROOT / "experiments" / "records" / "probe" / "efficientnet-lite0-cifar10-64.json"
    errors = json.loads(path.read_text())["test_error"]
    page = (ROOT / "docs" / "reproduce.md").read_text()
    assert f"| training images of a class | {' | '.join(errors)} |" in page
    shown = " | ".join(f"{100 * (1 - error):.2f}" for error in errors.values())
    assert f"| accuracy, % | {shown} |" in page
