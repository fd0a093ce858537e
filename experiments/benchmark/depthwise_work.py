"""A train step of a MobileNet, its depthwise convolutions as shifted slices or as XLA's own."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from abflax.methods import METHODS
from abflax.methods.objective import bind
from abflax.models import MODELS, layers
from abflax.models.depthwise import depthwise
from abflax.models.variables import init_variables
from abflax.training.step import create_train_state, train_step
from experiments.benchmark.jax_work import SPAN
from experiments.benchmark.timing import Work, compiled_work
from experiments.common.flops import count_flops

BATCH, SHAPE = 8, (112, 112, 3)
NETWORKS = ("mobilenet-v1", "mobilenet-v2")


def train(name: str, by_slices: bool) -> Work:
    """One step of cross-entropy on one device, its depthwise convolutions by slices or by XLA."""
    chosen = depthwise if by_slices else jax.lax.conv_general_dilated
    with mock.patch.object(layers, "depthwise", chosen):
        return _train(name)


def _train(name: str) -> Work:
    model, (phase,) = MODELS[name](), METHODS["cross-entropy"]()
    objective = bind(model, None, phase, SHAPE)
    images = jax.random.normal(jax.random.key(1), (BATCH, *SHAPE))
    labels = jnp.arange(BATCH) % 10

    def begin(key: jax.Array) -> Any:
        student = init_variables(model, key, SHAPE)
        return create_train_state(objective, optimizer(student["params"]), student, {}, key)

    def optimizer(params: Any) -> Any:
        trained = jax.tree.map(lambda _: True, {"student": params, "connectors": {}})
        return phase.optimizer.transformation(SPAN, trained)

    def step(state: Any, images: jax.Array) -> Any:
        transformation = optimizer(state.params["student"])
        return train_step(objective, transformation, state, {}, images, labels)

    draw = np.random.default_rng(0)
    state = jax.tree.map(  # to compile what draws the initial weights takes longer than to measure
        lambda leaf: (0.1 * draw.standard_normal(leaf.shape)).astype(leaf.dtype),
        jax.eval_shape(begin, jax.random.key(0)),
    )
    flops = count_flops(step, state, images)
    return compiled_work(jax.jit(step), state, images, images=BATCH, flops=flops)
