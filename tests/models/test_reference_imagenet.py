"""Compares taps and logits of ResNet-50 and the MobileNets with the published code."""

import zlib

import chex
import jax
import numpy as np
import pytest

from abflax.models import MODELS
from abflax.taps import run_model
from abflax.weights import from_torch, to_torch

pytestmark = pytest.mark.slow  # a minute and a half: networks at their full size

FILES = {
    "resnet50": "resnet50",
    "mobilenet-v1": "mobilenet_v1",
    "mobilenet-v2": "mobilenet_v2",
}


def by_recipe(names, shapes):
    """Draws the weights of the reference numbers, each seeded by its name."""
    return {
        str(name): _weight(str(name), tuple(map(int, str(shape).split())))
        for name, shape in zip(names, shapes, strict=True)
    }


def _weight(name, shape):
    if name.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    n = draw.standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return np.exp(np.float32(0.1) * n)
    if len(shape) == 4:
        features, channels, height, width = shape
        fan = height * width * (features if channels > 1 else 1)
        return n * np.float32(np.sqrt(2 / fan))
    if len(shape) == 2:
        return np.float32(0.02) * n
    return np.float32(0.1) * n + np.float32(name.endswith(".weight"))


@pytest.fixture(scope="module", params=FILES)
def network(request, reference):
    data = reference(FILES[request.param])
    state_dict = by_recipe(data["state_dict_names"], data["state_dict_shapes"])
    return request.param, data, state_dict, from_torch(request.param, state_dict)


def test_taps_and_logits(network):
    """Compares on a 224×224 image, to 1e-3 of each value, or of the deviation near zero."""
    name, data, _, variables = network
    images = np.random.default_rng(7).standard_normal((1, 224, 224, 3)).astype(np.float32)
    model = MODELS[name](num_classes=1000)
    forward = jax.jit(lambda v, x: run_model(model, v, x, train=False))(variables, images)
    assert list(forward.taps) == ["layer1", "layer2", "layer3", "layer4"]
    for layer, tap in forward.taps.items():
        assert tap.shape == tuple(data[f"{layer}/shape"])
        flat = np.asarray(tap).ravel()
        if name == "resnet50":
            assert flat.min() < -1
            flat = np.maximum(flat, 0)  # the published network rectifies in place what it returns
        places = np.linspace(0, flat.size - 1, 2048).astype(int)[::8]
        _assert_close(flat[places], data[f"{layer}/sample"], data[f"{layer}/std"])
        found = np.array([flat.mean(), flat.std(), (flat > 0).mean()])
        wanted = np.array([data[f"{layer}/{each}"] for each in ("mean", "std", "active")])
        assert (np.abs(found - wanted) < 1e-3 * np.array([wanted[1], wanted[1], 1])).all()
    _assert_close(forward.logits[:, ::4], data["logits"], data["logits"].std())


def _assert_close(found, wanted, deviation):
    chex.assert_trees_all_close(np.asarray(found), wanted, rtol=1e-3, atol=1e-3 * deviation)


def test_round_trip_is_exact(network):
    name, _, state_dict, variables = network
    kept = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    chex.assert_trees_all_equal(to_torch(MODELS[name](num_classes=1000), variables), kept)
