"""Students that are trained in one program: the numbers, files and ends of students alone."""

import dataclasses
import functools
import os
import signal
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn

from abflax import (
    BusyError,
    InputError,
    Network,
    NonFiniteError,
    Resources,
    Seeds,
    Tapped,
    distill,
    load,
)
from abflax.abreast import Dispatch, drive
from abflax.interrupt import Interrupted
from abflax.methods import METHODS
from abflax.progress import Silent
from abflax.record import read_record
from abflax.step import bind, make_all_targets

RESOURCES = Resources(devices=1, checkpoint_seconds=0.0)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, images, train: bool):
        x = nn.Conv(self.width, (3, 3), strides=2)(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))


STUDENT, TEACHER = (Tapped(Net(width), {"layer1": "BatchNorm_0"}) for width in (2, 4))


@pytest.fixture(scope="module")
def train():
    data = load("digits", "train").take(np.arange(64))
    known = Network(TEACHER, _drawn(TEACHER, data.images[:1]), "teacher")

    def call(**options):
        settings = {"student": STUDENT, "epochs": (1, 2), "batch_size": 16, "protocol": "official"}
        settings |= {"data": data, "test": data, "teacher": known, "resources": RESOURCES}
        return distill(**settings | options)

    return call


def _drawn(model, images):
    variables = model.model.init(jax.random.key(0), images, train=False)
    return jax.tree.map(np.asarray, dict(variables))


SEEDS = Seeds(3, 7, 7, 7)
BESIDE = (
    {"seeds": dataclasses.replace(SEEDS, weights=4)},
    {"margin": 2.0, "student": Tapped(Net(3), {"layer1": "BatchNorm_0"})},
    {"method": "l2"},
)


def test_the_numbers_of_runs_alone(train, tmp_path):
    """The teacher is on batch statistics while they initialise, which move for all alike."""
    common = {"seeds": SEEDS, "precision": "float64", "epochs": (1, 1)}
    first = train(**common, abreast=BESIDE, workdir=tmp_path)
    assert len({run.record["hash"] for run in (first, *first.abreast)}) == 4
    for changed, together in zip(({}, *BESIDE), (first, *first.abreast), strict=True):
        alone = train(**common | changed)
        chex.assert_trees_all_close(together.variables, alone.variables, rtol=1e-9)
        assert together.record["config"] == alone.record["config"]
        assert together.record["environment"]["abreast"] == 4
        assert "abreast" not in alone.record["environment"]
        for one, other in zip(together.record["history"], alone.record["history"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
            assert one["agreement"] == pytest.approx(other["agreement"], rel=1e-9)
        assert read_record(together.directory / "record.json") == together.record
    kernels = [run.variables["params"]["Conv_0"]["kernel"] for run in (first, first.abreast[0])]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_the_teacher_passes_once():
    """Whatever the objectives ask of it: also what they can be pulled back to."""
    variables = _drawn(TEACHER, np.zeros((1, 8, 8, 1)))
    objectives = [
        bind(STUDENT, TEACHER, METHODS[name]()[0], (8, 8, 1))
        for name in ("activation-boundary", "kd", "l2", "cross-entropy", "jacobian")
    ]

    def forward_passes(*objectives):
        found = str(jax.make_jaxpr(functools.partial(make_all_targets, objectives))(
            variables["params"], variables["batch_stats"], np.zeros((2, 8, 8, 1))
        ))  # fmt: skip
        return found.count("conv_general_dilated[")

    alone = [forward_passes(objective) for objective in objectives]
    assert alone == [1, 1, 1, 0, 2]  # one of Jacobian matching's goes backwards
    assert forward_passes(*objectives[:4]) == 1 and forward_passes(*objectives) == 2


class _StopAt(Silent):
    def __init__(self, step):
        self.left = step

    def steps(self, count, images, epoch, loss):
        self.left -= count
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_both_are_saved_when_stopped_and_either_goes_on_alone(train, tmp_path):
    """From different steps as well: the one behind is alone until they meet."""
    beside = BESIDE[:1]
    whole = train(seeds=SEEDS, abreast=beside)
    with pytest.raises(Interrupted, match="goes on from step 2"):
        train(seeds=SEEDS, abreast=beside, workdir=tmp_path, reporter=_StopAt(2))
    assert len([*(tmp_path / "runs").glob("*/checkpoints/2")]) == 2
    with pytest.raises(Interrupted, match="goes on from step 5"):
        train(**beside[0], workdir=tmp_path, reporter=_StopAt(3))
    resumed = train(seeds=SEEDS, abreast=beside, workdir=tmp_path)
    again = train(seeds=SEEDS, abreast=beside, workdir=tmp_path)
    for ours, theirs, found in zip(
        (resumed, *resumed.abreast), (whole, *whole.abreast), (again, *again.abreast), strict=True
    ):
        chex.assert_trees_all_close(ours.variables, theirs.variables, rtol=1e-4, atol=1e-6)
        assert found.variables is None and found.record == ours.record


@pytest.mark.slow
def test_where_one_fails_the_others_go_on(train, tmp_path):
    """A student that somebody else is at is left out."""
    from abflax.lock import Lock

    name = train(seeds=SEEDS, workdir=tmp_path / "elsewhere").directory.name
    (tmp_path / "runs" / name).mkdir(parents=True)
    with (
        Lock(tmp_path / "runs" / name / "lock", "somebody's"),
        pytest.raises(BusyError),
    ):
        train(seeds=SEEDS, abreast=BESIDE[:1], workdir=tmp_path)
    records = [*(tmp_path / "runs").glob("*/record.json")]
    assert len(records) == 1 and records[0].parent.name != name


@pytest.mark.slow
def test_what_is_kept_of_the_teacher_serves_each(train):
    """Each has targets of its own, and methods that need none may be beside them."""
    common = {"protocol": "paper", "views": 1, "seeds": SEEDS, "epochs": (2, 0)}
    beside = ({"method": "kd"}, {"method": "cross-entropy"}, *BESIDE)
    kept = dataclasses.replace(RESOURCES, keep_targets=True)
    one = train(**common, abreast=beside)
    other = train(**common, abreast=beside, resources=kept)
    for ours, theirs in zip((one, *one.abreast), (other, *other.abreast), strict=True):
        losses = [[entry["loss"] for entry in run.record["history"]] for run in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": 4}, "the seed of order: 3, and 4"),
        ({"batch_size": 8}, "but of two of them batch_size: 16, and 8"),
        ({"method": "kd"}, r"the teacher's statistics drift: \(\(0, 1\),\), and \(\)"),
        ({"epochs": (2, 1)}, r"drift: \(\(0, 1\),\), and \(\(0, 2\),\)"),
        ({}, "activation-boundary, seed 3, is asked for twice"),
        ({"teacher": None}, "teacher is the same for all runs abreast"),
        (4, "abreast must be a tuple of"),
    ],
)
def test_runs_that_cannot_be_taught_together(train, changed, message):
    with pytest.raises(InputError, match=message):
        train(seeds=3, abreast=(changed,))


def _steps(stops, ends=None):
    """A run that stands at one step after another, and returns the metrics it was sent, or raises
    what it ends with."""
    seen = []
    try:
        for step, count in stops:
            state, metrics = yield Dispatch(step, count, None, f"state {step}")
            assert state == f"state {step} made"
            seen.append(metrics)
    except Interrupted as stop:
        raise Interrupted(f"saved before {step}", stop.signal) from None
    if ends is not None:
        raise ends
    return seen


def _drive(runs, signals=(), goes_on=True):
    """(what the runs return or None, the error or None, who was dispatched with whom)."""
    made, stop, done, error = [], SimpleNamespace(signal=0), None, None

    def make(dispatches):
        made.append((dispatches[0].step, dispatches[0].count, len(dispatches)))
        if len(made) in signals:
            stop.signal = signal.SIGTERM
        return [(f"{each.state} made", (len(made), place)) for place, each in enumerate(dispatches)]

    try:
        done = drive(runs, make, stop, goes_on)
    except (Exception, Interrupted) as raised:
        error = raised
    return done, error, made


def test_those_behind_first_until_they_meet():
    behind, ahead = [(0, 1), (1, 1), (2, 2), (4, 1)], [(2, 1), (3, 1), (4, 1)]
    done, error, made = _drive({"ahead": _steps(ahead), "behind": _steps(behind)})
    assert error is None
    assert made == [(0, 1, 1), (1, 1, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1), (4, 1, 2)]
    assert done["ahead"][-1] == (6, 0) and done["behind"][-1] == (6, 1)  # in the order of the runs


def test_one_that_fails_leaves_the_others_alone():
    failing = _steps([(0, 1), (1, 1)], NonFiniteError("no number"))
    done, error, made = _drive({"a": failing, "b": _steps([(0, 1), (1, 1), (2, 1)])})
    assert done is None and str(error) == "no number"
    assert made == [(0, 1, 2), (1, 1, 2), (2, 1, 1)]
    failing = _steps([(0, 1)], NonFiniteError("no number"))
    _, error, made = _drive({"a": failing, "b": _steps([(0, 1), (1, 1)])}, goes_on=False)
    assert str(error) == "no number" and made == [(0, 1, 2)]


def test_a_signal_after_a_failure_is_told():
    """Whoever has more to do must not go on with it."""
    failing = _steps([(0, 1)], NonFiniteError("no number"))
    runs = {"a": failing, "b": _steps([(0, 1), (1, 1), (2, 1)])}
    _, error, made = _drive(runs, signals=(2,))
    assert isinstance(error, Interrupted) and str(error) == "saved before 2"
    assert error.signal == signal.SIGTERM and made == [(0, 1, 2), (1, 1, 1)]


@pytest.mark.parametrize(("error", "goes_on"), [(InputError, False), (BusyError, True)])
def test_what_cannot_be_right_is_told_before_the_first_step(error, goes_on):
    runs = {"a": _steps([(0, 1)]), "b": _steps([], error("here"))}
    done, raised, made = _drive(runs)
    assert type(raised) is error and bool(made) == goes_on and done is None


def test_no_one_is_stopped_between_steps_and_their_evaluation():
    """A run that went on from there would not be measured."""
    runs = {"a": _steps([(0, 1), (1, 0), (1, 1)]), "b": _steps([(0, 1), (1, 1)])}
    _, error, made = _drive(runs, signals=(1,))
    assert made == [(0, 1, 2), (1, 0, 1)] and str(error) == "saved before 1"
