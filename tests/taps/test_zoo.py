"""Models in the styles that people use: NNX, object outputs, unhashable fields, hard-coded axes."""

import functools
import io
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

from abflax import (
    Dataset,
    InputError,
    Network,
    NonFiniteError,
    Resources,
    Tapped,
    distill,
    evaluate,
    load,
)
from abflax.data.decoding import centre_crop
from abflax.methods import METHODS
from abflax.models.variables import init_variables
from abflax.taps import marked, run_model, side_of, suggest
from abflax.taps.nnx import Nnx
from abflax.taps.running import logits_of
from tests.taps.zoo import STYLES, Configured, NnxResNet, PostActivation

ONE = Resources(devices=1)
DIGITS = load("digits", "train").take(np.arange(32))
DATA = Dataset(DIGITS.images.astype(np.float32) / 16, DIGITS.labels, 10)
IMAGES = jnp.asarray(DATA.images)
FLAT = ("configuration as field",)  # with a tap of features, which has no positions
SETTINGS = {"epochs": (1, 1), "batch_size": 32, "resources": ONE}


@functools.cache
def _network(name, width):
    """A random network of a style, whose scales are not those of the start.

    A scale of zero leaves nothing of a branch. The attention maps of a post-activation ResNet on
    images of one channel are then the same for all weights.
    """
    style = STYLES[name]
    model = style.make(width)
    if isinstance(model, nnx.Module):
        network = Network(Tapped(model, style.taps))
    else:
        init = jax.jit(lambda key: init_variables(model, key, (8, 8, 1)))
        network = Network(Tapped(model, style.taps), init(jax.random.key(width)))
    moved = {k: v for k, v in network.variables.items() if k != "batch_stats"}
    noise = lambda leaf: 0.1 * np.cos(np.arange(leaf.size)).reshape(leaf.shape)
    moved = jax.tree.map(lambda leaf: leaf + noise(leaf), moved)
    return Network(network.model, {**network.variables, **moved})


def _native(model, variables):
    """The model's own logits in evaluation mode."""
    side = side_of(model)
    if isinstance(side, Nnx):
        module = side.merge(variables)
        module.eval()
        return module(IMAGES)
    off = {"train": False} if isinstance(side.module, (Configured, PostActivation)) else {}
    output = jax.jit(lambda v: logits_of("", side.module.apply(v, IMAGES, **off), None))
    return output(variables)


@pytest.mark.parametrize("name", STYLES)
def test_a_style(name):
    """What `suggest` marks; the taps against the network cut by hand; the model's own logits."""
    style, network = STYLES[name], _network(name, 4)
    variables, side = network.variables, side_of(network.model)
    if isinstance(side, Nnx):
        module = side.merge(variables)
        module.eval()
        assert marked(suggest(style.make(4), images=IMAGES)) == style.suggested
        expected = style.cut(module, IMAGES)
    else:
        assert marked(suggest(side.module, variables, IMAGES)) == style.suggested
        expected = jax.jit(style.cut)(variables, IMAGES)
    found = jax.jit(lambda v: run_model(network.model, v, IMAGES, train=False))(variables)
    assert found.taps.keys() == expected.keys() == style.taps.keys()
    chex.assert_trees_all_close(found.taps, expected, atol=1e-5)
    chex.assert_trees_all_close(found.logits, _native(network.model, variables), atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "object as output" else pytest.param(name, marks=pytest.mark.slow)
        for name in STYLES
    ],
)
def test_a_style_is_trained(name):
    """Two steps of boundaries, attention and NST; the error is that of the model itself."""
    student, teacher = (_network(name, width) for width in (4, 6))
    train = functools.partial(
        distill, student, teacher, DATA, test=DATA, epochs=(2, 0), batch_size=32, resources=ONE
    )
    if name in FLAT:  # features have no positions
        with pytest.raises(InputError, match=r"^attention_map: a feature map is .*not \(2, 6\)"):
            train(method="attention")
        result = train(method="activation-boundary")
    else:
        result = train(method="activation-boundary+attention+nst")
    predictions = np.asarray(_native(student.model, result.variables)).argmax(axis=-1)
    wrong = np.mean(predictions != DATA.labels)
    assert result.record["result"]["test_error"] == pytest.approx(wrong, abs=1e-6)
    for collection in ("params", "batch_stats"):
        trees = student.variables[collection], result.variables[collection]
        for before, after in zip(*map(jax.tree.leaves, trees), strict=True):
            assert before.shape == after.shape and np.isfinite(after).all()
            assert collection == "params" or (before != after).any()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["activation-boundary", "kd", "attention", "nst"])
@pytest.mark.parametrize("name", STYLES)
def test_a_style_learns(name, method):
    """Twenty steps of each method lower its loss."""
    if name in FLAT and method in ("attention", "nst"):
        pytest.skip("features have no positions")
    student, teacher = (_network(name, width) for width in (4, 6))
    phases = METHODS[method](protocol="paper")
    epochs = (20, 0) if len(phases) > 1 else (0, 20)
    # NST's loss of some styles grows at the protocol's own rate, 0.1.
    rate = 0.01 if method == "nst" else None
    result = distill(student, teacher, DATA, method=method, epochs=epochs, batch_size=32,
                     learning_rate=rate, resources=ONE)  # fmt: skip
    losses = [entry["loss"] for entry in result.record["history"]]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    logits = run_model(student.model, result.variables, IMAGES, train=False).logits
    chex.assert_trees_all_close(logits, _native(student.model, result.variables), atol=1e-6)


@pytest.mark.slow
def test_an_nnx_student_learns_from_an_nnx_teacher(tmp_path):
    """In at most eight lines; the trained module has the error and the logits of the record."""
    images, labels = jnp.asarray(DATA.images), jnp.asarray(DATA.labels)
    teacher, student = (NnxResNet(width, rngs=nnx.Rngs(width)) for width in (6, 4))
    optimizer = nnx.Optimizer(teacher, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: optax.softmax_cross_entropy_with_integer_labels(m(images), labels).mean()
        optimizer.update(model, nnx.grad(loss)(model))

    teacher.train()
    for _ in range(60):
        step(teacher, optimizer)
    before = jax.tree.map(np.array, nnx.state(student, nnx.Param))
    taps = marked(suggest(student, images=images))
    call = lambda: distill(Tapped(student, taps), Tapped(teacher, taps), DATA, test=DATA,
                           workdir=tmp_path, **SETTINGS)  # fmt: skip
    result = call()
    chex.assert_trees_all_equal(before, nnx.state(student, nnx.Param))  # the caller's is as it was
    teacher.eval()
    assert float((teacher(images).argmax(-1) == labels).mean()) > 0.5
    for trained in (result.student, call().student):
        trained.eval()
        wrong = float((trained(images).argmax(-1) != labels).mean())
        assert wrong == pytest.approx(result.record["result"]["test_error"], abs=1e-6)
        logits = run_model(result.model, result.variables, images, train=False).logits
        chex.assert_trees_all_close(trained(images), logits, atol=1e-6)
    assert evaluate(trained, DATA, devices=1)["test_error"] == pytest.approx(wrong, abs=1e-6)
    assert np.abs(trained.blocks[0].norm.mean[...]).max() > 0


def test_suggest_says_that_a_residual_sum_is_no_output():
    """It marks what comes after the ReLU, and what to do about it; heads are no feature maps."""
    model = PostActivation(4, sows=False)
    found = suggest(model, init_variables(model, jax.random.key(0), (8, 8, 1)), IMAGES[:1])
    assert marked(found) == {"layer1": "block0", "layer2": "block1"}
    for tap in found:
        assert ("is no module's output" in tap.note) == tap.marked == tap.rectified
    transformer = _network("vision transformer", 4)
    found = suggest(transformer.model, transformer.variables, IMAGES[:1])
    assert not any("query" in tap.path for tap in found)
    shared = _network("shared weights", 4)
    with pytest.raises(InputError, match="'shared'.* 3 times"):
        run_model(shared.model, shared.variables, IMAGES, train=False,
                  tap_paths={"layer1": "shared"})  # fmt: skip


def test_nnx_with_dropout_through_flaxs_bridge():
    class Bridged(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nnx.bridge.to_linen(Dropping, name="net")(x, train=train)

    class Dropping(nnx.Module):
        def __init__(self, *, rngs):
            self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

        def __call__(self, x, *, train):
            return self.head(self.drop(x.reshape(len(x), -1), deterministic=not train))

    result = distill(Bridged(), None, DATA, method="cross-entropy", **SETTINGS)
    assert np.isfinite(result.record["history"][-1]["loss"])


def test_the_last_tap_is_the_last_given():
    """Not the last of the alphabet."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, name="c0")(x)
            x = nn.Dense(4, name="c1")(nn.relu(x))
            return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))

    student, teacher = (
        Network(Tapped(Two(), {"stem": "c0", "head": "c1"}),
                init_variables(Two(), jax.random.key(k), (8, 8, 1)))
        for k in (0, 1)
    )  # fmt: skip
    ours, theirs = (nn.relu(run_model(n.model, n.variables, IMAGES, train=False).taps["head"])
                    for n in (student, teacher))  # fmt: skip
    record = distill(student, teacher, DATA, method="fitnet", epochs=(1, 0), batch_size=32,
                     resources=ONE).record  # fmt: skip
    expected = np.square(ours - theirs).sum(axis=(1, 2, 3)).mean() * 3 / 4000
    assert record["history"][0]["loss"] == pytest.approx(float(expected), rel=1e-5)


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


def test_a_sown_loss_that_makes_training_diverge_is_told():
    """The report's weight is 1e6: at the default learning rate no loss as large can be trained."""

    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), strides=2)(x)
            self.sow("losses", "extra", 1e6 * (x**2).mean())
            return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))

    told = (
        r"the losses that the student sows, added to the loss, are [^;]+; "
        r".*(loss.* from .*e\+05 to .* grew|grew from .*e\+05)"
    )
    with pytest.raises(NonFiniteError, match=told):
        distill(Sowing(), None, DATA, method="cross-entropy", epochs=(0, 8), batch_size=16,
                resources=ONE)  # fmt: skip


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
