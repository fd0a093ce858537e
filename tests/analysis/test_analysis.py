"""Measures of neurons, by hand on small numbers and networks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax import Dataset, InputError, Network, Tapped
from abflax.analysis import (
    boundary_distances,
    by_channel,
    by_class,
    dead_neurons,
    error_by_agreement,
    examine,
    first_order_distance,
    matching,
    pattern_digests,
)
from abflax.data import Preprocessing
from abflax.metrics import activation_agreement

RNG = np.random.default_rng(0)


def test_matching_is_agreement_before_the_mean():
    student = np.array([[0.0, 1.0, -1.0], [2.0, 0.0, 3.0]])
    teacher = np.array([[-5.0, 0.1, 1.0], [0.0, -0.0, 1.0]])
    found = matching(student, teacher)
    np.testing.assert_array_equal(found, [[True, True, False], [False, True, True]])
    chex.assert_trees_all_close(found.mean(), activation_agreement(student, teacher))
    np.testing.assert_array_equal(matching(student > 0, teacher), found)
    with pytest.raises(InputError, match=r"\(2, 3\) is not the teacher's \(3, 2\)"):
        matching(student, teacher.T)


def test_means_by_channel_and_class():
    rates = np.array([[[0.0, 0.5], [1.0, 0.5]], [[0.0, 0.25], [0.0, 0.75]]])
    np.testing.assert_array_equal(by_channel(rates), [0.25, 0.5])
    np.testing.assert_array_equal(by_channel(rates[0, 0]), [0.0, 0.5])
    found = by_class(np.array([1.0, 0.0, 0.5]), np.array([2, 0, 2]), 4)
    np.testing.assert_array_equal(found, [0.0, np.nan, 0.75, np.nan])
    with pytest.raises(InputError, match=r"\(3,\) and \(2,\)"):
        by_class(np.ones(3), np.ones(2, int), 4)


def test_dead_neurons():
    never, always = dead_neurons(np.array([0.0, 1.0, 0.5, 1e-9]))
    np.testing.assert_array_equal(never, [True, False, False, False])
    np.testing.assert_array_equal(always, [False, True, False, False])


def test_error_by_agreement():
    agreement = np.array([0.9, 0.1, 0.5, 0.5, 0.7])
    wrong = np.array([False, True, True, False, False])
    found = error_by_agreement(agreement, wrong, 2)  # {0.1, 0.5, 0.5}, {0.7, 0.9}
    np.testing.assert_array_equal(found.examples, [3, 2])
    np.testing.assert_allclose(found.agreement, [1.1 / 3, 0.8])
    np.testing.assert_allclose(found.error, [2 / 3, 0])
    np.testing.assert_allclose(found.standard_error, [np.sqrt(2 / 27), 0])
    with pytest.raises(InputError, match="5 examples cannot make 6 groups"):
        error_by_agreement(agreement, wrong, 6)


def test_first_order_distance():
    gradients = jnp.array([[[3.0, 4.0]], [[0.0, 0.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    found = first_order_distance(jnp.array([-10.0, 2.0, 0.0, 0.0]), gradients)
    np.testing.assert_array_equal(found, [2.0, np.inf, np.inf, 0.0])


def test_patterns():
    bits = np.array([[[1, 0], [0, 1]], [[1, 0], [0, 1]], [[0, 1], [1, 0]]], bool)
    assert len(set(pattern_digests(bits))) == 2
    assert len(set(pattern_digests(np.packbits(bits.reshape(3, 4), axis=1)))) == 2


class Net(nn.Module):
    """Two hidden layers on flat points."""

    widths: tuple[int, int] = (6, 5)

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(self.widths[0], name="first")(x))
        x = nn.relu(nn.Dense(self.widths[1], name="second")(x))
        return nn.Dense(3, name="head")(x)


PATHS = {"layer1": "first", "layer2": "second"}


def _network(key, **fields):
    variables = Net(**fields).init(jax.random.key(key), jnp.zeros((1, 2, 2, 1)))
    bias = lambda leaf: leaf if leaf.ndim == 2 else leaf + 0.3
    return Network(Tapped(Net(**fields), PATHS), jax.tree.map(bias, variables))


@pytest.fixture(scope="module")
def data():
    """More than one batch, and not a multiple of it; every image occurs twice."""
    images = np.repeat(RNG.standard_normal((133, 2, 2, 1)), 2, axis=0).astype(np.float32)
    labels = RNG.integers(0, 3, 266)
    return Dataset(images, labels, 4, Preprocessing(mean=(0.5,), std=(2.0,)))


def _by_hand(network, data):
    """Computes the pre-activations of both layers and the logits, in NumPy."""
    x = (data.images.reshape(len(data), -1) - 0.5) / 2
    taps = []
    for name in ("first", "second", "head"):
        weights = network.variables["params"][name]
        taps.append(x @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"]))
        x = np.maximum(taps[-1], 0)
    return taps


class _FourLogits(Net):
    @nn.compact
    def __call__(self, x):
        return jnp.pad(super().__call__(x), ((0, 0), (0, 1)), constant_values=-9.0)


def _four(network):
    return Network(Tapped(_FourLogits(network.model.model.widths), PATHS), network.variables)


def test_examine(data):
    student, teacher = _four(_network(0)), _four(_network(1))
    found = examine(student, data, teacher)
    ours, theirs = _by_hand(student, data), _by_hand(teacher, data)
    for index, layer in enumerate(("layer1", "layer2")):
        agrees = (ours[index] > 0) == (theirs[index] > 0)
        match = found.match[layer]
        np.testing.assert_allclose(match.by_neuron, agrees.mean(axis=0))
        np.testing.assert_allclose(match.by_channel, agrees.mean(axis=0))
        np.testing.assert_allclose(match.by_example, agrees.mean(axis=1), rtol=1e-6)
        np.testing.assert_allclose(match.agreement, agrees.mean())
        for label in range(3):
            expected = agrees[data.labels == label].mean()
            np.testing.assert_allclose(match.by_class[label], expected, rtol=1e-6)
        assert np.isnan(match.by_class[3])
        for activity, taps in ((found.student, ours), (found.teacher, theirs)):
            fires = taps[index] > 0
            np.testing.assert_allclose(activity.firing_rate[layer], fires.mean(axis=0))
            assert activity.patterns[layer] == len(np.unique(fires, axis=0)) <= 133
    joint = np.unique(np.concatenate([ours[0] > 0, ours[1] > 0], axis=1), axis=0)
    assert found.student.joint_patterns == len(joint)
    np.testing.assert_array_equal(found.student.predictions, ours[2].argmax(axis=1))
    np.testing.assert_array_equal(found.teacher.wrong, theirs[2].argmax(axis=1) != data.labels)
    expected = np.mean([found.match[layer].by_example for layer in PATHS], axis=0)
    np.testing.assert_array_equal(found.agreement_by_example(), expected)


def test_layers_of_other_widths_are_left_out_and_named(data):
    found = examine(_four(_network(0)), data, _four(_network(1, widths=(7, 5))))
    assert set(found.match) == {"layer2"} and found.unmatched == ("layer1",)
    alone = examine(_four(_network(0)), data)
    assert alone.teacher is None and alone.unmatched == ()
    with pytest.raises(InputError, match="there is no layer in which both networks have"):
        alone.agreement_by_example()
    with pytest.raises(InputError, match="has 3 logits for 4 classes"):
        examine(_network(0), data)


def test_distance_to_the_boundaries_of_the_first_layer_is_exact(data):
    """The distance is |w·x + b| / ‖w‖, with pixels normalized by a deviation of 2."""
    network = _four(_network(0))
    found = boundary_distances(network, data, "layer1", neurons=None)
    kernel = np.asarray(network.variables["params"]["first"]["kernel"])
    values = _by_hand(network, data)[0]
    expected = np.abs(values) / np.linalg.norm(kernel / 2, axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    drawn = boundary_distances(network, data, "layer1", neurons=2, seed=1)
    assert drawn.shape == (266, 2)
    assert all(any(np.allclose(column, each, rtol=1e-4) for each in expected.T)
               for column in drawn.T)  # fmt: skip
    with pytest.raises(InputError, match="unknown layer 'layer3'"):
        boundary_distances(network, data, "layer3")


def test_distance_to_deeper_boundaries_is_where_the_neuron_turns(data):
    """A step of that length along the gradient reaches s = 0 if no unit before it flips."""
    network, few = _four(_network(2)), data.take(np.arange(0, 60, 2))
    found = boundary_distances(network, few, "layer2", neurons=None)
    reached = 0
    for neuron in range(5):
        value = lambda x, neuron=neuron: _second(network, x)[:, neuron]
        x = jnp.asarray(few.images)
        gradient = jax.grad(lambda x, value=value: value(x).sum())(x)
        norm = jnp.sqrt(jnp.square(gradient).sum(axis=(1, 2, 3), keepdims=True))
        step = gradient / norm * (jnp.sign(value(x)) * found[:, neuron])[:, None, None, None]
        same = jnp.all((_first(network, x - step) > 0) == (_first(network, x) > 0), axis=1)
        straight = np.asarray(same & jnp.isfinite(found[:, neuron]))
        reached += straight.sum()
        np.testing.assert_allclose(value(x - step)[straight], 0, atol=1e-5)
    assert reached > 20


def _first(network, x):
    weights = network.variables["params"]["first"]
    return ((x - 0.5) / 2).reshape(len(x), -1) @ weights["kernel"] + weights["bias"]


def _second(network, x):
    weights = network.variables["params"]["second"]
    return nn.relu(_first(network, x)) @ weights["kernel"] + weights["bias"]
