"""The loop of the docs on plain optax makes the engine's steps, on one device and on several."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from abflax import Dataset, Network, Resources, distill
from abflax.data import Stream
from abflax.methods import METHODS, bind
from abflax.models.variables import init_variables
from tests.conftest import Tiny
from tests.test_docs import BOUND

SHAPE, STEPS = (8, 8, 1), 3


@pytest.fixture(scope="module")
def given():
    draw = np.random.default_rng(0)
    images = draw.standard_normal((24, *SHAPE)).astype(np.float32)
    teacher = Network(Tiny(12), init_variables(Tiny(12), jax.random.key(5), SHAPE), "random")
    return images, draw.integers(0, 10, 24), teacher


def test_the_loop_of_the_page_makes_the_engines_steps(given):
    """Three steps of eight images: one epoch of the initialise phase."""
    images, labels, teacher = given
    order, _ = Stream(24, 8, seed=0).batches(0, STEPS)
    names = {
        "student": Tiny(6),
        "teacher": teacher,
        "images": images,
        "batches": [(images[batch], labels[batch]) for batch in order],
    }
    exec(BOUND, names)
    run = functools.partial(
        distill, Tiny(6), teacher, Dataset(images, labels, 10), batch_size=8,
        resources=Resources(devices=1), margin=1.0, schedule="constant",
    )  # fmt: skip
    result = run(epochs=(1, 0))
    variables = {"params": names["params"]["student"], **names["state"]["student"]}
    assert result.record["phases"][0]["steps"] == STEPS
    chex.assert_trees_all_close(result.variables, variables, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(
        result.record["history"][0]["loss"], np.mean(_losses(names)), rtol=1e-6
    )


def _losses(names):
    """The loop's losses, step by step, from its beginning."""
    params, state = names["objective"].init(jax.random.key(0))
    opt_state, losses = names["optimizer"].init(params), []
    for batch in names["batches"]:
        params, state, opt_state, loss = names["step"](params, state, opt_state, *batch)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("method", ["activation-boundary", "sp"])
def test_pmap_and_shard_map_give_the_gradients_of_one_device(method, given, x64):
    images, labels, teacher = given
    images = images[:8].astype(np.float64)
    phase, labels = METHODS[method]()[0], labels[:8]
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), teacher.variables)

    def gradients(axis_name):
        models = (Tiny(width, param_dtype=jnp.float64) for width in (6, 12))
        objective = bind(*models, phase, SHAPE, axis_name=axis_name)
        params, state = objective.init(jax.random.key(0))

        def compute(images, labels):
            targets = objective.targets(variables, images)
            found = jax.grad(objective.loss, has_aux=True)(params, state, targets, images, labels)
            found = found[0], found[1][0]
            return found if axis_name is None else jax.lax.pmean(found, axis_name)

        return compute

    alone, axis, devices = jax.jit(gradients(None))(images, labels), "devices", jax.devices()[:2]
    mapped = jax.pmap(gradients(axis), axis_name=axis, out_axes=None, devices=devices)(
        images.reshape(2, 4, *SHAPE), labels.reshape(2, 4)
    )
    chex.assert_trees_all_close(mapped, alone, rtol=1e-9, atol=1e-11)
    if method == "activation-boundary":
        mesh = jax.sharding.Mesh(np.array(devices), (axis,))
        sharded = jax.jit(
            jax.shard_map(
                gradients(axis), mesh=mesh, in_specs=P(axis), out_specs=P(), check_vma=False
            )
        )(images, labels)
        chex.assert_trees_all_close(sharded, alone, rtol=1e-9, atol=1e-11)


def test_a_loop_starts_with_given_variables_and_nothing_is_trained_without_gradient(given):
    _, _, teacher = given
    phase = METHODS["activation-boundary"]()[0]
    objective = bind(teacher, teacher, phase, SHAPE)
    params, state = objective.init(jax.random.key(0), teacher.variables)
    chex.assert_trees_all_equal(params["student"], teacher.variables["params"])
    chex.assert_trees_all_equal(state["student"], {"batch_stats": teacher.variables["batch_stats"]})
    trainable = objective.trainable()["student"]
    assert not any(jax.tree.leaves(trainable["Dense_0"])) and any(jax.tree.leaves(trainable))
