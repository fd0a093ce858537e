"""More epochs than a finished run had: its end is the beginning, where the schedule allows it."""

import logging
from fractions import Fraction

import chex
import jax
import numpy as np
import optax
import pytest

from abflax import Network, Resources, Result, distill, load
from abflax.analysis import examine
from abflax.config import RunConfig
from abflax.methods import Optimizer, Phase, PhaseSchedule, Ramp
from abflax.methods.terms import CrossEntropy
from abflax.models.variables import init_variables
from abflax.training.history import begins
from abflax.training.record import read_record
from tests.conftest import Small, Tiny
from tests.stopping import StopAt


@pytest.fixture(scope="module")
def data():
    return load("digits", "train").take(np.arange(16))


def trained(data, epochs, **settings):
    fixed = {"method": "cross-entropy", "batch_size": 8, "resources": Resources(devices=1)}
    return distill(settings.pop("student", Small()), settings.pop("teacher", None), data,
                   epochs=epochs, **{**fixed, **settings})  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"schedule": "constant", "ema": 0.9}, id="constant"),
        pytest.param({"optimizer": optax.adam(1e-2)}, id="own", marks=pytest.mark.slow),
    ],
)
def test_a_grown_run_has_the_bits_of_one_that_was_long_from_the_start(
    data, settings, tmp_path, monkeypatch
):
    whole = trained(data, (0, 4), test=data, **settings)
    kept = {"workdir": tmp_path, "test": data, **settings}
    first = trained(data, (0, 2), **kept)
    steps = StopAt(10**6)
    grown = trained(data, (0, 4), reporter=steps, **kept)
    assert 10**6 - steps.left == 4  # two batches in each of the two new epochs
    chex.assert_trees_all_equal(grown.variables, whole.variables)
    if "ema" in settings:
        chex.assert_trees_all_equal(grown.average, whole.average)
    for ours, theirs in zip(grown.record["history"], whole.record["history"], strict=True):
        assert ours == theirs
    assert grown.record["grown_from"] == first.record["hash"] != grown.record["hash"]
    assert read_record(grown.directory / "record.json", grown.record["hash"]) == grown.record
    for length, result in (((0, 2), first), ((0, 4), grown)):
        assert trained(data, length, **kept).record == result.record
    # The longest of them is taken, and none by force.
    steps = StopAt(10**6)
    assert (
        trained(data, (0, 5), reporter=steps, **kept).record["grown_from"] == grown.record["hash"]
    )
    assert 10**6 - steps.left == 2
    assert "grown_from" not in trained(data, (0, 6), force=True, **kept).record
    # What a killed process copied half is no checkpoint.
    monkeypatch.setattr(
        "shutil.copytree", lambda source, target: target.mkdir(parents=True) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        trained(data, (0, 7), **kept)
    monkeypatch.undo()
    assert trained(data, (0, 7), **kept).record["grown_from"]


def test_a_schedule_that_has_ended_begins_anew_and_says_so(data, tmp_path, caplog):
    caplog.set_level(logging.INFO, "abflax")
    first = trained(data, (0, 2), workdir=tmp_path)
    assert not (first.directory / "end").exists() and first.connectors is None
    grown = trained(data, (0, 3), workdir=tmp_path)
    assert "grown_from" not in grown.record
    assert f"{first.record['hash']} has the same settings and fewer epochs" in caplog.text
    chex.assert_trees_all_equal(grown.variables, trained(data, (0, 3)).variables)


def test_other_data_is_another_run(data, tmp_path):
    fixed = {"workdir": tmp_path, "schedule": "constant"}
    trained(data, (0, 2), **fixed)
    other = trained(data.take(np.arange(16)[::-1]), (0, 3), **fixed)
    assert "grown_from" not in other.record


def test_weights_that_follow_the_length_of_the_phase_begin_anew(data, tmp_path):
    def run(weight, epochs, **kept):
        constant = Optimizer(decay="constant", drops=())
        phase = Phase("joint", [(weight, CrossEntropy())], constant)
        return trained(data, (epochs,), method=[phase], **kept)

    for number, weight in enumerate((Ramp(0.0, 1.0), Ramp(0.0, 1.0, 2))):
        kept = {"workdir": tmp_path / str(number)}
        first, grown = (run(weight, epochs, **kept) for epochs in (2, 4))
        expected = None if weight.epochs is None else first.record["hash"]
        assert grown.record.get("grown_from") == expected
        chex.assert_trees_all_equal(grown.variables, run(weight, 4).variables)
    uda = {"schedule": "constant", "method": "progressive-uda"}
    assert not begins(config((0, 2), **uda), config((0, 3), **uda), 256)


def config(epochs, **settings):
    settings = {"method": "cross-entropy"} | settings
    return RunConfig.create(dataset="d", student="s", teacher="t", epochs=epochs, **settings)


@pytest.mark.parametrize(
    ("shorter", "longer", "settings", "expected"),
    [
        ((0, 2), (0, 3), {"schedule": "constant"}, True),
        ((0, 3), (0, 3), {"schedule": "constant"}, False),
        ((0, 3), (0, 2), {"schedule": "constant"}, False),
        ((0, 2), (0, 3), {"schedule": "cosine"}, False),
        ((0, 2), (0, 3), {}, False),
        ((1, 2), (1, 3), {"schedule": "constant", "method": "activation-boundary"}, True),
        ((1, 2), (2, 2), {"schedule": "constant", "method": "activation-boundary"}, False),
        ((1, 0), (1, 3), {"schedule": "constant", "method": "activation-boundary"}, True),
        ((1, 2), (2, 2), {"schedule": "constant", "method": "kd"}, True),
    ],
)
def test_which_runs_begin_others(shorter, longer, settings, expected):
    assert begins(config(shorter, **settings), config(longer, **settings), 256) is expected


def test_resets_of_the_momentum_count():
    spans = [PhaseSchedule(0, steps, 0, steps, steps, Fraction(1)) for steps in (4, 8)]
    assert Optimizer(decay="constant", drops=()).begins(*spans)
    assert not Optimizer(decay="constant", drops=(), resets=(0.5,)).begins(*spans)
    settings = [("constant", (0.5,), ()), ("steps", (), ()), ("steps", (0.5,), ()),
                ("cosine", (), ()), ("constant", (), (0.5,))]  # fmt: skip
    found = [Optimizer(decay=d, drops=drops, resets=r).endless for d, drops, r in settings]
    assert found == [True, True, False, False, False]


def test_the_connectors_of_the_initialise_phase_stay(data, tmp_path):
    """At its end, the agreement through them is that of the record, layer by layer."""
    model = Tiny(12)
    teacher = Network(model, init_variables(model, jax.random.key(7), (8, 8, 1)), "t")
    settings = {"student": Tiny(6), "teacher": teacher, "method": "activation-boundary",
                "test": data, "schedule": "constant", "workdir": tmp_path}  # fmt: skip
    first = trained(data, (1, 0), **settings)
    student = Network(Tiny(6), first.variables)
    found = examine(student, data, teacher, first.connectors)
    measured = {layer: match.agreement for layer, match in found.match.items()}
    assert measured == pytest.approx(first.record["result"]["agreement"], abs=1e-6)
    assert found.unmatched == () and found.student.firing_rate["layer1"].shape == (8, 8, 6)
    assert examine(student, data, teacher).unmatched == ("layer1", "layer2")
    grown = trained(data, (1, 1), **settings)
    assert grown.record["grown_from"] == first.record["hash"]
    again = Result(grown.record, None, grown.directory)
    chex.assert_trees_all_equal(again.connectors, first.connectors)
    alone = trained(data, (1, 1), **settings | {"workdir": None})
    chex.assert_trees_all_equal(alone.connectors, first.connectors)
