"""Compares what is made of images with numbers of the published PyTorch code, in float64."""

import functools
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax.losses import (
    agreement_of_logits,
    batch_norm_statistics_loss,
    cross_entropy,
    knowledge_distillation,
    total_variation,
)
from abflax.methods import TARGET_DOMAIN, Progressive, boundary_samples, views
from abflax.methods.terms import TwoDomainDistillation
from abflax.methods.views import boundary_base, boundary_step, draw_other_class
from abflax.taps import Forward
from tests.conftest import under

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def images_file(reference):
    return reference("made_images")


@pytest.fixture
def dreams(images_file):
    return under("deepinversion/", images_file)


@pytest.fixture
def bss(images_file):
    return under("bss/", images_file)


def _assert_equals(found, expected):
    """Compares to 1e-9 of an entry, or of the largest where that is rounding error's share."""
    scale = np.abs(expected).max()
    chex.assert_trees_all_close(found, jnp.asarray(expected), rtol=1e-9, atol=1e-12 * scale)


def convolve(x, weight, stride=1):
    return jax.lax.conv_general_dilated(
        x, weight.transpose(2, 3, 1, 0), (stride, stride), [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def with_batch_norms(weights, images, strides=(1, 2)):
    """Logits of the file's network with batch norms, and what its batch norms get."""
    x, inputs = images, []
    for layer, stride in zip((1, 2), strides, strict=True):
        inputs.append(convolve(x, weights[f"conv{layer}.weight"], stride))
        mean, variance = (weights[f"bn{layer}.running_{each}"] for each in ("mean", "var"))
        x = (inputs[-1] - mean) * jax.lax.rsqrt(variance + 1e-5)
        x = jax.nn.relu(x * weights[f"bn{layer}.weight"] + weights[f"bn{layer}.bias"])
    return x.mean(axis=(1, 2)) @ weights["fc.weight"].T + weights["fc.bias"], inputs


def plain(weights, images):
    """Logits of the file's network without batch norms."""
    x = jax.nn.relu(convolve(images, weights["conv1.weight"]) + weights["conv1.bias"])
    x = jax.nn.relu(convolve(x, weights["conv2.weight"], 2) + weights["conv2.bias"])
    return x.mean(axis=(1, 2)) @ weights["fc.weight"].T + weights["fc.bias"]


def statistics(weights, images, first):
    _, inputs = with_batch_norms(weights, images)
    parts = [
        batch_norm_statistics_loss(x, weights[f"bn{n}.running_mean"], weights[f"bn{n}.running_var"])
        for n, x in enumerate(inputs, 1)
    ]
    return first * parts[0] + parts[1]


def competition(dreams, images):
    ours, theirs = (
        with_batch_norms(under(f"{each}/", dreams), images)[0] for each in ("student", "teacher")
    )
    return jnp.clip(agreement_of_logits(ours, theirs).mean(), 0, 1)


PARTS = {
    "r_feature": lambda d, x: statistics(under("teacher/", d), x, 1.0),
    "r_feature_first10": lambda d, x: statistics(under("teacher/", d), x, 10.0),
    "tv_l1": lambda d, x: total_variation(x, 1),
    "tv_l2": lambda d, x: total_variation(x, 2),
    "cross_entropy": lambda d, x: cross_entropy(
        with_batch_norms(under("teacher/", d), x)[0], d["targets"]
    ).mean(),
    "competition": competition,
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_dreams(dreams, name):
    loss = jax.jit(jax.value_and_grad(functools.partial(PARTS[name], dreams)))
    value, gradient = loss(dreams["images"])
    _assert_equals(value, dreams[name])
    _assert_equals(gradient, dreams[f"grad_{name}"])


def test_where_nothing_varies_the_gradient_is_zero():
    images = jnp.ones((2, 3, 3, 1))
    for order in (1, 2):
        value, gradient = jax.value_and_grad(total_variation)(images, order)
        assert value == 0 and not gradient.any()
    own = jnp.ones(1), jnp.zeros(1)
    value, gradient = jax.value_and_grad(batch_norm_statistics_loss)(images, *own)
    assert value == 0 and not gradient.any()


def test_total_variation_by_hand():
    images = jnp.asarray([[[0.0, 1.0], [2.0, 5.0]]])[..., None]
    # Right 1, 3; down 2, 4; diagonals 5 and 1.
    chex.assert_trees_all_close(total_variation(images, 1), jnp.asarray(2.0 + 3.0 + 5.0 + 1.0))
    expected = np.sqrt(10) + np.sqrt(20) + 5 + 1
    chex.assert_trees_all_close(total_variation(images, 2), jnp.asarray(expected))


def test_target_classes_of_boundary_samples(bss):
    logits = plain(under("teacher/", bss), bss["images"][bss["base_index"]])
    found = jax.jit(draw_other_class)(logits, bss["uniforms"])
    assert found.tolist() == bss["target_class"].tolist()
    assert bss["labels"][bss["base_index"]].tolist() == bss["base_class"].tolist()


def test_base_of_boundary_samples(bss):
    student, teacher = (plain(under(f"{n}/", bss), bss["images"]) for n in ("student", "teacher"))
    chosen = boundary_base(student, teacher, bss["labels"], int(bss["attack_size"]))
    assert np.flatnonzero(chosen).tolist() == sorted(bss["base_index"].tolist())
    right = boundary_base(student, teacher, bss["labels"], 16)
    both = (np.asarray(x).argmax(axis=1) == bss["labels"] for x in (student, teacher))
    assert right.tolist() == np.logical_and(*both).tolist() and right.sum() > 4


def test_iterates_of_boundary_samples(bss):
    teacher = functools.partial(plain, under("teacher/", bss))
    step = jax.jit(functools.partial(boundary_step, teacher))
    found = bss["iterates"][0]
    _assert_equals(teacher(found), bss["scores"][0])
    for expected, scores in zip(bss["iterates"][1:], bss["scores"][1:], strict=True):
        found = step(found, bss["base_class"], bss["target_class"])
        _assert_equals(found, expected)
        _assert_equals(teacher(found), scores)
    _assert_equals(found, bss["result"])


def test_boundary_samples_are_the_last_iterate(bss, monkeypatch):
    monkeypatch.setattr(views, "draw_other_class", lambda *_: bss["target_class"])
    teacher = functools.partial(plain, under("teacher/", bss))
    make = jax.jit(
        lambda count, images: boundary_samples(
            teacher, images, bss["base_class"], jax.random.key(0), steps=count
        )
    )
    for count, expected in enumerate(bss["iterates"]):
        _assert_equals(make(count, bss["iterates"][0]), expected)


def test_boundary_samples_ask_the_teacher_until_none_moves():
    calls = []

    def teacher(images):  # its logits are the pixels
        jax.debug.callback(lambda: calls.append(None))
        return images.reshape(len(images), -1)

    images = jnp.asarray([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 1, 1, 2)
    labels = jnp.asarray([0, 0])  # the second is wrong from the start
    made = boundary_samples(teacher, images, labels, jax.random.key(0), steps=10, step_size=1.0)
    step = 1.0001 / np.sqrt(2)
    chex.assert_trees_all_close(made.ravel(), jnp.asarray([1 - step, step, 0, 1]))
    jax.effects_barrier()
    assert len(calls) == 3  # to draw the class, to cross the boundary, to see that none moves


def test_boundary_samples_of_any_teacher():
    """One that trains, one whose weights change, one of another precision; no gradient flows."""
    images, labels = jnp.ones((2, 1, 1, 2)) * jnp.arange(2.0), jnp.asarray([1, 1])

    class Teacher:
        weight = 1.0

        def __call__(self, images):
            return self.weight * images.reshape(len(images), -1)

    def made(weight, images):
        teacher = Teacher()
        teacher.weight = weight
        return boundary_samples(teacher, images, labels, jax.random.key(0))

    gradients = jax.grad(lambda *a: made(*a).sum(), (0, 1))(1.0, images)
    assert all(not jnp.any(each) for each in gradients)
    teacher = Teacher()
    before = boundary_samples(teacher, images, labels, jax.random.key(0))
    teacher.weight = 2.0
    after = boundary_samples(teacher, images, labels, jax.random.key(0))
    chex.assert_trees_all_equal(after, made(2.0, images))
    assert jnp.any(before != after)
    assert made(1.0, images.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_loss_on_boundary_samples(bss):
    teacher, tau = under("teacher/", bss), float(bss["temperature"])

    def soft(student, images):
        """The published cross-entropy: the divergence, and the entropy of the teacher's."""
        ours, theirs = (plain(weights, images) for weights in (student, teacher))
        softened = jax.nn.log_softmax(theirs / tau)
        entropy = -jnp.sum(jnp.exp(softened) * softened, axis=-1)
        return (knowledge_distillation(ours, theirs, tau) + entropy).mean()

    def total(student):
        labels = cross_entropy(plain(student, bss["images"]), bss["labels"]).mean()
        on_images, at_boundary = (soft(student, bss[name]) for name in ("images", "result"))
        return labels + bss["ratio"] * on_images + bss["attack_ratio"] * at_boundary, at_boundary

    student = under("student/", bss)
    (value, boundary), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(student)
    _assert_equals(boundary, bss["boundary_loss"])
    _assert_equals(value, bss["total_loss"])
    for name, gradient in gradients.items():
        _assert_equals(gradient, bss[f"grad_student/{name}"])


def kd_of_adaptation(student, teacher):
    """τ² KL(student ‖ teacher), the reverse of Hinton's: ours with its arguments exchanged."""
    return 400 * knowledge_distillation(teacher, student, 20.0).mean()


@pytest.mark.parametrize("side", ["target", "source"])
def test_distillation_of_adaptation(images_file, side):
    """The teacher gets its gradient as well."""
    student, teacher, labels = (
        images_file[f"logits/{each}"] for each in ("student", "teacher", "labels")
    )

    def loss(student, teacher):
        kd = kd_of_adaptation(student, teacher)
        if side == "target":
            return kd
        return 0.3 * kd + 0.7 * cross_entropy(student, labels).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student, teacher)
    _assert_equals(value, images_file[f"uda/kd_{side}"])
    _assert_equals(gradients[0], images_file[f"uda/kd_{side}_grad_student"])
    _assert_equals(gradients[1], images_file[f"uda/kd_{side}_grad_teacher"])


def test_schedules_of_adaptation(images_file):
    """β from epoch to epoch of 400, γ from step to step of 50."""
    epochs, per_epoch = images_file["uda/beta_epochs"], Fraction(50)
    beta = jnp.stack([Progressive("student")(50 * (e - 1), per_epoch, 400) for e in epochs])
    _assert_equals(beta, images_file["uda/beta"])
    late = 50 * 199 + np.arange(50)
    weight = jax.vmap(lambda step: Progressive("discrepancy")(step, per_epoch, 400))(late)
    teacher = 1 - images_file["uda/beta"][3]
    _assert_equals(Progressive("teacher")(late[0], per_epoch, 400), teacher)
    _assert_equals(weight, teacher * images_file["uda/gamma"])


def test_terms_of_adaptation(images_file):
    student, teacher, labels = (
        images_file[f"logits/{each}"] for each in ("student", "teacher", "labels")
    )

    def forward(logits):
        return Forward(logits, {}, None, {}, views={TARGET_DOMAIN: Forward(logits, {}, None, {})})

    term = TwoDomainDistillation()
    found = term.loss(forward(student), term.targets(forward(teacher)), labels).mean()
    _assert_equals(found, images_file["uda/kd_source"] + images_file["uda/kd_target"])
