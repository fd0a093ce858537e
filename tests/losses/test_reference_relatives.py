"""Compares the later methods' losses with numbers of their published PyTorch code, in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax.losses import (
    attention_transfer,
    correlation_congruence,
    correlation_distillation,
    decoupled_distillation,
    factor_transfer,
    hierarchical_context,
    knowledge_distillation,
    linear_time_discrepancy,
    maximum_mean_discrepancy,
    overhaul_difference,
    overhaul_margin,
    positions_pooled,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
    standardized_logits,
    variational_information,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def relatives(reference):
    return reference("relatives")


def _assert_equals(found, expected):
    """Compares to 1e-9 of an entry, or of the largest where that is rounding error's share."""
    scale = np.abs(expected).max()
    chex.assert_trees_all_close(found, jnp.asarray(expected), rtol=1e-9, atol=1e-12 * scale)


def _kd(student, teacher, temperature):
    return temperature**2 * knowledge_distillation(student, teacher, temperature).mean()


def _dist(student, teacher, temperature):
    return sum(part.mean() for part in correlation_distillation(student, teacher, temperature))


def _decoupled(student, teacher, labels, **settings):
    return decoupled_distillation(student, teacher, labels, **settings).mean()


def _standardized(loss):
    return lambda s, t, *rest, **settings: loss(
        standardized_logits(s), standardized_logits(t), *rest, **settings
    )


def _mean(loss):
    return lambda student, teacher: loss(student, teacher).mean()


DISTANCE, ANGLE = _mean(relational_distance), _mean(relational_angle)

# name -> (loss of student and teacher, the inputs, its value and its gradient in the student)
CASES = {
    "kd_t2": (functools.partial(_kd, temperature=4.0), "logits"),
    "dist": (functools.partial(_dist, temperature=1.0), "logits"),
    "dist_t4": (functools.partial(_dist, temperature=4.0), "logits"),
    "logit_std": (_standardized(functools.partial(_kd, temperature=2.0)), "logits"),
    "rkd": (lambda s, t: 25 * DISTANCE(s, t) + 50 * ANGLE(s, t), "features"),
    "pkt": (_mean(probabilistic_transfer), "features"),
    "sp": (_mean(similarity_preserving), "maps"),
    "review_hcl8": (_mean(hierarchical_context), "review_hcl8"),
}

# Rows of the student's gradient where the published code divides a zero vector by its clamped norm.
UNSOUND = {
    "dist_edge": [1],
    "logit_std_edge": [1],
    "pkt_edge": [3],
    "rkd_edge": [0, 1],
    "sp_edge": [3],
}
EDGES = {f"{name}_edge": (CASES[name][0], f"{CASES[name][1]}_edge") for name in
         ("kd_t2", "dist", "logit_std", "rkd", "pkt", "sp")}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *EDGES])
def test_value_and_gradient(relatives, name):
    loss, inputs = (CASES | EDGES)[name]
    student, teacher = relatives[f"{inputs}/student"], relatives[f"{inputs}/teacher"]
    value, gradient = jax.jit(jax.value_and_grad(loss))(student, teacher)
    _assert_equals(value, relatives[f"{name}/value"])
    sound = np.setdiff1d(np.arange(len(student)), UNSOUND.get(name, []))
    _assert_equals(gradient[sound], relatives[f"{name}/grad_student"][sound])
    # Where the published gradient is not sound, this one is no larger than elsewhere.
    assert np.abs(gradient).max() <= 10 * np.abs(gradient[sound]).max()


@pytest.mark.parametrize("name", ["dkd", "dkd_edge", "logit_std_dkd"])
def test_decoupled_distillation(relatives, name):
    inputs = "logits_edge" if name.endswith("edge") else "logits"
    student, teacher, labels = (
        relatives[f"{inputs}/{each}"] for each in ("student", "teacher", "labels")
    )
    settings = {each: relatives[f"{name}/{each}"] for each in ("temperature", "alpha", "beta")}
    loss = _standardized(_decoupled) if name.startswith("logit_std") else _decoupled
    loss = jax.jit(jax.value_and_grad(functools.partial(loss, **settings)))
    value, gradient = loss(student, teacher, labels)
    _assert_equals(value, relatives[f"{name}/value"])
    _assert_equals(gradient, relatives[f"{name}/grad_student"])


@pytest.mark.parametrize("name", ["dkd", "dkd_edge"])
@pytest.mark.parametrize(("part", "alpha", "beta"), [("tckd", 1.0, 0.0), ("nckd", 0.0, 1.0)])
def test_parts_of_decoupled_distillation(relatives, name, part, alpha, beta):
    inputs = name.replace("dkd", "logits")
    logits = (relatives[f"{inputs}/{each}"] for each in ("student", "teacher", "labels"))
    loss = decoupled_distillation(*logits, alpha=alpha, beta=beta).mean()
    _assert_equals(loss, relatives[f"{name}/{part}"])


@pytest.mark.parametrize("name", ["dist", "dist_t4", "dist_edge"])
def test_parts_of_correlation_distillation(relatives, name):
    inputs = "logits_edge" if name.endswith("edge") else "logits"
    student, teacher = relatives[f"{inputs}/student"], relatives[f"{inputs}/teacher"]
    inter, intra = correlation_distillation(student, teacher, relatives[f"{name}/tau"])
    assert (inter.shape, intra.shape) == ((8,), (10,))
    _assert_equals(inter.mean(), relatives[f"{name}/inter"])
    _assert_equals(intra.mean(), relatives[f"{name}/intra"])


def test_standardized_logits(relatives):
    for network in ("student", "teacher"):
        found = jax.jit(standardized_logits)(relatives[f"logits/{network}"])
        _assert_equals(found, relatives[f"logit_std/z_{network}"])


@pytest.mark.parametrize("part", ["distance", "angle"])
@pytest.mark.parametrize("edge", ["", "_edge"])
def test_parts_of_relational_distillation(relatives, part, edge):
    student, teacher = (relatives[f"features{edge}/{each}"] for each in ("student", "teacher"))
    loss = DISTANCE if part == "distance" else ANGLE
    value, gradient = jax.jit(jax.value_and_grad(loss))(student, teacher)
    _assert_equals(value, relatives[f"rkd{edge}/{part}"])
    sound = slice(2, None) if edge and part == "angle" else slice(None)
    _assert_equals(gradient[sound], relatives[f"rkd{edge}/grad_{part}"][sound])


def test_correlation_congruence(relatives):
    def embedded(features, side, embeddings):
        weight, bias = embeddings[side]
        return features @ weight.T + bias

    def loss(student, embeddings):
        return correlation_congruence(
            embedded(student, "student", embeddings),
            embedded(relatives["features/teacher"], "teacher", embeddings),
        ).mean()

    embeddings = {
        side: [relatives[f"cc/embed_{side}/linear.{each}"] for each in ("weight", "bias")]
        for side in ("student", "teacher")
    }
    value, (gradient, trained) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
        relatives["features/student"], embeddings
    )
    _assert_equals(value, relatives["cc/value"])
    _assert_equals(gradient, relatives["cc/grad_student"])
    for side, (weight, bias) in trained.items():
        _assert_equals(weight, relatives[f"cc/grad_embed_{side}/linear.weight"])
        _assert_equals(bias, relatives[f"cc/grad_embed_{side}/linear.bias"])


@pytest.mark.parametrize("name", ["vid", "vid_pooled"])
def test_variational_information(relatives, name):
    inputs = "maps" if name == "vid" else name
    teacher = relatives[f"{inputs}/teacher"]
    keys = ("regressor.0.weight", "regressor.2.weight", "regressor.4.weight", "log_scale")
    parameters = {key: relatives[f"{name}/{key}"] for key in keys}

    def loss(student, parameters):
        x, target = positions_pooled(student, teacher)
        first, second, third = (parameters[key][..., 0, 0].T for key in keys[:3])
        mean = jax.nn.relu(jax.nn.relu(x @ first) @ second) @ third
        return variational_information(mean, target, parameters["log_scale"]).mean()

    value, (gradient, trained) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
        relatives[f"{inputs}/student"], parameters
    )
    _assert_equals(value, relatives[f"{name}/value"])
    _assert_equals(gradient, relatives[f"{name}/grad_student"])
    for key in keys:
        _assert_equals(trained[key], relatives[f"{name}/grad/{key}"])


def test_overhaul_margin(relatives):
    margin = jax.jit(overhaul_margin)(relatives["ofd/bn_weight"], relatives["ofd/bn_bias"])
    _assert_equals(margin, relatives["ofd/margin"])


def test_overhaul_difference(relatives):
    loss = jax.value_and_grad(lambda *arguments: overhaul_difference(*arguments).sum())
    value, gradient = jax.jit(loss)(
        *(relatives[f"ofd/{x}"] for x in ("student", "teacher", "margin"))
    )
    _assert_equals(value, relatives["ofd/value"])
    _assert_equals(gradient, relatives["ofd/grad_student"])


def test_hierarchical_context_with_overlapping_windows(relatives):
    student, teacher = relatives["ofd/student"], relatives["ofd/teacher"]  # 7×7 positions
    loss = jax.jit(jax.value_and_grad(_mean(hierarchical_context)))
    value, gradient = loss(student, teacher)
    _assert_equals(value, relatives["review_hcl/value"])
    _assert_equals(gradient, relatives["review_hcl/grad_student"])


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("ft/value", functools.partial(factor_transfer, channels_averaged=True)),
        ("ft_official/value", factor_transfer),
        ("ft/p2_value", attention_transfer),  # the squares of the channels' averages
    ],
)
def test_factor_transfer(relatives, name, loss):
    factors = (relatives["ft/student_factor"], relatives["ft/teacher_factor"])
    _assert_equals(jax.jit(loss)(*factors).mean(), relatives[name])


def test_maximum_mean_discrepancy(relatives):
    loss = jax.value_and_grad(_mean(maximum_mean_discrepancy), argnums=(0, 1))
    value, gradients = jax.jit(loss)(relatives["uda/source"], relatives["uda/target"])
    _assert_equals(value, relatives["uda/mmd"])
    _assert_equals(gradients[0], relatives["uda/grad_source"])
    _assert_equals(gradients[1], relatives["uda/grad_target"])


def test_linear_time_discrepancy(relatives):
    found = jax.jit(linear_time_discrepancy)(relatives["uda/source"], relatives["uda/target"])
    _assert_equals(found.mean(), relatives["uda/mmd_linear_time"])
