"""A Flax NNX model works as in the README."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax import Network, Resources, distill, load
from abflax.taps import marked, run_model, suggest
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
(BLOCK,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "nnx" in b)


@pytest.fixture(scope="module")
def models():
    names = {"__name__": "readme"}
    exec(BLOCK, names)
    return names


def test_taps_equal_the_network_cut_there_by_hand(models):
    student = models["student"]
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    variables = student.model.init(jax.random.key(1), images, train=False)
    assert marked(suggest(student.model, variables, images)) == {"layer1": "net/layer1"}
    p = variables["params"]["net"]
    x = nn.Conv(4, (3, 3)).apply({"params": p["conv"]}, images)
    x = (x - x.mean(axis=(0, 1, 2))) / jnp.sqrt(x.var(axis=(0, 1, 2)) + 1e-5)
    forward = run_model(student, variables, images, train=True)
    chex.assert_trees_all_close(forward.taps, {"layer1": x}, atol=1e-5)
    logits = nn.relu(x).mean(axis=(1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]
    chex.assert_trees_all_close(forward.logits, logits, atol=1e-5)
    moved = forward.batch_stats["net"]["norm"]["mean"]
    assert float(jnp.abs(moved).max()) > 0


def test_it_is_distilled(models):
    data = load("digits", "train").take(np.arange(16))
    images = data.images.astype(np.float32)
    wide = models["Tapped"](models["Bridged"](8), {"layer1": "net/layer1"})
    variables = wide.model.init(jax.random.key(2), images, train=False)
    teacher = Network(wide, {name: variables[name] for name in ("params", "batch_stats")})
    record = distill(
        models["student"], teacher, data, test=data, epochs=(20, 1), batch_size=16,
        transfer_weight=10.0, resources=Resources(devices=1),
    ).record  # fmt: skip
    agreement = [entry["agreement"]["layer1"] for entry in record["history"][:20]]
    assert agreement[-1] > agreement[0] + 0.1
