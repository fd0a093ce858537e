"""Neuron selectivity transfer: kernels by hand, against all pairs, and the sizes of arrays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from abflax.errors import InputError
from abflax.losses import channel_patterns, neuron_selectivity, positions_pooled
from tests.losses.test_peer_losses import KERNELS, PER_EXAMPLE, _map, _normal, _summed_with_gradient


def test_channel_patterns_by_hand():
    patterns = channel_patterns(_map([[3.0, 0.0], [-4.0, 0.0]]))
    chex.assert_trees_all_close(patterns, jnp.asarray([[[0.6, -0.8], [0.0, 0.0]]]), rtol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        # Student f = (1, 0); teacher g = (1, 0), (0, 1). Squared distances: across 0, 2 (σ² = 1),
        # within the teacher 0, 2, 2, 0.
        ("linear", 0.5**2 + 0.5**2),
        ("polynomial", 1 + 0.5 - 2 * 0.5),
        ("gaussian", 1 + (1 + np.exp(-1)) / 2 - 2 * (1 + np.exp(-1)) / 2),
    ],
)
def test_neuron_selectivity_by_hand(kernel, expected):
    student = _map([[5.0], [0.0]])
    teacher = _map([[2.0, 0.0], [0.0, 3.0]])
    loss = neuron_selectivity(student, teacher, kernel)
    chex.assert_trees_all_close(loss, jnp.asarray([expected]), rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_neuron_selectivity_against_all_pairs(kernel, x64):
    """Compares with the definition, pair by pair, which is too slow for a large tap."""
    student, teacher = _normal(2, 4, 4, 3), _normal(2, 2, 2, 5, seed=1)
    f = channel_patterns(positions_pooled(student, teacher)[0])
    g = channel_patterns(teacher)

    def distances(x, y):
        return ((x[:, :, None] - y[:, None]) ** 2).sum(-1)

    def mean_kernel(x, y):
        if kernel == "gaussian":
            bandwidth = distances(f, g).mean((1, 2), keepdims=True)
            return jnp.exp(-distances(x, y) / (2 * bandwidth)).mean((1, 2))
        inner = (x[:, :, None] * y[:, None]).sum(-1)
        return (inner if kernel == "linear" else inner**2).mean((1, 2))

    expected = jax.jit(lambda: mean_kernel(f, f) + mean_kernel(g, g) - 2 * mean_kernel(f, g))()
    loss = PER_EXAMPLE[f"nst-{kernel}"](student, teacher)
    chex.assert_trees_all_close(loss, expected, rtol=1e-10)


def test_no_gradient_flows_through_the_bandwidth(x64):
    """The gradient is that of the Gaussian MMD with constant σ²."""
    student, teacher = _normal(1, 2, 2, 3), _normal(1, 2, 2, 2, seed=1)
    g = channel_patterns(teacher)

    def distances(x, y):
        return ((x[:, :, None] - y[:, None]) ** 2).sum(-1)

    bandwidth = distances(channel_patterns(student), g).mean()

    def held(student):
        f = channel_patterns(student)
        return sum(
            sign * jnp.exp(-distances(x, y) / (2 * bandwidth)).mean()
            for sign, x, y in ((1, f, f), (1, g, g), (-2, f, g))
        )

    _, gradient = _summed_with_gradient("nst-gaussian")(student, teacher)
    check_grads(jax.jit(held), (student,), 1, ["rev"], rtol=1e-5)
    chex.assert_trees_all_close(gradient, jax.jit(jax.grad(held))(student), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_discrepancy_of_equals_is_zero(kernel, channels):
    """With one channel the Gaussian's bandwidth would be zero without its lower bound."""
    features = _normal(3, 2, 4, channels).astype(np.float32)
    loss, gradient = _summed_with_gradient(f"nst-{kernel}")(features, features)
    atol = 1e-3 if (kernel, channels) == ("gaussian", 1) else 2e-6
    chex.assert_trees_all_close(loss, jnp.zeros(()), atol=atol)
    chex.assert_trees_all_close(gradient, jnp.zeros(features.shape), atol=atol)


def test_unknown_kernel():
    with pytest.raises(InputError, match="unknown kernel 'gausian'; did you mean gaussian?"):
        neuron_selectivity(jnp.ones((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1)), "gausian")


@pytest.mark.parametrize("kernel", KERNELS)
def test_neuron_selectivity_makes_nothing_larger_than_taps_and_gram_matrices(kernel):
    batch, side, ours, theirs = 2, 8, 24, 32
    student = jax.ShapeDtypeStruct((batch, side, side, ours), jnp.float32)
    teacher = jax.ShapeDtypeStruct((batch, side, side, theirs), jnp.float32)

    def loss(s, t):
        return neuron_selectivity(s, t, kernel).sum()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(student, teacher)
    sizes = [aval.size for aval in _intermediates(jaxpr.jaxpr)]
    gram = 0 if kernel == "linear" else batch * theirs * theirs
    assert max(sizes) <= max(batch * side * side * theirs, gram)


def _intermediates(jaxpr):
    """Yields the shapes of all arrays that a program computes, also in the programs it calls."""
    for equation in jaxpr.eqns:
        yield from (out.aval for out in equation.outvars)
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _intermediates(getattr(value, "jaxpr", value))


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
