"""The registry, parameter counts, taps, and the convolution's two formulations."""

import re

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import linen as nn

from abflax.errors import InputError
from abflax.models import MODELS, is_local, model_name
from abflax.models.convolution import convolve
from abflax.models.variables import abstract_variables
from abflax.models.wide_resnet import WideResNet
from abflax.taps import run_model, tap_shapes

# Parameters with ten classes. The number of wrn16-2 is that of the shipped teacher. The paper's
# Table 3 has ratios: of wrn22-4 wrn16-2 is 16.1 %, wrn10-1 1.8 %, wrn10-4 27.9 %; wrn16-4 25.2 %.
PARAMETERS = {
    "efficientnet-lite0": 3383818,  # Lite0 to 4 as efficientnet_lite_pytorch has them
    "efficientnet-lite1": 4148490,
    "efficientnet-lite2": 4823882,
    "efficientnet-lite3": 6928906,
    "efficientnet-lite4": 11738378,
    "resnet50": 23528522,  # with a thousand classes 25557032, as torchvision has it
    "mobilenet-v1": 3217226,  # with a thousand 4231976
    "mobilenet-v2": 2237770,
    "mobilenet-v2-torchvision": 2236682,  # with a thousand 3504872
    "wrn10-1": 77850,
    "wrn10-4": 1198810,
    "wrn16-1": 175066,
    "wrn16-2": 691674,
    "wrn16-4": 2748890,
    "wrn22-4": 4298970,
}
# Channels and sides of each tap of 32×32 images.
TAPS = {
    name: [(16 * width, 32), (32 * width, 16), (64 * width, 8)]
    for name, width in (
        ("wrn10-1", 1), ("wrn10-4", 4), ("wrn16-1", 1), ("wrn16-2", 2), ("wrn16-4", 4),
        ("wrn22-4", 4),
    )
}  # fmt: skip

TAPS |= {
    "resnet50": [(256, 8), (512, 4), (1024, 2), (2048, 1)],
    "mobilenet-v1": [(128, 8), (256, 4), (512, 2), (1024, 1)],
    "efficientnet-lite2": [(144, 8), (288, 4), (720, 2), (1280, 1)],
    "efficientnet-lite3": [(192, 8), (288, 4), (816, 2), (1280, 1)],
    "efficientnet-lite4": [(192, 8), (336, 4), (960, 2), (1280, 1)],
} | dict.fromkeys(
    ("mobilenet-v2", "mobilenet-v2-torchvision"), [(144, 8), (192, 4), (576, 2), (1280, 1)]
) | dict.fromkeys(
    ("efficientnet-lite0", "efficientnet-lite1"), [(144, 8), (240, 4), (672, 2), (1280, 1)]
)  # fmt: skip


def _count(variables):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables))


def test_every_listed_model_has_its_count_stated():
    assert set(PARAMETERS) == set(MODELS)


LARGE = {f"efficientnet-lite{size}" for size in range(1, 5)}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in MODELS]
)
def test_parameters_and_taps(name):
    model = MODELS[name]()
    variables = abstract_variables(model, (32, 32, 3))
    assert _count(variables["params"]) == PARAMETERS[name]
    assert tap_shapes(model, variables, (32, 32, 3)) == {
        f"layer{index}": (1, side, side, channels)
        for index, (channels, side) in enumerate(TAPS[name], start=1)
    }
    assert set(variables) == {"params", "batch_stats"}
    assert model_name(model) == name


def test_size_ratios_are_the_papers():
    share = lambda small, large: round(100 * PARAMETERS[small] / PARAMETERS[large], 1)
    assert share("wrn10-4", "wrn22-4") == 27.9
    assert share("wrn16-2", "wrn16-4") == 25.2
    assert share("wrn16-2", "wrn22-4") == 16.1
    assert share("wrn10-1", "wrn22-4") == 1.8


@pytest.mark.parametrize("name", [
    "wrn17-2", "wrn4-1", "wrn16-0", "wrn-1", "vgg16", "wrn16", "wrn16-2-0.5", "resnet50-0",
    "mobilenet-v1-17", "mobilenet-v3", "mobilenet-v2-", "efficientnet-lite5", "efficientnet-b0",
])  # fmt: skip
def test_illegal_names(name):
    with pytest.raises(InputError, match=name):
        MODELS[name]
    assert name not in MODELS


def test_any_legal_depth_and_width_is_parsed():
    model = MODELS["wrn28-10"](num_classes=100)
    assert (model.depth, model.width, model.num_classes) == (28, 10, 100)


def test_a_subclass_is_another_network():
    class Mine(WideResNet):
        pass

    assert model_name(WideResNet(10, 1)) == "wrn10-1"
    assert model_name(Mine(10, 1)).startswith("Mine(")
    assert is_local(Mine(10, 1)) and not any(is_local(MODELS[name]()) for name in MODELS)


@pytest.mark.parametrize("name", ["resnet50-0.25", "mobilenet-v1-0.5", "mobilenet-v2-1.4"])
def test_width_multipliers(name):
    model, (whole, width) = MODELS[name](num_classes=3), name.rsplit("-", 1)
    assert model.width == float(width) and model_name(model) == name and name not in list(MODELS)
    assert MODELS[f"{whole}-1"]() == MODELS[whole]()
    deeper = model.clone(stage_sizes=(*model.stage_sizes[:-1], 7))
    assert model_name(deeper).startswith(f"{type(model).__name__}( # attributes")


def test_run_model_gives_features_and_logits_that_fit():
    model = MODELS["wrn10-1"]()
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    variables = model.init(jax.random.key(1), images, train=False)
    assert set(variables) == {"params", "batch_stats"}
    forward = run_model(model, variables, images, train=False)
    pooled = nn.relu(forward.taps["layer3"]).mean(axis=(1, 2))
    chex.assert_trees_all_close(forward.features, pooled, rtol=1e-5)
    dense = variables["params"]["classifier"]
    chex.assert_trees_all_close(
        forward.logits, pooled @ dense["kernel"] + dense["bias"], rtol=1e-4, atol=1e-5
    )
    chex.assert_trees_all_equal(forward.batch_stats, variables["batch_stats"])
    again = run_model(model, {**variables, "intermediates": {"layer1": 0}}, images, train=False)
    chex.assert_trees_all_equal(again.taps, forward.taps)


class _Foreign(nn.Module):
    """A network that does not use abflax."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(nn.relu(x).mean(axis=(1, 2)))


class _Jitted(nn.Module):
    """A jitted block, which is one equation in the traced program."""

    @nn.compact
    def __call__(self, images, *, train):
        from abflax.taps import sow_tap

        tap = nn.Conv(4, (3, 3), name="conv")(images)
        sow_tap(self, "layer1", tap)
        return nn.jit(nn.Dense)(10, name="head")(nn.relu(tap).mean(axis=(1, 2)))


@pytest.mark.parametrize("model", [_Jitted(), MODELS["wrn10-1"]()], ids=["jitted", "wrn"])
def test_what_a_phase_trains(model):
    """One layer alone trains nothing after it, also inside a jitted block."""
    from abflax.methods import METHODS
    from abflax.methods.objective import bind

    shape = (8, 8, 1)
    phase, _ = METHODS["activation-boundary"](layers=("layer1",))
    trained = bind(model, model, phase, shape).trainable()["student"]
    groups = {name: set(jax.tree.leaves(tree)) for name, tree in trained.items()}
    if isinstance(model, _Jitted):
        assert groups == {"conv": {True}, "head": {False}}
    else:  # layer1 is the first norm of group 2
        assert groups["stem"] == groups["group1_block0"] == {True}
        assert groups["group3_block0"] == groups["norm"] == groups["classifier"] == {False}
        first, *rest = (trained["group2_block0"][k] for k in ("norm1", "conv1", "norm2", "conv2"))
        assert set(jax.tree.leaves(first)) == {True} and set(jax.tree.leaves(rest)) == {False}


def test_taps_by_path():
    model, images = _Foreign(), jnp.ones((2, 4, 4, 1))
    variables = model.init(jax.random.key(0), images)
    forward = run_model(model, variables, images, train=False, tap_paths={"a": "norm"})
    conv = nn.Conv(4, (3, 3)).apply({"params": variables["params"]["conv"]}, images)
    norm = nn.BatchNorm(use_running_average=True).apply(
        {k: v["norm"] for k, v in variables.items() if "norm" in v}, conv
    )
    chex.assert_trees_all_close(forward.taps, {"a": norm}, rtol=1e-6)
    assert forward.features is None
    with pytest.raises(InputError, match=r"'nrom'.*did you mean norm"):
        run_model(model, variables, images, train=False, tap_paths={"a": "nrom"})


SHAPES = [  # batch, size, channels, features, kernel, stride
    (32, 8, 3, 5, 3, 1), (6, 7, 4, 2, 3, 2), (1, 5, 2, 3, 3, 1), (4, 6, 3, 2, 1, 2),
    (4, 6, 3, 2, 1, 1), (0, 4, 3, 2, 1, 1), (2, 8, 2, 3, 4, 2), (2, 9, 2, 3, 3, 3),
    (1, 1, 2, 3, 9, 2),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "size", "channels", "features", "kernel", "stride"), SHAPES)
@pytest.mark.parametrize("padding", ["half", "SAME", "VALID", ((4, 0), (1, 5)), ((5, -1), (-1, 5))])
def test_convolve_is_lax_convolution(x64, batch, size, channels, features, kernel, stride, padding):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, size, size, channels))
    weights = rng.standard_normal((kernel, kernel, channels, features))
    settings = (stride, stride), [(kernel // 2,) * 2] * 2 if padding == "half" else padding

    def plain(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, *settings, dimension_numbers=layout)

    ours = lambda x, w: convolve(x, w, *settings)
    cotangent = rng.standard_normal(plain(images, weights).shape)
    for one, other in zip(
        jax.tree.leaves(jax.jit(lambda *a: _with_gradients(ours, cotangent, *a))(images, weights)),
        jax.tree.leaves(_with_gradients(plain, cotangent, images, weights)),
        strict=True,
    ):
        chex.assert_trees_all_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the program of CPUs")
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_convolve_are_fast_in_loops_on_cpus(stride):
    """XLA is slow there for any other order of axes."""
    loss = lambda x, w: jnp.sum(convolve(x, w, (stride, stride), "SAME") ** 2)
    arguments = jnp.ones((32, 8, 8, 2)), jnp.ones((3, 3, 2, 4))
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).as_text()
    orders = re.findall(r"dim_numbers = (.+?), window", text)
    assert len(orders) >= 3 and set(orders) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


@pytest.mark.parametrize(("side", "stride"), [(4, 1), (5, 2)])
def test_convolve_to_third_order(x64, side, stride):
    rng = np.random.default_rng(1)
    images, weights = rng.standard_normal((2, side, side, 1)), rng.standard_normal((3, 3, 1, 2))
    loss = lambda x, w: jnp.sin(convolve(x, w, (stride, stride), [(1, 1), (1, 1)])).sum()
    jax.test_util.check_grads(loss, (images, weights), order=3, modes=["rev"])


def test_convolve_refuses_groups():
    with pytest.raises(NotImplementedError, match="groups"):
        convolve(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)), (1, 1), [(1, 1)] * 2,
                 feature_group_count=2)  # fmt: skip


def _with_gradients(function, cotangent, *arguments):
    value, pullback = jax.vjp(function, *arguments)
    return value, pullback(cotangent)
