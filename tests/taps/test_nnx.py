"""A Flax NNX model works through Flax's own bridge to Linen."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from abflax import Network, Resources, Tapped, distill, load
from abflax.taps import marked, run_model, suggest


class Net(nnx.Module):
    def __init__(self, width, *, rngs):
        self.conv = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images, *, train):
        x = self.norm(self.conv(images), use_running_average=not train)
        self.layer1 = nnx.Intermediate(x)
        return self.head(nnx.relu(x).mean(axis=(1, 2)))


class Bridged(nn.Module):
    width: int

    @nn.compact
    def __call__(self, images, *, train):
        return nnx.bridge.to_linen(Net, self.width, name="net")(images, train=train)


@pytest.fixture(scope="module")
def models():
    return {"student": Tapped(Bridged(4), {"layer1": "net/layer1"}), "Bridged": Bridged, "Net": Net}


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
    wide = Tapped(models["Bridged"](8), {"layer1": "net/layer1"})
    variables = wide.model.init(jax.random.key(2), images, train=False)
    teacher = Network(wide, {name: variables[name] for name in ("params", "batch_stats")})
    record = distill(
        models["student"], teacher, data, test=data, epochs=(20, 1), batch_size=16,
        transfer_weight=10.0, resources=Resources(devices=1),
    ).record  # fmt: skip
    agreement = [entry["agreement"]["layer1"] for entry in record["history"][:20]]
    assert agreement[-1] > agreement[0] + 0.1
