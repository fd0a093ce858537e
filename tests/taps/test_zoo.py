"""Models in the styles that people use: NNX, object outputs, unhashable fields, hard-coded axes."""

import io
import types
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from PIL import Image

from abflax import Dataset, InputError, Network, Resources, Tapped, distill, evaluate, load
from abflax.data.decoding import centre_crop
from abflax.taps import marked, run_model, suggest

ONE = Resources(devices=1)
DIGITS = load("digits", "train").take(np.arange(64))
DATA = Dataset(DIGITS.images.astype(np.float32) / 16, DIGITS.labels, 10)
IMAGES = jnp.asarray(DATA.images[:8])
SETTINGS = {"epochs": (1, 1), "batch_size": 32, "resources": ONE}


class Block(nnx.Module):
    def __init__(self, before, after, *, rngs):
        self.conv = nnx.Conv(before, after, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(after, rngs=rngs)
        self.short = nnx.Conv(before, after, (1, 1), strides=2, rngs=rngs)

    def __call__(self, x):
        self.pre = nnx.Intermediate(self.norm(self.conv(x)) + self.short(x))
        return nnx.relu(self.pre[...])


class ResNet(nnx.Module):
    """Blocks in `nnx.List`, `train()` and `eval()`, residual sums kept as `nnx.Intermediate`."""

    def __init__(self, width, *, rngs):
        self.blocks = nnx.List([Block(1, width, rngs=rngs), Block(width, 2 * width, rngs=rngs)])
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x.mean((1, 2))))


class Vit(nn.Module):
    """Tokens, and an object as the output."""

    config: dict

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=2, name="patch")(x).reshape(len(x), 16, 8)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="att")(x, x)
        x = x + nn.Dense(8, name="out")(nn.gelu(nn.Dense(self.config["hidden"], name="fc")(x)))
        return types.SimpleNamespace(logits=nn.Dense(10)(x.mean(axis=1)), tokens=x)


class Fixed(nn.Module):
    """A post-activation block with a zero-initialized norm and an axis name of its own."""

    @nn.compact
    def __call__(self, x, train=True):
        norm = nn.BatchNorm(not train, axis_name="batch", scale_init=nn.initializers.zeros)
        return nn.Dense(10)(nn.relu(norm(nn.Conv(4, (3, 3))(x)) + x).mean(axis=(1, 2)))


def test_an_nnx_student_learns_from_an_nnx_teacher(tmp_path):
    teacher, student = (ResNet(width, rngs=nnx.Rngs(width)) for width in (6, 4))
    optimizer = nnx.Optimizer(teacher, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        loss = lambda m: optax.softmax_cross_entropy_with_integer_labels(m(images), labels).mean()
        optimizer.update(model, nnx.grad(loss)(model))

    teacher.train()
    for _ in range(3):
        step(teacher, optimizer, IMAGES, DATA.labels[:8])
    taps = {"layer1": "blocks/0/pre", "layer2": "blocks/1/pre"}
    before = jax.tree.map(np.array, nnx.state(student, nnx.Param))
    call = lambda: distill(Tapped(student, taps), Tapped(teacher, taps), DATA, test=DATA,
                           workdir=tmp_path, **SETTINGS)  # fmt: skip
    result = call()
    chex.assert_trees_all_equal(
        before, nnx.state(student, nnx.Param)
    )  # the caller's is not changed
    for trained in (result.student, call().student):
        trained.eval()
        wrong = float((trained(DATA.images).argmax(-1) != DATA.labels).mean())
        assert wrong == pytest.approx(result.record["result"]["test_error"], abs=1e-6)
    assert evaluate(trained, DATA, devices=1)["test_error"] == pytest.approx(wrong, abs=1e-6)
    assert np.abs(trained.blocks[0].norm.mean[...]).max() > 0


def test_nnx_taps_equal_the_network_cut_by_hand():
    model = ResNet(4, rngs=nnx.Rngs(0))
    network = Network(Tapped(model, {"norm": "blocks/0/norm", "sum": "blocks/0/pre"}))
    taps = run_model(network.model, network.variables, IMAGES, train=False).taps
    model.eval()
    first = model.blocks[0]
    norm = first.norm(first.conv(IMAGES))
    chex.assert_trees_all_close(taps, {"norm": norm, "sum": norm + first.short(IMAGES)}, atol=1e-6)
    assert list(taps) == ["norm", "sum"]
    found = marked(suggest(ResNet(4, rngs=nnx.Rngs(0)), images=IMAGES))
    assert found == {"layer1": "blocks/0/pre", "layer2": "blocks/1/pre"}


@pytest.mark.slow
def test_a_transformer_is_tapped_at_its_tokens():
    model = Vit({"hidden": 12})
    variables = model.init(jax.random.key(0), IMAGES)
    found = suggest(model, variables, IMAGES)
    assert marked(found) == {"layer1": "fc"}
    assert not any("query" in tap.path for tap in found)  # heads are no feature maps
    tapped = Tapped(model, marked(found))
    result = distill(tapped, Network(tapped, variables), DATA, **SETTINGS)
    assert np.isfinite(result.record["history"][-1]["loss"])


def test_suggest_says_that_a_residual_sum_is_no_output():
    found = suggest(Fixed(), Fixed().init(jax.random.key(0), IMAGES), IMAGES)
    assert {tap.path: tap.rectified for tap in found}["BatchNorm_0"] is False
    assert marked(found) == {}


def test_a_hard_coded_axis_and_tuples_work():
    assert np.isfinite(distill(Fixed(), None, DATA, method="cross-entropy", **SETTINGS)
                       .record["history"][-1]["loss"])  # fmt: skip


def test_sown_losses_are_added():
    class Sowing(nn.Module):
        weight: float

        @nn.compact
        def __call__(self, x):
            self.sow("losses", "extra", self.weight)
            return (nn.Dense(10)(x.mean(axis=(1, 2))), x)

    losses = [distill(Sowing(w), None, DATA, method="cross-entropy", **SETTINGS)
              .record["history"][0]["loss"] for w in (0.0, 5.0)]  # fmt: skip
    assert losses[1] - losses[0] == pytest.approx(5, abs=1e-4)


def test_a_network_that_never_trains_its_norms_is_refused():
    class Inner(nn.Module):
        training: bool = False

        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(not self.training)(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(Inner()(x).mean(axis=(1, 2)))

    with pytest.raises(InputError, match="does not move its running statistics in training mode"):
        distill(Outer(), None, DATA, method="cross-entropy", **SETTINGS)


def test_a_students_tap_behind_its_relu_is_warned_of():
    """Its neurons cannot be pushed below zero; the teacher's indicator is the same behind it."""

    class After(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
            self.sow("intermediates", "after", x)
            return nn.Dense(10)(x.mean(axis=(1, 2)))

    teacher = Network(Tapped(After(), {"layer1": "after"}), After().init(jax.random.key(0), IMAGES))
    with pytest.warns(UserWarning, match="student's taps layer1 are never negative"):
        distill(Tapped(After(), {"layer1": "after"}), teacher, DATA, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill(Tapped(After(), {"layer1": "conv"}), teacher, DATA, **SETTINGS)


def test_images_of_modes_i_and_f_keep_their_contrast():
    def encoded(pixels):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "TIFF")
        return out.getvalue()

    pixels = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for image in (pixels.astype(np.int32), (pixels / 65535).astype(np.float32)):
        crop = centre_crop(encoded(image), 56)
        assert crop.min() < 20 and crop.max() > 235
    with pytest.raises(ValueError, match=r"mode F must lie in \[0, 1\]"):
        centre_crop(encoded(pixels.astype(np.float32)), 56)
