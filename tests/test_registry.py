"""Every method, on a tiny pair of different widths: its own transfer loss falls in 20 steps."""

import jax
import numpy as np
import pytest

from abflax import Network, Resources, distill, load
from abflax.methods import METHODS
from abflax.models import MODELS
from abflax.step import init_variables

STEPS = 20
# The published 3/1000 is made for a wrn22-4 on 32×32 images; the tiny teacher's taps have 32 times
# fewer neurons, so this is the same weight on the mean over neurons.
WEIGHT = dict.fromkeys(("activation-boundary", "fitnet", "l2", "l1", "l0.5"), 32.0)


@pytest.fixture(scope="module")
def pair():
    model = MODELS["wrn10-2"]()
    teacher = Network(model, init_variables(model, jax.random.key(5), (8, 8, 1)), "random")
    return teacher, load("digits", "train").take(np.arange(16))


@pytest.mark.parametrize("name", METHODS)
def test_transfer_loss_falls(pair, name):
    teacher, data = pair
    phases = METHODS[name](protocol="paper")
    # Sixteen digits in one batch: an epoch is a step, so the history has the loss of each.
    epochs = (0, STEPS) if len(phases) == 1 else (STEPS, 0)
    record = distill(
        MODELS["wrn10-1"](), teacher, data, method=name, epochs=epochs, batch_size=16,
        resources=Resources(devices=1),
        **({"transfer_weight": WEIGHT[name]} if name in WEIGHT else {}),
    ).record  # fmt: skip
    losses = [entry["loss"] for entry in record["history"]]
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), losses
