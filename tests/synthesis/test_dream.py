"""Dreams: the published numbers, any model, any number of devices, and the same bits again."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from abflax import InputError, Interrupted, Network, Resources, load
from abflax.data import Preprocessing
from abflax.synthesis import Dreaming, dream, dream_loss
from abflax.synthesis.dream import _rolled
from abflax.taps import run_with_norms
from tests.conftest import draw_variables, under
from tests.stopping import StopAt

SHAPE = (8, 8, 3)


class Net(nn.Module):
    """The network of the file: convolution, batch norm and ReLU twice."""

    widths: tuple[int, int]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        for index, width in enumerate(self.widths):
            pad = [(1, 1), (1, 1)]
            x = nn.Conv(width, (3, 3), index + 1, pad, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class Both(nnx.Module):
    """The same in NNX."""

    def __init__(self, widths, *, rngs):
        for index, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
            conv = nnx.Conv(before, width, (3, 3), index + 1, padding=[(1, 1), (1, 1)],
                            use_bias=False, rngs=rngs)  # fmt: skip
            setattr(self, f"Conv_{index}", conv)
            setattr(self, f"BatchNorm_{index}", nnx.BatchNorm(width, rngs=rngs))
        self.Dense_0 = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x, *, train):
        for index in (0, 1):
            x = getattr(self, f"Conv_{index}")(x)
            x = nnx.relu(getattr(self, f"BatchNorm_{index}")(x, use_running_average=not train))
        return self.Dense_0(x.mean(axis=(1, 2)))


def from_file(weights):
    """The variables of the file's network."""
    params, stats = {}, {}
    for n in (1, 2):
        params[f"Conv_{n - 1}"] = {"kernel": weights[f"conv{n}.weight"].transpose(2, 3, 1, 0)}
        scale, bias = (weights[f"bn{n}.{each}"] for each in ("weight", "bias"))
        params[f"BatchNorm_{n - 1}"] = {"scale": scale, "bias": bias}
        mean, var = (weights[f"bn{n}.running_{each}"] for each in ("mean", "var"))
        stats[f"BatchNorm_{n - 1}"] = {"mean": mean, "var": var}
    params["Dense_0"] = {"kernel": weights["fc.weight"].T, "bias": weights["fc.bias"]}
    return {"params": params, "batch_stats": stats}


def test_published_numbers(reference, x64):
    """Losses, gradients and images of three Adam steps, whose learning rate warms up."""
    file = under("deepinversion/", reference("made_images"))
    c = {k.removeprefix("coefficient_"): float(v) for k, v in file.items() if "coeff" in k}
    how = Dreaming(
        steps=2000, learning_rate=c["lr"], warmup=100, statistics=c["r_feature"],
        first_statistics=c["first_bn_multiplier"], tv_l1=c["tv_l1"], tv_l2=c["tv_l2"],
        l2=c["l2"], competition=c["adi_scale"], jitter=0, flip=False,
    )  # fmt: skip
    networks = [
        (Net(widths), from_file(under(f"{name}/", file)))
        for name, widths in (("teacher", (6, 8)), ("student", (4, 5)))
    ]
    images, labels = jnp.asarray(file["images"]), jnp.asarray(file["targets"])
    optimizer = optax.adam(how.rate)
    value = jax.jit(
        jax.value_and_grad(lambda x: dream_loss(how, *networks, x, labels), has_aux=True)
    )
    (_, parts), _ = value(images)
    for name, key in {"statistics": "r_feature_first10", "l2": "l2", "tv_l1": "tv_l1",
                      "competition": "competition"}.items():  # fmt: skip
        chex.assert_trees_all_close(parts[name], jnp.asarray(file[key]), rtol=1e-9)
    state = optimizer.init(images)
    for index, rate in enumerate(file["learning_rates"]):
        chex.assert_trees_all_close(how.rate(index), jnp.asarray(rate), rtol=1e-12)
        (loss, _), gradient = value(images)
        chex.assert_trees_all_close(loss, jnp.asarray(file["losses"][index]), rtol=1e-9)
        expected = file["gradients"][index]
        scale = np.abs(expected).max()
        chex.assert_trees_all_close(gradient, jnp.asarray(expected), rtol=1e-9, atol=1e-12 * scale)
        updates, state = optimizer.update(gradient, state)
        images = optax.apply_updates(images, updates)
        expected = jnp.asarray(file["images_after"][index])
        chex.assert_trees_all_close(images, expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def network():
    return Network(Net((4, 6)), draw_variables(Net((4, 6)), SHAPE), "drawn")


def test_linen_and_nnx_have_the_same_batch_norms(network):
    images = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    logits, norms = run_with_norms(network.model, network.variables, images)
    assert list(norms) == ["BatchNorm_0", "BatchNorm_1"]
    other = Network(Both((4, 6), rngs=nnx.Rngs(0)))
    theirs, found = run_with_norms(other.model, network.variables, images)
    chex.assert_trees_all_close((theirs, found), (logits, norms), rtol=1e-5, atol=1e-6)
    x = nn.Conv(4, (3, 3), 1, [(1, 1)] * 2, use_bias=False).apply(
        {"params": network.variables["params"]["Conv_0"]}, images
    )
    chex.assert_trees_all_close(norms["BatchNorm_0"][0], x, rtol=1e-6)


COMMON = {"key": jax.random.key(3), "image_shape": SHAPE, "steps": 6, "batch_size": 8,
          "preprocessing": Preprocessing((100.0,), (50.0,))}  # fmt: skip


@pytest.mark.slow
def test_devices_dispatches_and_sittings_change_nothing(network, tmp_path):
    """Two batches; stopped in the second, gone on with, and read again."""
    one = {"resources": Resources(devices=1), "stands_for": "digits"}
    images = dream(network, 10, **COMMON, **one)
    assert images.labels.tolist() == list(range(10)) and images.num_classes == 10
    assert images.images.min() >= 0 and images.images.max() <= 255 and images.images.std() > 10
    with pytest.raises(Interrupted, match="step 9 of 12"):
        dream(network, 10, workdir=tmp_path, reporter=StopAt(9), **COMMON, **one)
    again = dream(network, 10, workdir=tmp_path, **COMMON, **one)
    assert np.array_equal(again.images, images.images)
    stored = load(f"dreamed:{tmp_path}", "train")
    assert np.array_equal(stored.images, images.images) and stored.name == again.name
    assert load(f"dreamed:{tmp_path}", "test").name == "digits"
    many = dream(network, 10, **COMMON, resources=Resources(devices=4, steps_per_dispatch=4))
    assert np.abs(many.images - images.images).max() < 0.05
    with pytest.raises(InputError, match="other networks or settings"):
        dream(network, 11, workdir=tmp_path, **COMMON, **one)


def test_what_cannot_be_right(network):
    for wrong, says in (
        ({"stepps": 3}, "no setting stepps"),
        ({"steps": 0}, "at least 1"),
        ({"competition": 0.2}, "a competition needs both"),
        ({"batch_size": 9}, "does not divide"),
    ):
        with pytest.raises(InputError, match=says):
            dream(network, 4, **COMMON | wrong)
    with pytest.raises(InputError, match="no finished dreams"):
        load("dreamed:nowhere", "train")


def test_images_roll_alike_or_each_on_its_own():
    images = np.arange(24.0).reshape(2, 3, 4, 1)
    alike = _rolled(jnp.asarray(images), jnp.asarray([-1]), 2)
    assert np.array_equal(alike, np.roll(images, -1, 2))
    each = _rolled(jnp.asarray(images), jnp.asarray([1, -2]), 1)
    assert np.array_equal(each[0], np.roll(images[0], 1, 0))
    assert np.array_equal(each[1], np.roll(images[1], -2, 0))
