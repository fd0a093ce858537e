"""Neurons that never fire: counted over all held-out images, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abflax import Network, evaluate, load
from abflax.methods import METHODS
from abflax.methods.objective import bind
from abflax.models import MODELS
from abflax.models.variables import init_variables
from abflax.taps import run_model
from abflax.training.step import eval_step

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def network():
    """A fresh wrn10-1, three of whose 64 last channels can never fire."""
    model = MODELS["wrn10-1"]()
    variables = jax.tree.map(np.array, init_variables(model, jax.random.key(3), SHAPE))
    variables["params"]["norm"]["bias"][:3] = -1000
    return Network(model, variables)


@pytest.fixture(scope="module")
def test_images():
    return load("digits", "test").take(np.arange(50))


def _by_hand(network, images):
    normalised = jnp.asarray((images - 4.88) / 6.02, jnp.float32)
    taps = run_model(network.model, network.variables, normalised, train=False).taps
    return {layer: np.asarray(tap) > 0 for layer, tap in taps.items()}


@pytest.mark.parametrize("devices", [1, 8])
def test_share_of_neurons_that_never_fire(network, test_images, devices):
    found = evaluate(network, test_images, devices=devices)["silent"]
    fires = _by_hand(network, test_images.images)
    expected = {layer: 1 - on.any(axis=0).mean() for layer, on in fires.items()}
    assert list(found) == ["layer1", "layer2", "layer3"]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found["layer3"] >= 3 / 64 and 0 < found["layer1"] < 1


def test_masked_examples_do_not_count(network, test_images):
    (phase,) = METHODS["cross-entropy"]()
    objective = bind(network.model, None, phase, SHAPE)
    images = jnp.asarray((test_images.images[:4] - 4.88) / 6.02, jnp.float32)
    sums = eval_step(
        objective,
        {"student": network.variables["params"], "connectors": {}},
        {
            "student": {"batch_stats": network.variables["batch_stats"]},
            "connectors": {},
            "teacher": {},
        },
        None,
        images,
        jnp.zeros(4, jnp.int32),
        jnp.array([True, False, True, False]),
    )
    fires = _by_hand(network, test_images.images[:4])
    for layer, on in fires.items():
        np.testing.assert_array_equal(sums["fired"][layer], on[[0, 2]].any(axis=0))
        assert (on[[0, 2]].any(axis=0) != on.any(axis=0)).any()
