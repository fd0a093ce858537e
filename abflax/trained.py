"""Which of a student's parameters, and of its connectors', an objective depends on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.interpreters.partial_eval import dce_jaxpr

from abflax.step import Objective, abstract_variables, begin_phase, make_targets, student_loss


def trained_parameters(objective: Objective, image_shape: tuple[int, ...]) -> Any:
    """A tree of booleans, shaped as the parameters of a `TrainState`.

    The others get no gradient, so they get no decay either (the classifier while initialising,
    or all that lies behind the one layer that a term was given).
    """
    teacher: Any = {"params": {}, "batch_stats": {}}
    if objective.teacher is not None:
        teacher = abstract_variables(objective.teacher, image_shape)
    state = jax.eval_shape(
        lambda student, stats, key: begin_phase(
            objective, optax.identity(), student, stats, key, image_shape
        ),
        abstract_variables(objective.student, image_shape),
        teacher["batch_stats"],
        jax.random.key(0),
    )
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.result_type(float))
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(params: Any, teacher_params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.batch_stats)
        targets, _ = make_targets(objective, teacher_params, zeros["teacher"], images)
        key = jax.random.key(0)
        return student_loss(objective, params, zeros, targets, images, labels, key)[0]

    axes = [(objective.axis_name, 1)] if objective.axis_name else None
    arguments = (state.params, teacher["params"], images, labels)
    jaxpr = jax.make_jaxpr(loss, axis_env=axes)(*arguments).jaxpr
    _, used = dce_jaxpr(jaxpr, [True])
    leaves, tree = jax.tree.flatten(state.params)
    return jax.tree.unflatten(tree, used[: len(leaves)])
