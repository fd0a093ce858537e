"""The batch norm has Flax's numbers, variables, and gradients up to second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax.models.batch_norm import BatchNorm


def _flax(**fields):
    return nn.BatchNorm(False, momentum=0.9, epsilon=1e-5, **fields)


def _objective(norm, weights):
    """Computes a scalar that depends on every output, and the new statistics."""

    def value(variables, x):
        y, state = norm.apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y) * weights), state

    return value


def _drawn(shape, offset=0.3):
    """Images, weights of an objective, and Flax's variables with a scale that is not 1."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = offset + jax.random.normal(keys[0], shape)
    variables = _flax(param_dtype=x.dtype).init(keys[2], x)
    variables["params"]["scale"] += 0.1 * jax.random.normal(keys[3], shape[-1:])
    return x, jax.random.normal(keys[1], shape), variables


def _close(found, wanted, relative, absolute=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, relative, absolute), found, wanted)


@pytest.mark.parametrize("shape", [(8, 4, 3, 6), (16, 6)])
def test_numbers_and_gradients_are_those_of_flax(x64, shape):
    x, weights, variables = _drawn(shape)
    ours, flax = (
        norm(param_dtype=jnp.float64) for norm in (lambda **f: BatchNorm(False, **f), _flax)
    )
    described = lambda norm: jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), norm.init(jax.random.key(1), x)
    )
    assert described(ours) == described(flax)
    found = []
    for norm in (ours, flax):
        value = _objective(norm, weights)
        first = jax.value_and_grad(value, (0, 1), has_aux=True)(variables, x)
        slope = lambda x, value=value: jnp.sum(
            weights * jax.grad(lambda x: value(variables, x)[0])(x) ** 2
        )
        still = norm.clone(use_running_average=True).apply(variables, x)
        found.append((first, jax.grad(slope)(x), still))
    _close(*found, 1e-11, 1e-12)


def test_compiled_in_float32():
    x, weights, variables = _drawn((32, 8, 8, 16))
    found = [
        jax.jit(jax.value_and_grad(_objective(norm, weights), (0, 1), has_aux=True))(variables, x)
        for norm in (BatchNorm(False), _flax())
    ]
    _close(*found, 2e-4, 2e-5)


def test_statistics_and_gradients_over_devices_are_those_of_the_whole_batch(x64):
    x, weights, variables = _drawn((2, 8, 3, 6))
    alone, shared = (BatchNorm(False, axis_name=axis) for axis in (None, "devices"))
    whole = jax.value_and_grad(_objective(alone, weights), (0, 1), has_aux=True)(variables, x)

    def part(x, weights):
        (value, state), (own, slope) = jax.value_and_grad(
            _objective(shared, weights), (0, 1), has_aux=True
        )(variables, x)
        return jax.lax.psum((value, own["params"]), "devices"), state, slope

    (value, params), state, slope = jax.vmap(part, axis_name="devices")(x, weights)
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    _close((value[0], first(state)), whole[0], 1e-11)
    _close(first(params), whole[1][0]["params"], 1e-9, 1e-12)
    _close(slope, whole[1][1], 1e-9, 1e-12)


def test_half_precision_keeps_statistics_in_float32():
    x = (100 + jax.random.normal(jax.random.key(2), (512, 4))).astype(jnp.bfloat16)
    norm, flax = (make(dtype=jnp.bfloat16) for make in (lambda **f: BatchNorm(False, **f), _flax))
    variables = norm.init(jax.random.key(3), x)
    ones = jnp.ones(x.shape)
    found = [
        jax.value_and_grad(_objective(each, ones), 1, has_aux=True)(variables, x)
        for each in (norm, flax)
    ]
    (_, state), slope = found[0]
    assert slope.dtype == jnp.bfloat16
    assert state["batch_stats"]["mean"].dtype == jnp.float32
    exact = np.asarray(x, np.float64).mean(0)
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * exact, 1e-5)
    _close(state, found[1][0][1], 1e-3)


def test_gradients_have_the_dtypes_of_their_arguments(x64):
    x = jax.random.normal(jax.random.key(4), (8, 3), jnp.float32)
    norm = BatchNorm(False, dtype=jnp.float32, param_dtype=jnp.float64)
    variables = norm.init(jax.random.key(5), x)
    own, slope = jax.grad(_objective(norm, jnp.ones((8, 3))), (0, 1), has_aux=True)(variables, x)[0]
    assert slope.dtype == jnp.float32
    assert own["params"]["scale"].dtype == own["params"]["bias"].dtype == jnp.float64


@pytest.mark.parametrize("offset", [0.0, 3.7, 1e6])
def test_a_variance_that_rounding_loses_has_flaxs_gradient(offset):
    x = offset + 1e-3 * jax.random.normal(jax.random.key(6), (64, 3))
    x, weights = x.at[:, 0].set(offset), jax.random.normal(jax.random.key(7), (64, 3))
    variables = _flax().init(jax.random.key(8), x)
    ours, flax = (
        jax.grad(_objective(norm, weights), 1, has_aux=True)(variables, x)[0]
        for norm in (BatchNorm(False), _flax())
    )
    assert jnp.isfinite(ours).all()
    if offset == 1e6:  # rounding makes the variances negative there, and they are clipped to 0
        np.testing.assert_allclose(ours, flax, 1e-3, 1e-3)
