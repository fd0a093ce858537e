"""Batch norm: Flax's numbers, its variables, its gradients to the second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax.norm import BatchNorm

SETTINGS = {"momentum": 0.9, "epsilon": 1e-5}


def _objective(norm, weights):
    """A scalar that depends on every output, and the new statistics."""

    def value(variables, x):
        y, state = norm.apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y) * weights), state

    return value


@pytest.mark.parametrize("shape", [(8, 4, 3, 6), (16, 6)])
def test_numbers_and_gradients_are_those_of_flax(shape):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        x = 0.3 + jax.random.normal(keys[0], shape)
        weights = jax.random.normal(keys[1], shape)
        ours = BatchNorm(False, param_dtype=jnp.float64)
        flax = nn.BatchNorm(False, param_dtype=jnp.float64, **SETTINGS)
        variables = flax.init(keys[2], x)
        described = lambda norm: jax.tree.map(  # noqa: E731
            lambda leaf: (leaf.shape, leaf.dtype), norm.init(keys[2], x)
        )
        assert described(ours) == described(flax)
        variables["params"]["scale"] += 0.1 * jax.random.normal(keys[3], shape[-1:])
        found = []
        for norm in (ours, flax):
            value = _objective(norm, weights)
            first = jax.value_and_grad(value, (0, 1), has_aux=True)(variables, x)
            slope = lambda x, value=value: jnp.sum(  # noqa: E731
                weights * jax.grad(lambda x: value(variables, x)[0])(x) ** 2
            )
            still = norm.clone(use_running_average=True).apply(variables, x)
            found.append((first, jax.grad(slope)(x), still))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-11, 1e-12), *found)


def test_statistics_and_gradients_over_devices_are_those_of_the_whole_batch():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 2)
        x = jax.random.normal(keys[0], (2, 8, 3, 6))
        weights = jax.random.normal(keys[1], (2, 8, 3, 6))
        alone, shared = (BatchNorm(False, axis_name=axis) for axis in (None, "devices"))
        variables = alone.init(keys[0], x[0])
        whole = jax.value_and_grad(_objective(alone, weights), 1, has_aux=True)(variables, x)

        def part(x, weights):
            # As the step does: the mean over devices of the gradients of each one's own part.
            (value, state), slope = jax.value_and_grad(
                _objective(shared, weights), 1, has_aux=True
            )(variables, x)
            return jax.lax.psum(value, "devices"), state, slope

        value, state, slope = jax.vmap(part, axis_name="devices")(x, weights)
        np.testing.assert_allclose(value[0], whole[0][0], 1e-11)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, 1e-11), state, whole[0][1])
        np.testing.assert_allclose(slope, whole[1], 1e-9, 1e-12)


def test_half_precision_keeps_statistics_in_float32():
    x = (100 + jax.random.normal(jax.random.key(2), (512, 4))).astype(jnp.bfloat16)
    norm = BatchNorm(False, dtype=jnp.bfloat16)
    y, state = norm.apply(norm.init(jax.random.key(3), x), x, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64).mean(0)
    assert state["batch_stats"]["mean"].dtype == jnp.float32
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * exact, 1e-5)


def test_a_constant_channel_stays_finite():
    norm = BatchNorm(False)
    x = jnp.full((32, 2), 3.7)
    variables = norm.init(jax.random.key(4), x)
    value, slope = jax.value_and_grad(
        lambda x: norm.apply(variables, x, mutable=["batch_stats"])[0].sum()
    )(x)
    assert jnp.isfinite(value) and jnp.isfinite(slope).all()
