"""Compares losses and gradients, also at ties, with the authors' published code."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax.losses import activation_transfer_hinge, activation_transfer_loss
from abflax.metrics import activation_agreement

CASES = ("case0", "case1", "case2")


def _summed(student, teacher, margin):
    return activation_transfer_hinge(student, teacher, margin).sum()


@pytest.fixture
def case(request, reference):
    data = reference("ab_loss")
    return {k.split("/")[1]: v for k, v in data.items() if k.startswith(request.param)}


@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("boolean", [False, True], ids=["pre-activations", "booleans"])
def test_value_and_gradient(case, boolean):
    teacher = case["teacher"] > 0 if boolean else case["teacher"]
    value, gradient = jax.jit(jax.value_and_grad(_summed))(case["student"], teacher, case["margin"])
    chex.assert_trees_all_close(value, case["loss_sum"], rtol=1e-5)
    chex.assert_trees_all_close(gradient, case["grad_student"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_under_vmap(case):
    each = jax.vmap(jax.value_and_grad(_summed), in_axes=(0, 0, None))
    values, gradients = each(case["student"], case["teacher"], case["margin"])
    chex.assert_trees_all_close(values.sum(), case["loss_sum"], rtol=1e-5)
    chex.assert_trees_all_close(gradients, case["grad_student"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_disagreement(case):
    differs = activation_transfer_loss(case["student"], case["teacher"])
    chex.assert_trees_all_close(differs.mean(), case["disagreement"], rtol=1e-6)
    agreement = activation_agreement(case["student"], case["teacher"])
    chex.assert_trees_all_close(agreement, 1 - case["disagreement"], rtol=1e-6)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_the_data_has_ties(case):
    """Without ties the tests above would not cover them."""
    student, margin = case["student"], case["margin"]
    for tie in (margin, -margin, np.float32(0)):
        assert np.mean(student == tie) >= 0.05
    assert np.mean(case["teacher"] == 0) >= 0.1


def test_bfloat16_inputs_are_computed_in_float32():
    student = jnp.asarray([0.3, -2.0], jnp.bfloat16)
    loss = activation_transfer_hinge(student, jnp.asarray([1.0, 1.0], jnp.bfloat16))
    assert loss.dtype == jnp.float32
    exact = (1 - np.asarray(student, np.float32)) ** 2
    chex.assert_trees_all_close(loss, exact, rtol=1e-7)
