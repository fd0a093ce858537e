"""Networks for photographs, of a few blocks: taps, gradients, pooling, names in state dicts."""

import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax import models
from abflax.errors import InputError
from abflax.methods import METHODS
from abflax.methods.objective import bind
from abflax.models import EfficientNetLite, MobileNetV1, MobileNetV2, ResNet
from abflax.models.resnet import _max_pool
from abflax.taps import run_model
from abflax.weights import from_torch, load_network, save_state_dict, to_torch
from tests.conftest import draw_variables

SHAPE = (12, 10, 3)
V2_STAGES = (1, 1, 1, 1, 0, 1, 0)
# For each: the module, the submodules whose outputs are taps, and the one before the pooling.
TINY = {
    "resnet": (
        functools.partial(ResNet, stage_sizes=(1, 1), width=0.125),
        {"layer1": "stage1_block0", "layer2": "stage2_block0"},
        nn.relu,
    ),
    "v1": (
        functools.partial(MobileNetV1, stage_sizes=(1, 1, 1), width=0.25),
        {"layer1": "block2/pointwise_norm", "layer2": "block3/pointwise_norm"},
        nn.relu,
    ),
    "v2": (
        functools.partial(MobileNetV2, stage_sizes=V2_STAGES, width=0.25),
        {f"layer{i}": f"block{i + 2}/expand_norm" for i in (1, 2, 3)} | {"layer4": "last_norm"},
        nn.relu6,
    ),
    "v2-torchvision": (
        functools.partial(
            MobileNetV2, stage_sizes=V2_STAGES, width=0.25, first_expansion=False
        ),
        {f"layer{i}": f"block{i + 2}/expand_norm" for i in (1, 2, 3)} | {"layer4": "last_norm"},
        nn.relu6,
    ),
    "lite": (
        functools.partial(EfficientNetLite, stage_sizes=V2_STAGES, width=0.25),
        {f"layer{i}": f"block{i + 1}/expand_norm" for i in (1, 2, 3)} | {"layer4": "last_norm"},
        nn.relu6,
    ),
}  # fmt: skip
QUICK = ("resnet", "v1")
SLOW = pytest.mark.slow  # compiling takes ten seconds or more


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=SLOW) for n in TINY if n not in QUICK)]
)
def test_taps_and_features(x64, name):
    """Taps are the outputs of the named modules; features and logits follow from the last."""
    make, paths, activation = TINY[name]
    model = make(num_classes=3, param_dtype=jnp.float64)
    variables = draw_variables(model, SHAPE)
    images = np.random.default_rng(1).standard_normal((4, *SHAPE))

    @jax.jit
    def run(images):
        sown = run_model(model, variables, images, train=False)
        return sown, run_model(model, variables, images, train=False, tap_paths=paths).taps

    forward, by_path = run(images)
    chex.assert_trees_all_close(forward.taps, by_path, rtol=1e-9, atol=1e-9)
    assert all((tap < 0).any() for tap in forward.taps.values())
    last = forward.taps[f"layer{len(paths)}"]
    chex.assert_trees_all_close(forward.features, activation(last).mean(axis=(1, 2)), rtol=1e-9)
    dense = variables["params"]["classifier"]
    logits = forward.features @ dense["kernel"] + dense["bias"]
    chex.assert_trees_all_close(forward.logits, logits, rtol=1e-9)


@pytest.mark.parametrize("name", ["v1", *(pytest.param(n, marks=SLOW) for n in TINY if n != "v1")])
def test_gradients_are_finite_differences(x64, name):
    make, _, _ = TINY[name]
    model = make(num_classes=3, param_dtype=jnp.float64)
    if name == "v1":
        model = model.clone(stage_sizes=(0, 1))
    variables = draw_variables(model, SHAPE)
    images = np.random.default_rng(1).standard_normal((4, *SHAPE))
    direction = jax.tree.map(np.cos, variables["params"])  # in NumPy, so nothing is compiled

    @jax.jit
    @jax.value_and_grad
    def run(params):
        trained = {"params": params, "batch_stats": variables["batch_stats"]}
        forward = run_model(model, trained, images, train=True)
        taps = sum(jnp.sin(tap).mean() for tap in forward.taps.values())
        return taps + jnp.sin(forward.logits).sum()

    def moved(step):
        there = jax.tree.map(lambda p, d: p + step * d, variables["params"], direction)
        return float(run(there)[0])

    gradient = jax.tree.leaves(run(variables["params"])[1])
    slope = sum(map(np.vdot, map(np.asarray, gradient), jax.tree.leaves(direction)))
    assert abs((moved(1e-7) - moved(-1e-7)) / 2e-7 - slope) < 1e-6 * max(1, abs(slope))


@SLOW
@pytest.mark.parametrize("name", ["v1", "v2", "lite"])
def test_a_step_is_the_same_by_xlas_convolutions(x64, name):
    make, _, _ = TINY[name]
    model = make(num_classes=3, param_dtype=jnp.float64)
    variables = draw_variables(model, SHAPE)
    images = np.random.default_rng(1).standard_normal((4, *SHAPE))

    def loss(params):
        trained = {"params": params, "batch_stats": variables["batch_stats"]}
        forward = run_model(model, trained, images, train=True)
        return jnp.sin(forward.logits).sum(), (forward.taps, forward.batch_stats)

    # One function for each, since `jax.jit` caches its traces.
    by_slices = jax.jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p))(variables["params"])
    with mock.patch.object(models.layers, "depthwise", jax.lax.conv_general_dilated):
        by_xla = jax.jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p))(variables["params"])
    chex.assert_trees_all_close(by_slices, by_xla, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_round_trip_is_exact(name, monkeypatch, tmp_path):
    make, _, _ = TINY[name]
    monkeypatch.setitem(models._NAMED, "tiny", make)
    model = make(num_classes=3)
    variables = draw_variables(model, SHAPE)
    state_dict = to_torch(model, variables)
    chex.assert_trees_all_equal(from_torch("tiny", state_dict), variables)
    save_state_dict(tmp_path / "w.safetensors", model, variables)
    network = load_network("tiny", tmp_path / "w.safetensors")
    chex.assert_trees_all_equal(network.variables, variables)
    assert network.model == model
    depthwise = {"v1": "model.1.0", "v2": "features.1.conv.3", "lite": "_blocks.1._depthwise_conv",
                 "v2-torchvision": "features.1.conv.0.0"}.get(name)  # fmt: skip
    if depthwise:
        kernel = variables["params"]["block1"]["depthwise"]["kernel"]
        np.testing.assert_array_equal(state_dict[f"{depthwise}.weight"][:, 0],
                                      kernel[:, :, 0].transpose(2, 0, 1))  # fmt: skip


OTHERS = [
    ("resnet50", ["model.1.3.weight", "model.0.0.weight", "fc.bias"],
     "'conv1.weight' is missing; these are named like the weights of mobilenet-v1"),
    ("mobilenet-v1", ["conv1.weight", "fc.bias", "layer1.0.conv3.weight"],
     "'model.0.0.weight' is missing; these are named like the weights of resnet50"),
    ("mobilenet-v2", ["features.0.0.weight", "classifier.1.bias", "features.1.conv.0.0.weight"],
     "is missing; these are named like the weights of mobilenet-v2-torchvision"),
    ("resnet50", ["fc.bias", "_blocks.0._depthwise_conv.weight"],
     "'conv1.weight' is missing; these are named like the weights of efficientnet-lite0"),
    ("resnet50", ["features.weight", "fc.bias"], "'conv1.weight' is missing$"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "entries", "sentence"), OTHERS)
def test_weights_of_another_architecture(name, entries, sentence):
    axes = {"bias": 1, "weight": 4}
    given = {key: np.zeros((1,) * axes[key.rsplit(".")[-1]], np.float32) for key in entries}
    with pytest.raises(InputError, match=sentence):
        from_torch(name, given)


@pytest.mark.parametrize("size", [(6, 5), (1, 2)])
def test_max_pooling_is_xlas(size):
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))

    @jax.jit
    def both(images):
        def plain(x):
            window, around = (1, 3, 3, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]
            return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), around)

        values, pullbacks = zip(*(jax.vjp(pool, images) for pool in (_max_pool, plain)),
                                strict=True)  # fmt: skip
        return [(value, pullback(jnp.cos(values[0])))
                for value, pullback in zip(values, pullbacks, strict=True)]  # fmt: skip

    ours, theirs = both(images)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def test_one_layer_trains_nothing_after_it():
    make, _, _ = TINY["v1"]
    model = make()
    phase, _ = METHODS["activation-boundary"](layers=("layer1",))
    trained = bind(model, model, phase, SHAPE).trainable()["student"]
    groups = {name: set(jax.tree.leaves(tree)) for name, tree in trained.items()}
    assert groups["stem"] == groups["block1"] == groups["block2"] == {True}
    assert groups["block3"] == groups["classifier"] == {False}
