"""The same command has the same bits; each seed changes what it names, and nothing else."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax import Network, Seeds, Tapped, load
from abflax.config import Resources, RunConfig
from abflax.data import DataSets, augment
from abflax.runtime.reporter import NullReporter
from abflax.training.group import TrainingGroup
from abflax.training.run import Run
from abflax.training.run_directory import RunDirectory
from tests import QUICK
from tests.conftest import ROOT, save_random_network

NAMES = [field.name for field in dataclasses.fields(Seeds)]


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(self.width, (3, 3), strides=2)(images))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class _Seen(Exception):
    """The arguments of a first dispatch."""


@pytest.fixture(scope="module")
def drawn():
    """seeds -> all that a run draws by them: what its first dispatch is given, in either phase."""
    data = load("digits", "train").take(np.arange(200))
    student, teacher = (Tapped(Net(width), {"layer1": "Conv_0"}) for width in (2, 3))
    teacher = Network(teacher, teacher.model.init(jax.random.key(0), data.images[:1]), "teacher")
    # Each pixel says where it is, so a crop or a flip shows in its corner.
    places = jnp.arange(64.0).reshape(1, 8, 8, 1).repeat(20, axis=0)

    def see(states, teacher_params, inputs, key, *_):
        raise _Seen(jax.tree.map(np.asarray, (states[0].params, inputs.images)), key, inputs)

    def draw(seeds):
        config = RunConfig("digits", "net", "teacher", epochs=(1, 1), batch_size=20, fraction=0.5,
                           seeds=seeds)  # fmt: skip
        group = TrainingGroup(config, [teacher], DataSets(data), Resources(devices=1))
        run = Run(config, student, group, RunDirectory(None, config), NullReporter())
        draws, state = {}, None
        for phase in range(2):
            run._begin_phase(phase, state)
            run.history.step = run.schedules[phase].start
            run._enter_phase()
            state = run.snapshot[1]
            with pytest.raises(_Seen) as seen:
                group.train_steps([run], 1)
            (params, images), key, inputs = seen.value.args
            crops = augment(
                places, np.arange(20), inputs.epochs[0, 0], key, group.spec.preprocessing
            )
            draws |= {
                f"weights {phase}": params, f"order {phase}": (inputs.examples, inputs.epochs),
                f"augmentation {phase}": np.asarray(crops)[:, 0, 0], f"subset {phase}": images,
            }  # fmt: skip
        return draws

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("abflax.training.group.compile_steps", lambda *_: see)
        yield draw


def _same(one, other):
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_changes_what_it_names_and_nothing_else(drawn, name):
    before = drawn(Seeds())
    after = drawn(dataclasses.replace(Seeds(), **{name: 1}))
    assert set(before) == {f"{each} {phase}" for each in NAMES for phase in (0, 1)}
    changed = {draw.split()[0] for draw in before if not _same(before[draw], after[draw])}
    assert changed == {name}
    again = drawn(Seeds())
    assert all(_same(before[draw], again[draw]) for draw in before)


def test_both_networks_of_the_weights_seed_are_drawn_by_it(drawn):
    """The student's weights, and the connectors', which are thrown away after their phase."""
    one, other = drawn(Seeds())["weights 0"], drawn(Seeds(weights=1))["weights 0"]
    assert set(one["connectors"]) == {"term0"}
    kernels = [leaf for leaf in zip(*map(jax.tree.leaves, (one, other)), strict=True)
               if leaf[0].ndim > 1]  # fmt: skip
    assert len(kernels) == 3 and not any(np.array_equal(*each) for each in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["activation-boundary", "kd"])
def test_the_same_command_twice_gives_the_same_bits(tmp_path, method):
    """In two phases and in one; each time compiled anew, in a process of its own."""
    save_random_network("wrn10-2", tmp_path / "teacher.npz")
    found = []
    for name in ("first", "second"):
        environment = os.environ | {"XLA_FLAGS": QUICK}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / f"{name}-compiled")
        command = [sys.executable, "-m", "experiments.run", "--dataset", "digits", "--method",
                   method, "--teacher", "wrn10-2", "--student", "wrn10-1", "--fraction", "0.1",
                   "--batch-size", "32", "--epochs", "1+1", "--teacher-weights",
                   tmp_path / "teacher.npz", "--workdir", tmp_path / name]  # fmt: skip
        subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment, check=True,
        )  # fmt: skip
        (run,) = (tmp_path / name / "runs").iterdir()
        record = json.loads((run / "record.json").read_text())
        for timed in (record, *record["phases"]):
            for key in ("seconds", "finished"):
                timed.pop(key, None)
        found.append((record, (run / "student.safetensors").read_bytes()))
    (record, weights), (again, same) = found
    assert weights == same
    assert record == again
    assert [phase["name"] for phase in record["phases"]] == (
        ["joint"] if method == "kd" else ["initialise", "classify"]
    )
