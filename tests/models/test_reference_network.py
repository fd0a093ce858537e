"""Compares taps, logits and running statistics of wrn10-1 with the published code."""

import chex
import jax
import pytest

from abflax.models import MODELS
from abflax.taps import run_model
from abflax.weights import from_torch, to_torch
from tests.conftest import under


@pytest.fixture(scope="module")
def network(reference):
    data = reference("wrn10_1")
    variables = from_torch("wrn10-1", under("state_dict/", data))
    model = MODELS["wrn10-1"]()
    run = jax.jit(lambda images, train: run_model(model, variables, images, train=train),
                  static_argnums=1)  # fmt: skip
    return data, model, variables, run


def test_evaluation_mode(network):
    data, _, _, run = network
    forward = run(data["images"], False)
    wanted = {f"layer{i}": data[f"eval/layer{i}"] for i in (1, 2, 3)}
    chex.assert_trees_all_close(forward.taps, wanted, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(forward.logits, data["eval/logits"], rtol=1e-4, atol=1e-4)


def test_training_mode_moves_the_running_statistics_once(network):
    data, model, variables, run = network
    forward = run(data["images"], True)
    chex.assert_trees_all_close(forward.logits, data["train/logits"], rtol=1e-4, atol=1e-4)
    after = to_torch(model, {"params": {}, "batch_stats": forward.batch_stats})
    before = under("state_dict/", data)
    for name, value in under("train/after/", data).items():
        if name.endswith("running_var"):
            # PyTorch's running variance is the unbiased one: n/(n−1) of what Flax has.
            n = len(data["images"]) * _positions(name)
            value = 0.9 * before[name] + (value - 0.9 * before[name]) * (n - 1) / n
        chex.assert_trees_all_close(after[name], value, rtol=1e-4, atol=1e-5)


def test_round_trip_is_exact(network):
    data, model, variables, _ = network
    original = {
        k: v for k, v in under("state_dict/", data).items() if not k.endswith("num_batches_tracked")
    }
    chex.assert_trees_all_equal(to_torch(model, variables), original)


def _positions(name: str) -> int:
    """Counts the positions of the batch norm of that published name, on 32×32 images."""
    side = {"block1": 32, "block2": 16, "block3": 8, "bn1": 8}[name.split(".")[0]]
    if name.startswith(("block2.layer.0.bn1", "block3.layer.0.bn1")):
        side *= 2  # the first norm of a group still sees the resolution of the group before
    return side * side
