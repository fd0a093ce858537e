"""The other methods' losses at their edges: hand-computed numbers, zeros, shapes, memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from abflax.errors import InputError
from abflax.losses import (
    attention_map,
    attention_pixel_cotangent,
    attention_transfer,
    centred_logits_difference,
    channel_patterns,
    feature_difference,
    fsp,
    gram_between,
    jacobian_difference,
    largest_attention_pixel,
    neuron_selectivity,
    positions_pooled,
)

KERNELS = ("linear", "polynomial", "gaussian")
SMOOTHING = 1e-3  # documented in feature_difference


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _map(rows):
    """[positions][channels] of one example -> [1, positions, 1, channels]."""
    return jnp.asarray(rows, jnp.result_type(float))[None, :, None, :]


# The losses of two feature maps, one number per example; compiled, which is faster.
PER_EXAMPLE = {
    "attention": jax.jit(attention_transfer),
    "jacobian": jax.jit(jacobian_difference),
    **{f"nst-{k}": jax.jit(functools.partial(neuron_selectivity, kernel=k)) for k in KERNELS},
    "fsp": jax.jit(lambda s, t: fsp(gram_between(s, s[..., :2]), gram_between(t, t[..., :2]))),
}


@functools.cache
def _summed_with_gradient(name):
    return jax.jit(jax.value_and_grad(lambda s, t: PER_EXAMPLE[name](s, t).sum()))


# l_p


@pytest.mark.parametrize("power", [0.5, 0.9, 1.0, 1.5, 2.0, 3.0])
def test_feature_difference_by_hand(power):
    student = jnp.asarray([0.0, -1.0, 2.0, -3.0, 4.0])
    teacher = jnp.asarray([0.0, -5.0, 0.5, 2.0, -1.0])
    distance = np.asarray([0.0, 0.0, 1.5, 2.0, 4.0])
    expected = distance**power
    if power < 1:
        expected = (distance**2 + SMOOTHING**2) ** (power / 2) - SMOOTHING**power
    loss = feature_difference(student, teacher, power)
    chex.assert_trees_all_close(loss, np.float32(expected), rtol=1e-5)
    assert (loss[:2] == 0).all()  # exactly 0: most neurons of a layer are inactive in both networks


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 1.5, 2.0])
def test_gradient_of_l_p_at_zero_is_zero(power):
    at = jnp.asarray([0.0, 0.7, -1.0])  # a tie at 0, a tie above 0, both inactive
    gradient = jax.grad(lambda s: feature_difference(s, at, power).sum())(at)
    chex.assert_trees_all_equal(gradient, jnp.zeros(3))


@pytest.mark.parametrize("power", [0.25, 0.5, 0.9])
def test_gradient_of_l_p_near_zero_is_as_documented(power, x64):
    distance = np.concatenate([[1e-300, 1e-30], np.geomspace(1e-9, 10, 41)])
    gradient = jax.grad(lambda s: feature_difference(s, jnp.zeros(43), power).sum())(distance)
    square = distance**2 + SMOOTHING**2
    expected = power * distance * square ** (power / 2 - 1)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-9)
    assert (gradient < power * SMOOTHING ** (power - 1)).all()


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
def test_gradient_of_l_p_against_finite_differences(power, x64):
    # No entry is within 0.05 of a kink: the zero of a ReLU, or a tie.
    student = np.asarray([0.3, 1.2, -0.4, -0.2, 2.0])
    teacher = np.asarray([0.9, 0.1, 0.8, -0.6, 1.9])
    check_grads(
        lambda s, t: feature_difference(s, t, power), (student, teacher), 1, ["rev"], rtol=1e-6
    )


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan")])
def test_l_p_refuses_powers_that_are_not_above_zero(power):
    with pytest.raises(InputError, match=f"power must be above 0, not {power}"):
        feature_difference(jnp.ones(2), jnp.ones(2), power)


# Pooling


def test_the_larger_map_is_pooled_to_the_smaller():
    large = np.arange(16.0, dtype=np.float32).reshape(1, 4, 4, 1)
    small = np.ones((1, 2, 4, 3), np.float32)
    means = np.asarray([[2, 3, 4, 5], [10, 11, 12, 13]], np.float32)[None, :, :, None]
    chex.assert_trees_all_equal(positions_pooled(large, small), (means, small))
    chex.assert_trees_all_equal(positions_pooled(small, large), (small, means))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 6, 6, 3), (2, 4, 4, 3)),  # no whole multiple
        ((2, 8, 2, 3), (2, 4, 4, 3)),  # taller but narrower
        ((2, 4, 4, 3), (3, 4, 4, 3)),  # another batch
    ],
)
@pytest.mark.parametrize(
    "loss", [positions_pooled, attention_transfer, neuron_selectivity, gram_between]
)
def test_maps_that_cannot_be_pooled_are_refused(loss, student, teacher):
    with pytest.raises(InputError) as error:
        loss(jnp.ones(student), jnp.ones(teacher))
    assert str(student) in str(error.value)
    assert str(teacher) in str(error.value)


@pytest.mark.parametrize(
    "of",
    [
        attention_map,
        channel_patterns,
        largest_attention_pixel,
        lambda x: positions_pooled(jnp.ones((2, 1, 1, 4)), x),
        lambda x: jacobian_difference(x, x),
        lambda x: attention_pixel_cotangent(x, jnp.zeros(2, int)),
    ],
)
def test_what_is_no_feature_map_is_refused(of):
    with pytest.raises(InputError, match=r"\[batch, height, width, channels\], not \(2, 5\)"):
        of(jnp.ones((2, 5)))


@pytest.mark.parametrize(
    "loss", [feature_difference, fsp, jacobian_difference, centred_logits_difference]
)
def test_shapes_that_differ_are_refused(loss):
    with pytest.raises(InputError) as error:
        loss(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 1)))
    assert "(2, 3, 4)" in str(error.value)
    assert "(2, 3, 1)" in str(error.value)


# Attention


def test_attention_by_hand():
    student = _map([[1.0, 1.0], [0.0, 0.0]])  # mean F²: 1, 0 -> (1, 0)
    teacher = _map([[2.0, 2.0], [-2.0, 2.0]])  # 4, 4 -> (1, 1)/√2
    chex.assert_trees_all_close(attention_map(student), jnp.asarray([[1.0, 0.0]]), rtol=1e-6)
    root = np.sqrt(0.5)
    chex.assert_trees_all_close(attention_map(teacher), jnp.asarray([[root, root]]), rtol=1e-6)
    expected = ((1 - root) ** 2 + root**2) / 2
    chex.assert_trees_all_close(
        attention_transfer(student, teacher), jnp.asarray([expected]), rtol=1e-5
    )


def test_attention_pools_the_activations_before_they_are_squared():
    student = _map([[1.0], [1.0]])  # (1, 1)/√2
    teacher = _map([[3.0], [-3.0], [2.0], [0.0]])  # 0, 1 -> (0, 1)
    root = np.sqrt(0.5)
    expected = (root**2 + (1 - root) ** 2) / 2
    chex.assert_trees_all_close(
        attention_transfer(student, teacher), jnp.asarray([expected]), rtol=1e-5
    )


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_normalization_is_independent_of_scale(scale):
    """Fourth powers of 1e±15 are out of range in float32, so the largest entry is divided out."""
    features = _normal(2, 3, 3, 4).astype(np.float32)
    chex.assert_trees_all_close(attention_map(scale * features), attention_map(features), rtol=1e-5)
    gradient = jax.grad(lambda x: (attention_map(x) ** 3).sum())
    chex.assert_trees_all_close(
        scale * gradient(scale * features), gradient(features), rtol=1e-4, atol=1e-6
    )


# Gram matrices


def test_fsp_by_hand():
    first = _map([[1.0, 2.0], [3.0, 4.0]])
    second = _map([[1.0], [-1.0]])
    gram = gram_between(first, second)
    chex.assert_trees_all_close(gram, jnp.asarray([[[-1.0], [-1.0]]]), rtol=1e-6)
    taller = _map([[1.0, 2.0], [1.0, 2.0], [6.0, 8.0], [0.0, 0.0]])
    chex.assert_trees_all_close(gram_between(taller, second), gram, rtol=1e-6)
    chex.assert_trees_all_close(gram_between(second, taller), gram.swapaxes(1, 2), rtol=1e-6)
    loss = fsp(gram, jnp.asarray([[[1.0], [-2.0]]]))
    chex.assert_trees_all_close(loss, jnp.asarray([2.5]), rtol=1e-6)


# Jacobians


def test_jacobian_difference_by_hand():
    student = np.zeros((4, 1, 2, 1), np.float32)
    teacher = np.zeros((4, 1, 2, 1), np.float32)
    teacher[:, 0, 0, 0] = 2.0
    student[0, 0, 0, 0] = 7.0  # the same direction
    student[1, 0, 1, 0] = 7.0  # at a right angle
    student[2, 0, 0, 0] = -7.0  # the opposite; the last is all zero
    chex.assert_trees_all_close(
        jacobian_difference(student, teacher), jnp.asarray([0.0, 2.0, 4.0, 1.0]), atol=1e-6
    )


def test_largest_attention_pixel():
    features = np.zeros((3, 2, 3, 2), np.float32)
    features[0, 1, 2] = (-3.0, 0.0)  # mean square 4.5 beats 4
    features[0, 0, 0] = (2.0, 2.0)
    features[1, 0, 1] = features[1, 1, 0] = (1.0, 0.0)  # a tie: the first
    index = largest_attention_pixel(features)
    chex.assert_trees_all_equal(np.asarray(index), np.asarray([5, 1, 0], index.dtype))


def test_cotangent_is_the_gradient_of_the_pixel():
    features = _normal(2, 2, 3, 4).astype(np.float32)
    index = np.asarray([4, 1])

    def pixels(x):
        return (x**2).mean(-1).reshape(2, 6)[np.arange(2), index].sum()

    cotangent = attention_pixel_cotangent(features, index)
    chex.assert_trees_all_close(cotangent, jax.grad(pixels)(features), rtol=1e-6)
    assert attention_pixel_cotangent(jnp.asarray(features, jnp.bfloat16), index).dtype == "bfloat16"


def test_cotangent_needs_one_index_for_each_example():
    with pytest.raises(InputError, match=r"\(2, 2, 3, 4\) need an index of shape \(2,\), not \(\)"):
        attention_pixel_cotangent(jnp.ones((2, 2, 3, 4)), 0)


def test_jacobian_matching_against_finite_differences_to_second_order(x64):
    """Tests the input gradient of a network's pixel, and its gradient in the weights."""
    images = _normal(2, 2, 2, 2)
    teacher = _normal(2, 2, 2, 2, seed=1)
    weights = _normal(2, 3, seed=2)
    index = np.asarray([3, 1])

    def network(weights, images):
        return jnp.tanh(images @ weights)

    def jacobian(weights):
        features, pullback = jax.vjp(lambda x: network(weights, x), images)
        return pullback(attention_pixel_cotangent(features, index))[0]

    def pixels(images):
        energy = (network(weights, images) ** 2).mean(-1)
        return energy.reshape(2, 4)[np.arange(2), index].sum()

    chex.assert_trees_all_close(jacobian(weights), jax.grad(pixels)(images), rtol=1e-12)
    check_grads(pixels, (images,), 1, ["rev"], rtol=1e-6)
    loss = jax.jit(lambda w: jacobian_difference(jacobian(w), teacher))
    check_grads(loss, (weights,), 2, ["rev"], rtol=1e-5)


# Logits


def test_centred_logits_by_hand():
    student = jnp.asarray([[1.0, 2.0, 6.0]])  # centred: −2, −1, 3
    teacher = jnp.asarray([[10.0, 10.0, 10.0]])
    chex.assert_trees_all_close(
        centred_logits_difference(student, teacher), jnp.asarray([[4.0, 1.0, 9.0]]), rtol=1e-6
    )


# All of them


@pytest.mark.parametrize("name", [n for n in PER_EXAMPLE if n != "nst-gaussian"])
def test_gradients_against_finite_differences(name, x64):
    """Also in the teacher. (A test above covers the Gaussian's constant bandwidth.)"""
    student, teacher = _normal(2, 2, 2, 3), _normal(2, 2, 2, 3, seed=1)
    check_grads(PER_EXAMPLE[name], (student, teacher), 1, ["rev"], rtol=1e-5)


@pytest.mark.parametrize("name", PER_EXAMPLE)
@pytest.mark.parametrize("silent", ["example", "channel", "both networks"])
def test_zeros_give_finite_losses_and_no_gradient(name, silent):
    student = _normal(2, 2, 2, 3).astype(np.float32)
    teacher = _normal(2, 2, 2, 3, seed=1).astype(np.float32)
    where = np.s_[..., 1] if silent == "channel" else np.s_[0]
    student[where] = 0
    if silent == "both networks":
        teacher[where] = 0
    loss, gradient = _summed_with_gradient(name)(student, teacher)
    chex.assert_tree_all_finite((loss, gradient))
    # Jacobians have no silent channels, and Gram matrices are not normalized.
    if not (name == "fsp" or (name == "jacobian" and silent == "channel")):
        chex.assert_trees_all_equal(gradient[where], jnp.zeros_like(gradient[where]))


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_nan_is_not_hidden(name):
    student = _normal(2, 2, 2, 3).astype(np.float32)
    student[1, 0, 0, 0] = np.nan
    loss = PER_EXAMPLE[name](student, _normal(2, 2, 2, 3, seed=1).astype(np.float32))
    chex.assert_trees_all_equal(np.isnan(loss), np.asarray([False, True]))


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_each_example_has_its_own_number_under_jit_and_vmap(name):
    student = _normal(3, 2, 2, 3).astype(np.float32)
    teacher = _normal(3, 2, 2, 3, seed=1).astype(np.float32)
    loss = PER_EXAMPLE[name](student, teacher)
    chex.assert_shape(loss, (3,))
    alone = jax.vmap(PER_EXAMPLE[name])(student[:, None], teacher[:, None])
    chex.assert_trees_all_close(alone[:, 0], loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [*PER_EXAMPLE.values(), centred_logits_difference, lambda s, t: feature_difference(s, t, 0.5)],
    ids=[*PER_EXAMPLE, "dtl", "l0.5"],
)
def test_dtypes(loss, x64):
    """bfloat16 is computed in float32; float64 stays."""
    student = jnp.asarray(_normal(2, 2, 2, 3), jnp.bfloat16)
    teacher = jnp.asarray(_normal(2, 2, 2, 3, seed=1), jnp.bfloat16)
    half = loss(student, teacher)
    single = loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    double = loss(student.astype(jnp.float64), teacher.astype(jnp.float64))
    chex.assert_trees_all_equal(half, single)
    chex.assert_trees_all_close(single, np.float32(double), rtol=1e-4, atol=1e-6)
    assert (half.dtype, double.dtype) == (jnp.float32, jnp.float64)
