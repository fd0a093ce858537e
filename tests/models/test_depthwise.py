"""The depthwise convolution's two formulations give the same numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from abflax.models.depthwise import (
    convolved,
    convolved_gradients,
    depthwise,
    sliced,
    sliced_gradients,
)

AROUND = ((1, 1), (1, 1))
CASES = [  # batch, height, width, channels, kernel, strides, padding
    (2, 6, 5, 3, 3, (1, 1), AROUND), (3, 6, 7, 2, 3, (2, 2), AROUND),
    (2, 1, 1, 4, 3, (2, 2), AROUND), (2, 8, 7, 2, 5, (2, 1), ((2, 1), (0, 2))),
    (2, 5, 6, 2, 1, (2, 3), ((0, 0), (0, 0))), (2, 5, 6, 2, (1, 3), (1, 2), AROUND),
    (1, 2, 3, 2, 3, (1, 2), ((0, 6), (2, 0))),
]  # fmt: skip


def _drawn(batch, height, width, channels, kernel, dtype=np.float64):
    draw = np.random.default_rng(0).standard_normal
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    images, weights = (batch, height, width, channels), (*sides, 1, channels)
    return jnp.asarray(draw(images), dtype), jnp.asarray(draw(weights), dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_values_and_gradients(x64, case):
    *shape, strides, padding = case
    static = (strides, padding, None)
    run = functools.partial(
        depthwise, strides=strides, padding=padding, feature_group_count=shape[3]
    )

    @jax.jit
    def all_ways(images, kernel):
        value = convolved(images, kernel, static)
        cotangent = jnp.cos(value)
        return [
            (value, convolved_gradients(images, kernel, cotangent, static)),
            (sliced(images, kernel, static),
             sliced_gradients(images, kernel, cotangent, static)),
            (run(images, kernel), jax.vjp(run, images, kernel)[1](cotangent)),
        ]  # fmt: skip

    wanted, *others = all_ways(*_drawn(*shape))
    for each in others:
        chex.assert_trees_all_close(each, wanted, rtol=1e-12, atol=1e-12)


def test_by_hand():
    """A padded 3×3 window contains all four pixels of a 2×2 image at each position."""
    images = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    both = jnp.concatenate([images, -images], axis=-1)
    run = functools.partial(depthwise, strides=(1, 1), padding=AROUND, feature_group_count=2)
    out = jax.jit(run)(both, jnp.ones((3, 3, 1, 2)))
    chex.assert_trees_all_close(out, jnp.broadcast_to(jnp.array([10.0, -10.0]), (1, 2, 2, 2)))


@pytest.mark.slow
def test_to_second_order(x64):
    run = functools.partial(depthwise, strides=(2, 2), padding=AROUND, feature_group_count=2)
    loss = jax.jit(lambda x, w: jnp.sin(run(x, w)).sum())
    jax.test_util.check_grads(loss, _drawn(2, 4, 3, 2, 3), order=2, modes=["rev"])


@pytest.mark.slow
def test_bfloat16_is_summed_in_float32():
    images, kernel = _drawn(2, 6, 6, 3, 3, jnp.bfloat16)
    static = ((1, 1), AROUND, None)
    run = jax.jit(lambda x, w: (sliced(x, w, static), sliced_gradients(x, w, x, static)))
    wide = (each.astype(jnp.float32) for each in (images, kernel))
    wanted = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), run(*wide))
    chex.assert_trees_all_equal(run(images, kernel), wanted)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_convolutions_where_they_are_fast(platform, convolutions):
    """Counts convolutions forward and in the gradients of images and kernel."""
    run = functools.partial(depthwise, strides=(1, 1), padding=AROUND, feature_group_count=3)
    step = jax.jit(lambda x, w: (run(x, w), jax.grad(lambda *a: run(*a).sum(), (0, 1))(x, w)))
    program = step.trace(*_drawn(2, 6, 6, 3, 3, np.float32))
    text = program.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions
    assert ("stablehlo.while" in text) == (platform == "cpu")


def test_unsupported_arguments_are_refused():
    images, kernel = _drawn(1, 4, 4, 2, 3, np.float32)
    for given, others in (
        (kernel, {"feature_group_count": 1}),
        (kernel, {"feature_group_count": 2, "rhs_dilation": (2, 2)}),
        (jnp.ones((3, 3, 1, 4)), {"feature_group_count": 2}),
        (jnp.ones((3, 3, 2, 2)), {"feature_group_count": 2}),
    ):
        with pytest.raises(NotImplementedError, match="one kernel for each channel"):
            depthwise(images, given, (1, 1), AROUND, **others)
