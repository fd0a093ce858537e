"""The engine's own step follows the published training, step by step, in float64."""

import dataclasses
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from abflax.methods import METHODS
from abflax.methods.objective import bind
from abflax.methods.optimizer import PhaseSchedule
from abflax.models import MODELS
from abflax.training.step import create_train_state, train_step
from abflax.weights import from_torch, to_torch
from tests.conftest import under

STEPS, EVALUATION_BATCH = 3, 8
# 0.1 throughout: the phases are so long that no drop falls into the three steps.
SPAN = PhaseSchedule(0, 300, 0, 100, 200, Fraction(3))


class Trajectory:
    """Three steps of initialise and three of KD from the reference's starting values."""

    def __init__(self, data):
        self.data = data
        to_f64 = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
        self.teacher = to_f64(from_torch("wrn10-2", _start(data, "teacher/")))
        student = to_f64(from_torch("wrn10-1", under("student/before/", data)))
        self.init_phase, self.kd_phase = METHODS["activation-boundary"](protocol="official")
        if "teacher/after_init/bn1.running_mean" not in data:
            self.init_phase = _with_running_statistics(self.init_phase)

        state, self.init_loss, measured = self._run(
            self.init_phase, student, {"batch_stats": self.teacher["batch_stats"]}, connectors=True
        )
        self.init_agreement = [m["agreement"] for m in measured]
        self.after_init = state
        student = state.student
        # KD starts from the published code's own running statistics of the teacher: where they
        # drifted, PyTorch's variances are unbiased, Flax's are not, and the logits show it.
        drifted = under("teacher/after_init/", data)
        start = _start(data, "teacher/") | drifted
        teacher_stats = {"batch_stats": to_f64(from_torch("wrn10-2", start))["batch_stats"]}
        self.after_kd, self.kd_loss, _ = self._run(self.kd_phase, student, teacher_stats)

    def _run(self, phase, student, teacher_stats, connectors=False):
        models = MODELS["wrn10-1"](), MODELS["wrn10-2"]()
        objective = bind(*models, phase, (32, 32, 3))
        probe = create_train_state(objective, optax.identity(), student, teacher_stats,
                                   jax.random.key(0))  # fmt: skip
        mask = objective.trainable()
        optimizer = phase.optimizer.transformation(SPAN, mask)
        params, stats = dict(probe.params), dict(probe.batch_stats)
        if connectors:
            params["connectors"] = {"term0": self._connectors("params")}
            stats["connectors"] = {"term0": self._connectors("batch_stats")}
        state = probe.replace(params=params, batch_stats=stats, opt_state=optimizer.init(params))
        step = jax.jit(lambda state, images, labels: train_step(
            objective, optimizer, state, self.teacher["params"], images, labels))  # fmt: skip
        losses, measured = [], []
        for images in self.data["images"].astype(np.float64):
            state, metrics = step(state, images, np.zeros(EVALUATION_BATCH, np.int32))
            losses.append(metrics["loss"])
            measured.append(metrics)
        return state, jnp.stack(losses), measured

    def _connectors(self, collection):
        before = under("connectors/before/", self.data)
        tree = {}
        for index in range(3):
            name = f"layer{index + 1}"
            own = under(f"{index}.", before)
            get = lambda leaf, own=own: np.asarray(own[leaf], np.float64)
            if collection == "params":
                tree[f"{name}_conv"] = {"kernel": get("0.weight")[:, :, 0, 0].T}
                tree[f"{name}_norm"] = {"scale": get("1.weight"), "bias": get("1.bias")}
            else:
                tree[f"{name}_norm"] = {"mean": get("1.running_mean"), "var": get("1.running_var")}
        return tree


@pytest.fixture(scope="module", params=["steps_teacher_eval", "steps_teacher_train"])
def trajectory(request, reference):
    with jax.enable_x64(True):
        yield Trajectory(reference(request.param))


def test_initialise_losses_and_agreement(trajectory):
    data = trajectory.data
    chex.assert_trees_all_close(trajectory.init_loss, data["init/loss"], rtol=1e-9)
    ours = [[float(step[f"layer{i}"]) for i in (1, 2, 3)] for step in trajectory.init_agreement]
    chex.assert_trees_all_close(np.array(ours), data["init/agreement"], atol=1e-9)


def test_student_after_initialise(trajectory):
    _assert_student(trajectory, trajectory.after_init, "student/after_init/", passes=3)


def test_connectors_after_initialise(trajectory):
    state, data = trajectory.after_init, trajectory.data
    params = flatten_dict(state.params["connectors"]["term0"], sep="/")
    stats = flatten_dict(state.batch_stats["connectors"]["term0"], sep="/")
    before, after = under("connectors/before/", data), under("connectors/after_init/", data)
    for index, side in enumerate((32, 16, 8)):
        name = f"layer{index + 1}"
        own = {k: v.astype(np.float64) for k, v in under(f"{index}.", after).items()}
        close = lambda ours, leaf, own=own: chex.assert_trees_all_close(
            ours, own[leaf], rtol=1e-9, atol=1e-9
        )
        close(params[f"{name}_conv/kernel"].T[:, :, None, None], "0.weight")
        close(params[f"{name}_norm/scale"], "1.weight")
        close(params[f"{name}_norm/bias"], "1.bias")
        close(stats[f"{name}_norm/mean"], "1.running_mean")
        key = f"{index}.1.running_var"
        biased = _biased(before[key], after[key], EVALUATION_BATCH * side * side, passes=3)
        chex.assert_trees_all_close(stats[f"{name}_norm/var"], biased, rtol=1e-9, atol=1e-9)


def test_classifier_is_frozen_while_initialising(trajectory):
    before = under("student/before/", trajectory.data)
    after = trajectory.after_init.params["student"]["classifier"]
    chex.assert_trees_all_equal(after["kernel"].T, before["fc.weight"].astype(np.float64))
    chex.assert_trees_all_equal(after["bias"], before["fc.bias"].astype(np.float64))


def test_teacher_statistics(trajectory):
    moved = trajectory.after_init.batch_stats["teacher"]["batch_stats"]
    after = under("teacher/after_init/", trajectory.data)
    if not after:
        chex.assert_trees_all_equal(moved, trajectory.teacher["batch_stats"])
        return
    ours = to_torch(MODELS["wrn10-2"](), {"params": {}, "batch_stats": moved})
    before = _start(trajectory.data, "teacher/")
    for name, value in _statistics(after).items():
        if name.endswith("running_var"):
            value = _biased(before[name], value, EVALUATION_BATCH * _positions(name), passes=3)
        chex.assert_trees_all_close(ours[name], value, rtol=1e-9, atol=1e-9)


def test_kd(trajectory):
    chex.assert_trees_all_close(trajectory.kd_loss, trajectory.data["kd/loss"], rtol=1e-9)
    _assert_student(trajectory, trajectory.after_kd, "student/after_kd/", passes=6)


def _assert_student(trajectory, state, prefix, passes):
    variables = state.student
    ours = to_torch(MODELS["wrn10-1"](), variables)
    before, after = under("student/before/", trajectory.data), under(prefix, trajectory.data)
    names = [name for name in after if not name.endswith("num_batches_tracked")]
    assert set(names) == set(ours)
    for name in names:
        value = after[name].astype(np.float64)
        if name.endswith("running_var"):
            value = _biased(before[name], value, EVALUATION_BATCH * _positions(name), passes)
        chex.assert_trees_all_close(ours[name], value, rtol=1e-9, atol=1e-9)


def _biased(before, after, n, passes):
    """Flax's running variance for PyTorch's, whose every contribution is n/(n−1) as large."""
    kept = 0.9**passes * np.asarray(before, np.float64)
    return kept + (np.asarray(after, np.float64) - kept) * (n - 1) / n


def _positions(name):
    side = {"block1": 32, "block2": 16, "block3": 8, "bn1": 8}[name.split(".")[0]]
    if name.startswith(("block2.layer.0.bn1", "block3.layer.0.bn1")):
        side *= 2
    return side * side


def _start(data, prefix):
    return {k: v for k, v in under(prefix, data).items() if not k.startswith("after_init/")}


def _statistics(entries):
    return {k: v for k, v in entries.items() if not k.endswith("num_batches_tracked")}


def _with_running_statistics(phase):
    return dataclasses.replace(phase, teacher_batch_statistics=False)
