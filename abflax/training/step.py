"""One optimization step and one evaluation step: pure functions of one device's share of a batch.

`train_step` and `eval_step` are the two to read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from abflax.losses import activation_indicator, cross_entropy
from abflax.losses.dtypes import at_least_float32
from abflax.methods.objective import (
    Objective,
    apply_connectors,
    connected_taps,
    make_targets,
)
from abflax.methods.optimizer import average_in
from abflax.metrics import Metric, activation_agreement, misclassified
from abflax.taps import Forward, run_model


@struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
      step: of the phase, from 0.
      params: {"student": …, "connectors": {term: …}}, and the "teacher" where it is trained along.
      batch_stats: what else changes, of "student" and "teacher" collection by collection, such as
        `batch_stats`; and the running statistics of the "connectors".
      opt_state: optax's.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any

    @property
    def student(self) -> dict[str, Any]:
        """The student's variables: `params`, `batch_stats` and other collections."""
        return {"params": self.params["student"], **self.batch_stats["student"]}

    @property
    def average(self) -> dict[str, Any] | None:
        """The student's variables with the averaged weights; None where none are kept.

        Everything but `params` is that of the last step.
        """
        params = average_in(self.opt_state)
        return None if params is None else self.student | {"params": params}


def create_train_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    student: Any,
    teacher_stats: Any,
    key: jax.Array,
    teacher_params: Any | None = None,
    before: Any | None = None,
) -> TrainState:
    """Creates the state at the start of a phase: the given student, new connectors and optimizer.

    Args:
      objective: of the phase.
      optimizer: of the phase.
      student: variables by collection.
      teacher_stats: the teacher's variables but `params`.
      key: of the connectors' initial weights.
      teacher_params: None: only the shapes of the state matter (see `Objective.start`).
      before: the parameters of the connectors of the phase before; None: there is none.
    """
    teacher = None if teacher_params is None else {"params": teacher_params, **teacher_stats}
    params, stats = objective.start(student, key, teacher, before)
    stats = stats | {"teacher": teacher_stats}
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    teacher_params: Any,
    images: jax.Array,
    labels: jax.Array,
    dropout_key: jax.Array | None = None,
    precomputed_targets: tuple[tuple[Any, ...], Any] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Makes one optimization step on one device's share of a batch.

    Args:
      objective: the phase, bound to student and teacher.
      optimizer: of the phase.
      state: before the step.
      teacher_params: the teacher's weights.
      images: normalized, `[share, height, width, channels]`.
      labels: integers `[share]`.
      dropout_key: for a student with dropout.
      precomputed_targets: the result of `make_targets` for these images; None: it is computed here,
        which is not possible for terms that read a view.

    Returns:
      The new state, and metrics averaged over the devices: "loss", "gradient_norm" and what the
      terms measure.
    """
    if precomputed_targets is None:
        stats = state.batch_stats["teacher"]
        precomputed_targets = make_targets(objective, teacher_params, stats, images)
    targets, teacher_stats = precomputed_targets
    (loss, (stats, measures)), gradients = jax.value_and_grad(
        lambda params: objective.loss(
            params, state.batch_stats, targets, images, labels, key=dropout_key, step=state.step
        ),
        has_aux=True,
    )(state.params)
    stats = {"teacher": teacher_stats} | stats
    if (finite := targets[-1]) is not None:
        loss = jnp.where(jax.lax.optimization_barrier(finite).all(), loss, jnp.nan)
    metrics = {"loss": loss, **measures}
    if objective.axis_name is not None:
        own = stats
        gradients, stats, metrics = jax.lax.pmean((gradients, stats, metrics), objective.axis_name)
        # Whole numbers count something, and stay whole: their mean would be a float.
        stats = jax.tree.map(
            lambda leaf, mean: (
                mean
                if jnp.issubdtype(leaf.dtype, jnp.inexact)
                else jax.lax.pmax(leaf, objective.axis_name)
            ),
            own,
            stats,
        )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    return TrainState(state.step + 1, params, stats, opt_state), metrics


def teacher_forward(
    objectives: Sequence[Objective], teacher_params: Any, teacher_stats: Any, images: jax.Array
) -> Forward | None:
    """Runs the teacher that stays as it is, in evaluation mode.

    None where no objective can be compared with it.
    """
    compared = (each for each in objectives if each.measured and not each.phase.trains_teacher)
    teacher = next((each.teacher for each in compared), None)
    if teacher is None:
        return None
    variables = {"params": teacher_params, **teacher_stats}
    return run_model(teacher, variables, images, train=False)


def eval_step(
    objective: Objective,
    params: Any,
    batch_stats: Any,
    teacher: Forward | None,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    metrics: Sequence[tuple[str, Metric]] = (),
) -> dict[str, Any]:
    """Sums errors and agreement over the unmasked examples of a device's share, in evaluation mode.

    Args:
      objective: says which networks.
      params: of `TrainState`.
      batch_stats: of `TrainState`.
      teacher: the result of `teacher_forward` for these images.
      images: normalized, `[share, height, width, channels]`.
      labels: integers `[share]`.
      mask: booleans `[share]`; False for padding.
      metrics: of the user's, by name.

    Returns:
      "examples", "errors", "cross_entropy"; "metrics": name -> sum; "agreement": layer -> the sum
      of the examples' agreements; "teacher_errors" of one that is trained along; and "fired": layer
      -> booleans, whether each neuron of the student (before any connector, which belongs to a
      phase and not to the student) fires on one of the examples.
    """
    variables = {"params": params["student"], **batch_stats["student"]}
    student = run_model(objective.student, variables, images, train=False)
    logits = at_least_float32(student.logits)
    sums: dict[str, Any] = {
        "examples": mask.sum(),
        "errors": (misclassified(student.logits, labels) & mask).sum(),
        "cross_entropy": jnp.where(mask, cross_entropy(student.logits, labels), 0).sum(),
        "metrics": {
            name: jnp.where(mask, jnp.asarray(metric(logits, labels), float), 0).sum()
            for name, metric in metrics
        },
        "agreement": {},
        "fired": {
            layer: jax.vmap(jnp.logical_and)(activation_indicator(tap), mask).any(axis=0)
            for layer, tap in student.taps.items()
        },
    }
    if teacher is None:
        return sums
    if objective.phase.trains_teacher:
        sums["teacher_errors"] = (misclassified(teacher.logits, labels) & mask).sum()
    connected: dict[str, jax.Array] = {}
    for index, connectors in enumerate(objective.connectors):
        # Where several terms connect a layer, the first term's connector counts.
        if names := connected_taps(connectors):
            mapped, _, _ = apply_connectors(
                connectors, index, student, None, params, batch_stats, False
            )
            connected = {name: mapped.taps[name] for name in names} | connected
    student = dataclasses.replace(student, taps=student.taps | connected)
    for layer in objective.measured:
        ours, theirs = student.taps[layer], teacher.taps[layer]
        share = jax.vmap(activation_agreement)(ours, theirs)
        finite = jax.vmap(lambda *taps: jnp.isfinite(jnp.stack(taps)).all())(ours, theirs)
        share = jnp.where(finite, share, jnp.nan)  # an indicator of NaN is 0
        sums["agreement"][layer] = jnp.where(mask, share, 0).sum()
    return sums
