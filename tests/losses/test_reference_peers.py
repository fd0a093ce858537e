"""Compares the other methods' losses and gradients with a widely used PyTorch collection."""

import chex
import jax
import numpy as np
import pytest

from abflax.losses import (
    attention_transfer,
    centred_logits_difference,
    feature_difference,
    fsp,
    gram_between,
    knowledge_distillation,
    neuron_selectivity,
)


@pytest.fixture
def peers(reference):
    return reference("peer_losses")


def _assert_gradient(gradient, expected):
    """Compares to 1e-4 of an entry plus 1e-6 of the largest, as the reference is in float32."""
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def _assert_equals_reference(loss, peers, name, layers, teacher):
    """Compares `loss` of the layers, reduced over the batch, and its gradients."""
    students = [peers[f"layer{layer}/student"] for layer in layers]
    teachers = [peers[f"layer{layer}/{teacher}"] for layer in layers]
    value, gradients = jax.jit(jax.value_and_grad(loss))(students, teachers)
    chex.assert_trees_all_close(value, peers[f"{name}/loss"], rtol=1e-4)
    for layer, gradient in zip(layers, gradients, strict=True):
        _assert_gradient(gradient, peers[f"{name}/grad/layer{layer}/student"])


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_attention_transfer(peers, layer):
    def loss(students, teachers):
        return attention_transfer(*students, *teachers).mean()

    _assert_equals_reference(loss, peers, f"attention_transfer/{layer}", [layer], "teacher")


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_neuron_selectivity_polynomial(peers, layer):
    def loss(students, teachers):
        return neuron_selectivity(*students, *teachers, kernel="polynomial").mean()

    _assert_equals_reference(loss, peers, f"nst_poly/{layer}", [layer], "teacher")


@pytest.mark.parametrize("layer", [1, 2])
def test_fsp(peers, layer):
    def loss(students, teachers):
        return fsp(gram_between(*students), gram_between(*teachers)).mean()

    layers = [layer, layer + 1]
    _assert_equals_reference(loss, peers, f"fsp/{layer}", layers, "teacher_same_channels")


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_feature_difference_is_squared_error_where_both_fire(peers, layer, x64):
    """The reference has no ReLU: both are shifted to where it changes nothing.

    In float64, where the shift costs no digits.
    """
    student = peers[f"layer{layer}/student"].astype(np.float64)
    teacher = peers[f"layer{layer}/teacher_same_channels"].astype(np.float64)
    shift = 1 - min(student.min(), teacher.min())
    value, gradient = jax.value_and_grad(lambda s, t: feature_difference(s, t).mean())(
        student + shift, teacher + shift
    )
    chex.assert_trees_all_close(value, np.float64(peers[f"mse/{layer}/loss"]), rtol=1e-4)
    expected = peers[f"mse/{layer}/grad/layer{layer}/student"].astype(np.float64)
    _assert_gradient(gradient, expected)


@pytest.mark.parametrize(
    ("name", "temperature", "factor"),
    [("kd_T3_kl_no_T2", 3.0, 1.0), ("kd_T4_kl_times_T2", 4.0, 16.0)],
)
def test_knowledge_distillation(peers, name, temperature, factor):
    def loss(student):
        return factor * knowledge_distillation(student, peers["logits/teacher"], temperature).mean()

    value, gradient = jax.value_and_grad(loss)(peers["logits/student"])
    chex.assert_trees_all_close(value, peers[f"{name}/loss"], rtol=1e-4)
    _assert_gradient(gradient, peers[f"{name}/grad"])


def test_centred_logits(peers):
    def loss(student):
        return centred_logits_difference(student, peers["logits/teacher"]).mean()

    value, gradient = jax.value_and_grad(loss)(peers["logits/student"])
    chex.assert_trees_all_close(value, peers["dtl/loss"], rtol=1e-4)
    _assert_gradient(gradient, peers["dtl/grad"])
