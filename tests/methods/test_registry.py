"""Each method's transfer loss falls in 20 steps, on a tiny pair of different widths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from abflax import Network, Resources, distill, load
from abflax.methods import METHODS
from abflax.models.variables import init_variables
from abflax.taps import sow_features, sow_tap

STEPS = 20
# The published 3/1000 is for a wrn22-4 on 32×32 images. The tiny teacher's taps have at least 64
# times fewer neurons, so this is about the same weight on the mean over neurons.
WEIGHT = dict.fromkeys(("activation-boundary", "fitnet", "l2", "l1", "l0.5"), 64.0)


class Tiny(nn.Module):
    """Two convolutions, each with a batch norm and a tap, which compile quickly."""

    width: int
    num_classes: int = 10
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        x = images
        for layer in (1, 2):
            x = nn.Conv(self.width * layer, (3, 3), layer, param_dtype=self.param_dtype)(nn.relu(x))
            x = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x)
            sow_tap(self, f"layer{layer}", x)
        pooled = nn.relu(x).mean(axis=(1, 2))
        sow_features(self, pooled)
        return nn.Dense(self.num_classes, param_dtype=self.param_dtype)(pooled)


@pytest.fixture(scope="module")
def pair():
    model = Tiny(12)
    teacher = Network(model, init_variables(model, jax.random.key(5), (8, 8, 1)), "random")
    return teacher, load("digits", "train").take(np.arange(16))


@pytest.mark.parametrize("name", METHODS)
def test_transfer_loss_falls(pair, name):
    teacher, data = pair
    phases = METHODS[name](protocol="paper")
    # Sixteen digits in one batch: an epoch is a step, so the history has the loss of each.
    epochs = (0, STEPS) if len(phases) == 1 else (STEPS, 0)
    record = distill(
        Tiny(6), teacher, data, method=name, epochs=epochs, batch_size=16,
        resources=Resources(devices=1),
        **({"transfer_weight": WEIGHT[name]} if name in WEIGHT else {}),
    ).record  # fmt: skip
    losses = [entry["loss"] for entry in record["history"]]
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3]), losses
