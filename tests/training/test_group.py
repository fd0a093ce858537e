"""Runs of a group have the numbers, files and ends of runs alone."""

import dataclasses
import functools
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
    distill_group,
    load,
)
from abflax.methods import METHODS
from abflax.methods.objective import bind, make_all_targets
from abflax.runtime.preemption import Interrupted
from abflax.training.loop import train as train_runs
from abflax.training.record import read_record
from tests.stopping import StopAt

RESOURCES = Resources(devices=1, checkpoint_seconds=0.0)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, images, train: bool):
        # Of a bias before a batch norm, rounding alone would be compared.
        x = nn.Conv(self.width, (3, 3), strides=2, use_bias=False)(images)
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
        beside = options.pop("group", None)
        if beside is None:
            return distill(**settings | options)
        return distill_group([{}, *beside], **settings | options)

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


@pytest.mark.parametrize("beside", [BESIDE[:1], pytest.param(BESIDE, marks=pytest.mark.slow)])
def test_the_numbers_of_runs_alone(train, tmp_path, beside):
    """The teacher is on batch statistics while they initialise, which move for all alike."""
    common = {"seeds": SEEDS, "precision": "float64", "epochs": (1, 1)}
    results = train(**common, group=beside, workdir=tmp_path)
    assert len({run.record["hash"] for run in results}) == len(results)
    for changed, together in zip(({}, *beside), results, strict=True):
        alone = train(**common | changed)
        chex.assert_trees_all_close(together.variables, alone.variables, rtol=1e-9)
        assert together.record["config"] == alone.record["config"]
        assert together.record["environment"]["abreast"] == len(results)
        assert "abreast" not in alone.record["environment"]
        for one, other in zip(together.record["history"], alone.record["history"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
            assert one["agreement"] == pytest.approx(other["agreement"], rel=1e-9)
        assert read_record(together.directory / "record.json") == together.record
    kernels = [run.variables["params"]["Conv_0"]["kernel"] for run in results[:2]]
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
            variables["params"], {"batch_stats": variables["batch_stats"]}, np.zeros((2, 8, 8, 1))
        ))  # fmt: skip
        return found.count("conv_general_dilated[")

    alone = [forward_passes(objective) for objective in objectives]
    assert alone == [1, 1, 1, 0, 2]  # one of Jacobian matching's goes backwards
    assert forward_passes(*objectives[:4]) == 1 and forward_passes(*objectives) == 2


@pytest.mark.slow
def test_both_are_saved_when_stopped_and_either_goes_on_alone(train, tmp_path):
    """From different steps as well: the one behind is alone until they meet."""
    beside = BESIDE[:1]
    whole = train(seeds=SEEDS, group=beside)
    with pytest.raises(Interrupted, match="goes on from step 2"):
        train(seeds=SEEDS, group=beside, workdir=tmp_path, reporter=StopAt(2))
    assert len([*(tmp_path / "runs").glob("*/checkpoints/2")]) == 2
    with pytest.raises(Interrupted, match="goes on from step 5"):
        train(**beside[0], workdir=tmp_path, reporter=StopAt(3))
    resumed = train(seeds=SEEDS, group=beside, workdir=tmp_path)
    again = train(seeds=SEEDS, group=beside, workdir=tmp_path)
    for ours, theirs, found in zip(resumed, whole, again, strict=True):
        chex.assert_trees_all_close(ours.variables, theirs.variables, rtol=1e-4, atol=1e-6)
        assert found.trained is None and found.record == ours.record


@pytest.mark.slow
def test_where_one_fails_the_others_go_on(train, tmp_path):
    """A student that somebody else is at is left out."""
    from abflax.storage.lock import Lock

    name = train(seeds=SEEDS, workdir=tmp_path / "elsewhere").directory.name
    (tmp_path / "runs" / name).mkdir(parents=True)
    with (
        Lock(tmp_path / "runs" / name / "lock", "somebody's"),
        pytest.raises(BusyError),
    ):
        train(seeds=SEEDS, group=BESIDE[:1], workdir=tmp_path)
    records = [*(tmp_path / "runs").glob("*/record.json")]
    assert len(records) == 1 and records[0].parent.name != name


@pytest.mark.slow
def test_what_is_kept_of_the_teacher_serves_each(train):
    """Each has targets of its own, and methods that need none may be beside them."""
    common = {"protocol": "paper", "views": 1, "seeds": SEEDS, "epochs": (2, 0)}
    beside = ({"method": "kd"}, {"method": "cross-entropy"}, *BESIDE)
    kept = dataclasses.replace(RESOURCES, cache_targets=True)
    one = train(**common, group=beside)
    other = train(**common, group=beside, resources=kept)
    for ours, theirs in zip(one, other, strict=True):
        losses = [[entry["loss"] for entry in run.record["history"]] for run in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": 4}, "the seed of order: 3, and 4"),
        ({"batch_size": 8}, "but of two of them batch_size: 16, and 8"),
        ({"method": "kd"}, r"the teacher's statistics drift: \(\(0, 1\),\), and \(\)"),
        ({"epochs": (2, 1)}, r"drift: \(\(0, 1\),\), and \(\(0, 2\),\)"),
        ({}, "activation-boundary, seed 3, is in the group twice"),
        ({"teacher": None}, "teacher is the same for all runs"),
        (4, "runs must be a list of settings"),
    ],
)
def test_runs_that_cannot_share_a_group(train, changed, message):
    with pytest.raises(InputError, match=message):
        train(seeds=3, group=(changed,))


class FakeRun:
    """A run that stops for evaluation after the given steps, and notes what it is given."""

    def __init__(self, evaluations, start=0, error=None, restore_error=None):
        self.evaluations, self.start, self.error_at_end = evaluations, start, error
        self.restore_error = restore_error
        self.step, self.error, self.result, self.seen = start, None, None, []

    @property
    def ended(self):
        return self.result is not None or self.error is not None

    @property
    def next_evaluation(self):
        return min(step for step in self.evaluations if step > self.step)

    @property
    def at_evaluation(self):
        return self.step in self.evaluations

    def restore(self):
        if self.restore_error is not None:
            raise self.restore_error

    def update(self, state, metrics, count):
        assert state == f"state {self.step} trained"
        self.step += count
        self.seen.append(metrics)
        if self.error_at_end is not None and self.step == self.evaluations[-1]:
            raise self.error_at_end

    def record(self, measured):
        self.seen.append(measured)
        if self.step == self.evaluations[-1]:
            self.result = self.seen

    def stop(self, signal_number):
        self.error = Interrupted(f"saved before {self.step}", signal_number)

    def fail(self, error):
        self.error = error


class FakeGroup:
    """Two steps a dispatch; notes which runs are trained and evaluated together."""

    def __init__(self, keep_going, signals):
        self.keep_going, self.signals, self.steps_per_dispatch = keep_going, signals, 2
        self.dispatched, self.preemption = [], SimpleNamespace(signal=0)

    def train_steps(self, runs, count):
        self.dispatched.append((runs[0].step, count, len(runs)))
        if len(self.dispatched) in self.signals:
            self.preemption.signal = signal.SIGTERM
        number = len(self.dispatched)
        return [(f"state {run.step} trained", (number, place)) for place, run in enumerate(runs)]

    def evaluate(self, runs):
        return [f"evaluated at {run.step}" for run in runs]


def _train(*runs, signals=(), keep_going=True):
    """Trains fake runs: (the error that `train` raises, who was dispatched with whom)."""
    group, error = FakeGroup(keep_going, signals), None
    try:
        train_runs(runs, group)
    except Exception as raised:
        error = raised
    return error, group.dispatched


def test_runs_behind_train_alone_until_they_catch_up():
    ahead, behind = FakeRun([3, 4, 5], start=2), FakeRun([1, 2, 5])
    error, dispatched = _train(ahead, behind)
    assert error is None
    assert dispatched == [(0, 1, 1), (1, 1, 1), (2, 1, 2), (3, 1, 2), (4, 1, 2)]
    assert ahead.result[-2:] == [(5, 0), "evaluated at 5"]  # in the order of the runs
    assert behind.result[-2:] == [(5, 1), "evaluated at 5"]
    assert behind.result[1] == "evaluated at 1"


def test_a_dispatch_ends_at_the_first_evaluation():
    runs = FakeRun([2, 5]), FakeRun([3, 5])
    _, dispatched = _train(*runs)
    assert dispatched == [(0, 2, 2), (2, 1, 2), (3, 2, 2)]
    assert "evaluated at 2" in runs[0].seen and "evaluated at 3" in runs[1].seen


def test_one_that_fails_leaves_the_others_running():
    failing, other = FakeRun([1, 2], error=NonFiniteError("no number")), FakeRun([1, 2, 3])
    error, dispatched = _train(failing, other)
    assert error is None and str(failing.error) == "no number" and other.result is not None
    assert dispatched == [(0, 1, 2), (1, 1, 2), (2, 1, 1)]
    failing, other = FakeRun([1], error=NonFiniteError("no number")), FakeRun([1, 2])
    _, dispatched = _train(failing, other, keep_going=False)
    assert str(failing.error) == "no number" and dispatched == [(0, 1, 2)]
    assert other.result is None and other.error is None


def test_a_signal_after_a_failure_stops_the_others():
    """A caller with more runs to start must see the interrupt."""
    failing, other = FakeRun([1], error=NonFiniteError("no number")), FakeRun([1, 2, 3])
    _, dispatched = _train(failing, other, signals=(2,))
    assert str(failing.error) == "no number"
    assert isinstance(other.error, Interrupted) and str(other.error) == "saved before 2"
    assert other.error.signal == signal.SIGTERM and dispatched == [(0, 1, 2), (1, 1, 1)]


@pytest.mark.parametrize(("kind", "others_run"), [(InputError, False), (BusyError, True)])
def test_an_input_error_is_raised_before_the_first_step(kind, others_run):
    """A run that another process trains is left to it; the others are trained."""
    refused, other = FakeRun([1], restore_error=kind("here")), FakeRun([1])
    error, dispatched = _train(refused, other)
    assert type(refused.error) is kind and bool(dispatched) == others_run
    assert (error is None) == others_run and (other.result is not None) == others_run


def test_a_signal_waits_for_the_evaluation():
    """A run that resumed after the steps would not be measured there."""
    runs = FakeRun([1, 2]), FakeRun([1, 2])
    _, dispatched = _train(*runs, signals=(1,))
    assert dispatched == [(0, 1, 2)]
    for run in runs:
        assert run.seen[-1] == "evaluated at 1" and str(run.error) == "saved before 1"
