"""Losses and metrics at their edges, and gradients against finite differences."""

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from abflax.losses import (
    activation_indicator,
    activation_transfer_hinge,
    activation_transfer_loss,
    cross_entropy,
    knowledge_distillation,
)
from abflax.metrics import activation_agreement, misclassified


def test_indicator_edges():
    x = jnp.array([-1.0, -0.0, 0.0, 1e-30, 2.0, jnp.nan])
    chex.assert_trees_all_equal(
        activation_indicator(x), jnp.array([False, False, False, True, True, False])
    )


# (student, teacher, margin) -> loss, gradient; by hand.
HINGE = [
    (0.0, 1.0, 1.0, 1.0, -2.0),
    (0.0, -1.0, 1.0, 1.0, 2.0),
    (0.0, 0.0, 1.0, 1.0, 2.0),  # a teacher at zero does not fire
    (1.0, 3.0, 1.0, 0.0, 0.0),  # s = μ: no loss, no slope
    (-1.0, -3.0, 1.0, 0.0, 0.0),
    (-1.0, 3.0, 1.0, 4.0, -4.0),
    (1.0, -3.0, 1.0, 4.0, 4.0),
    (0.5, 0.1, 2.0, 2.25, -3.0),
    (5.0, 0.1, 2.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("student", "teacher", "margin", "loss", "gradient"), HINGE)
def test_hinge_by_hand(student, teacher, margin, loss, gradient):
    found = jax.value_and_grad(activation_transfer_hinge)(student, teacher, margin)
    chex.assert_trees_all_close(found, (jnp.float32(loss), jnp.float32(gradient)), atol=1e-6)


def test_hinge_sends_no_gradient_to_the_teacher():
    gradient = jax.grad(lambda t: activation_transfer_hinge(jnp.ones(3), t).sum())(jnp.ones(3))
    chex.assert_trees_all_equal(gradient, jnp.zeros(3))


def test_gradients_against_finite_differences(x64):
    student, teacher = np.random.default_rng(0).standard_normal((2, 4, 5))
    labels = np.array([0, 4, 2, 2])
    for loss in (
        lambda s: activation_transfer_hinge(s, teacher, 0.7).sum(),
        lambda s: knowledge_distillation(s, teacher, 3.0).sum(),
        lambda s: cross_entropy(s, labels).sum(),
    ):
        jax.test_util.check_grads(loss, (student,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_float64_stays_float64(x64):
    s = jnp.ones((2, 3))
    for value in (
        activation_transfer_hinge(s, s),
        activation_transfer_loss(s, s),
        knowledge_distillation(s, s),
        activation_agreement(s, s),
    ):
        assert value.dtype == jnp.float64


@pytest.mark.parametrize(
    "loss", [activation_transfer_hinge, activation_transfer_loss, knowledge_distillation,
             activation_agreement]
)  # fmt: skip
def test_shapes_that_differ_are_named(loss):
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
        loss(jnp.ones((2, 3)), jnp.ones((2, 1)))


@pytest.mark.parametrize("loss", [cross_entropy, misclassified])
def test_labels_that_do_not_fit_are_named(loss):
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        loss(jnp.ones((2, 3)), jnp.zeros(3, jnp.int32))


def test_transfer_loss_and_agreement():
    student, teacher = jnp.array([1.0, 0.0, -1.0, 2.0]), jnp.array([1.0, 1.0, -1.0, -1.0])
    chex.assert_trees_all_equal(
        activation_transfer_loss(student, teacher), jnp.array([0.0, 1.0, 0.0, 1.0])
    )
    assert activation_agreement(student, teacher) == 0.5
    assert activation_agreement(student, teacher > 0) == 0.5
    with pytest.raises(ValueError, match="no neuron"):
        activation_agreement(jnp.ones((0,)), jnp.ones((0,)))


def test_kd_by_hand():
    student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[jnp.log(3.0) * 2, 0.0]])
    # At temperature 2 the teacher says (3/4, 1/4), the student (1/2, 1/2).
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    chex.assert_trees_all_close(
        knowledge_distillation(student, teacher, 2.0), jnp.array([expected]), rtol=1e-6
    )
    chex.assert_trees_all_close(knowledge_distillation(teacher, teacher, 3.0), jnp.zeros(1))


def test_cross_entropy_by_hand():
    logits = jnp.array([[jnp.log(3.0), 0.0], [1000.0, 0.0]])
    chex.assert_trees_all_close(
        cross_entropy(logits, jnp.array([1, 0])), jnp.array([np.log(4.0), 0.0]), rtol=1e-6
    )


def test_misclassified_takes_the_first_of_equal_logits():
    logits = jnp.array([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    chex.assert_trees_all_equal(
        misclassified(logits, jnp.array([0, 1, 1])), jnp.array([False, True, False])
    )
