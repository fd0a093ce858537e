"""Students that are trained in one program: the numbers, files and ends of students alone."""

import dataclasses
import os
import signal

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn

from abflax import InputError, Network, Resources, Seeds, Tapped, distill, load
from abflax.interrupt import Interrupted
from abflax.progress import Silent
from abflax.record import read_record

RESOURCES = Resources(devices=1, checkpoint_seconds=0.0)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, images, train: bool):
        x = nn.Conv(self.width, (3, 3), strides=2)(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def train():
    data = load("digits", "train").take(np.arange(64))
    student, teacher = (Tapped(Net(width), {"layer1": "BatchNorm_0"}) for width in (2, 4))
    variables = teacher.model.init(jax.random.key(0), data.images[:1], train=False)
    known = Network(teacher, jax.tree.map(np.asarray, dict(variables)), "teacher")

    def call(**options):
        settings = {"epochs": (1, 2), "batch_size": 16, "protocol": "official"} | options
        return distill(student, known, data, test=data, resources=RESOURCES, **settings)

    return call


@pytest.fixture(scope="module")
def alone(train):
    """weights seed -> a run of its own, in float64."""
    return {
        weights: train(seeds=Seeds(weights, 7, 7, 7), precision="float64", epochs=(2, 0))
        for weights in (3, 4)
    }


def test_the_numbers_of_runs_alone(train, alone, tmp_path):
    """The teacher is on batch statistics while they initialise, which move for all alike."""
    both = {"seeds": Seeds(3, 7, 7, 7), "abreast": (4,)}
    first = train(**both, precision="float64", epochs=(2, 0), workdir=tmp_path)
    (second,) = first.abreast
    for together, weights in ((first, 3), (second, 4)):
        chex.assert_trees_all_close(together.variables, alone[weights].variables, rtol=1e-9)
        assert together.record["config"] == alone[weights].record["config"]
        assert together.record["config"]["seeds"]["weights"] == weights
        assert together.record["environment"]["abreast"] == 2
        assert "abreast" not in alone[weights].record["environment"]
        for one, other in zip(
            together.record["history"], alone[weights].record["history"], strict=True
        ):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
            assert one["agreement"] == pytest.approx(other["agreement"], rel=1e-9)
        assert read_record(together.directory / "record.json") == together.record
    kernels = [run.variables["params"]["Conv_0"]["kernel"] for run in (first, second)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


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
    seeds = Seeds(3, 7, 7, 7)
    whole = train(seeds=seeds, abreast=(4,))
    with pytest.raises(Interrupted, match="goes on from step 2"):
        train(seeds=seeds, abreast=(4,), workdir=tmp_path, reporter=_StopAt(2))
    assert len([*(tmp_path / "runs").glob("*/checkpoints/2")]) == 2
    with pytest.raises(Interrupted, match="goes on from step 5"):
        train(seeds=dataclasses.replace(seeds, weights=4), workdir=tmp_path, reporter=_StopAt(3))
    resumed = train(seeds=seeds, abreast=(4,), workdir=tmp_path)
    again = train(seeds=seeds, abreast=(4,), workdir=tmp_path)
    for ours, theirs, found in zip(
        (resumed, *resumed.abreast), (whole, *whole.abreast), (again, *again.abreast), strict=True
    ):
        chex.assert_trees_all_close(ours.variables, theirs.variables, rtol=1e-4, atol=1e-6)
        assert found.variables is None and found.record == ours.record


@pytest.mark.slow
def test_where_one_fails_the_others_go_on(train, tmp_path):
    """A student that somebody else is at is left out."""
    from abflax import BusyError
    from abflax.lock import Lock

    seeds = Seeds(3, 7, 7, 7)
    name = train(seeds=seeds, workdir=tmp_path / "elsewhere").directory.name
    (tmp_path / "runs" / name).mkdir(parents=True)
    with (
        Lock(tmp_path / "runs" / name / "lock", "somebody's"),
        pytest.raises(BusyError),
    ):
        train(seeds=seeds, abreast=(4,), workdir=tmp_path)
    records = [*(tmp_path / "runs").glob("*/record.json")]
    assert len(records) == 1 and records[0].parent.name != name


def test_seeds_that_are_the_same(train):
    with pytest.raises(InputError, match=r"must differ abreast, not be \[3, 4, 3\]"):
        train(seeds=3, abreast=(4, 3))
