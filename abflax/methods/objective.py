"""A phase bound to two networks: targets of the teacher, loss of the student.

Targets depend only on the teacher and can be cached; the loss depends only on targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from abflax.errors import InputError
from abflax.methods.connectors import (
    Connectors,
    ExtraHead,
    common_positions,
    connect,
    pool_positions,
    require_same_positions,
    require_same_taps,
)
from abflax.methods.phase import Phase
from abflax.methods.terms import LayerTerm, Term
from abflax.models.variables import abstract_variables
from abflax.taps import Forward, Model, number_of_logits, run_model, side_of, tap_shapes


@dataclasses.dataclass(frozen=True)
class Objective:
    """A phase bound to two networks.

    Attributes:
      student: a model, with its tap paths where it does not sow its taps.
      teacher: likewise; None where no term needs one.
      phase: the weighted terms and their optimizer.
      connectors: one for each term; None for a term without.
      pooled: for each term, the layers whose larger map is pooled, and the sides it is pooled to.
      measured: the layers whose agreement can be measured: both networks have the same neurons
        there (after the connectors, if there are any).
      axis_name: the mapped axis over which gradients and metrics are averaged.
    """

    student: Model
    teacher: Model | None
    phase: Phase
    connectors: tuple[Connectors | ExtraHead | None, ...]
    pooled: tuple[tuple[tuple[str, tuple[int, int]], ...], ...]
    measured: tuple[str, ...]
    axis_name: str | None = None

    @property
    def runs_teacher(self) -> bool:
        """Whether a training step needs the teacher's forward pass."""
        return self.teacher is not None and self.phase.needs_teacher

    @property
    def needs_pullback(self) -> bool:
        """Whether a term needs gradients with respect to the images."""
        return any(term.needs_pullback for _, term in self.phase.terms)


def bind(
    student: Model,
    teacher: Model | None,
    phase: Phase,
    image_shape: tuple[int, ...],
    *,
    axis_name: str | None = None,
) -> Objective:
    """Binds a phase to two networks, and checks that its terms can compare them.

    Connectors compute in the student's dtypes.

    Args:
      student: the model, in the precision that it trains in.
      teacher: likewise; None if no term needs one.
      phase: its terms with their weights.
      image_shape: (height, width, channels).
      axis_name: the mapped axis over which gradients and metrics are averaged; None: there is none.

    Raises:
      ValueError: if a layer is missing in one of them, or their positions differ.
    """
    student_taps = tap_shapes(student, abstract_variables(student, image_shape), image_shape)
    teacher_taps: dict[str, Any] = {}
    if teacher is not None:
        teacher_taps = tap_shapes(teacher, abstract_variables(teacher, image_shape), image_shape)
    dtypes = side_of(student).dtypes
    connectors: list[Connectors | ExtraHead | None] = []
    pooled: list[tuple[tuple[str, tuple[int, int]], ...]] = []
    for _, term in phase.terms:
        layers = term.chosen(student_taps)
        _require_comparable(term, layers, student_taps, teacher_taps)
        pools = term.positions == "pooled"
        pooled.append(common_positions(student_taps, teacher_taps, layers) if pools else ())
        if term.connects == "taps":
            connectors.append(connect(teacher_taps, layers, axis_name=axis_name, **dtypes))
        elif term.connects == "features":
            if teacher is None:
                raise InputError(
                    "an extra head is over the classes of a teacher, which is not given"
                )
            variables = abstract_variables(teacher, image_shape)
            classes = number_of_logits(teacher, variables, image_shape)
            connectors.append(ExtraHead(classes, **dtypes))
        else:
            connectors.append(None)
    connected = {name for each in connectors for name in connected_taps(each)}
    measured = tuple(
        name
        for name, shape in student_taps.items()
        if shape == teacher_taps.get(name)
        or (name in connected and shape[:-1] == teacher_taps[name][:-1])
    )
    return Objective(student, teacher, phase, tuple(connectors), tuple(pooled), measured, axis_name)


def _require_comparable(
    term: Term,
    layers: tuple[str, ...],
    student_taps: Mapping[str, tuple[int, ...]],
    teacher_taps: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises `InputError` where the networks do not have the taps that a term compares."""
    if isinstance(term, LayerTerm):
        every_layer = term.layers is None
        require_same_taps(student_taps if every_layer else layers, term.chosen(teacher_taps))
        if not layers:
            raise InputError(
                f"{type(term).__name__} compares taps, of which neither network has one: name "
                "some with abflax.Tapped (abflax.taps.suggest tells which there could be)"
            )
    if term.positions == "same":
        require_same_positions(student_taps, teacher_taps, layers)


def make_targets(
    objective: Objective, teacher_params: Any, teacher_stats: Any, images: jax.Array
) -> tuple[tuple[Any, ...], Any]:
    """Computes what a batch needs of the teacher.

    Returns:
      The targets, term by term, and the teacher's state after the pass.
    """
    (targets,), stats = make_all_targets((objective,), teacher_params, teacher_stats, images)
    return targets, stats


def make_all_targets(
    objectives: Sequence[Objective], teacher_params: Any, teacher_stats: Any, images: jax.Array
) -> tuple[tuple[tuple[Any, ...], ...], Any]:
    """`make_targets` for several objectives with one teacher in one mode: one forward pass."""
    teacher = next((each.teacher for each in objectives if each.runs_teacher), None)
    if teacher is None:
        return tuple(tuple(None for _ in each.phase.terms) for each in objectives), teacher_stats
    forward = run_model(
        teacher,
        {"params": teacher_params, **teacher_stats},
        images,
        train=any(each.phase.teacher_batch_statistics for each in objectives),
        pullback=any(each.needs_pullback for each in objectives),
    )
    computed = {each: _targets(each, forward) for each in dict.fromkeys(objectives)}
    targets = tuple(computed[each] for each in objectives)
    return jax.lax.stop_gradient((targets, forward.state))


def _targets(objective: Objective, teacher: Forward) -> tuple[Any, ...]:
    return tuple(
        term.targets(pool_positions(teacher, pooled)) if term.needs_teacher else None
        for (_, term), pooled in zip(objective.phase.terms, objective.pooled, strict=True)
    )


def student_loss(
    objective: Objective,
    params: Any,
    batch_stats: Any,
    targets: tuple[Any, ...],
    images: jax.Array,
    labels: jax.Array,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Any, dict[str, Any]]]:
    """The phase's objective on one device's share: Σ weight · mean over the batch.

    Losses that the student's modules sow into the collection `losses` are added.

    Args:
      objective: the phase, bound to student and teacher.
      params: of `abflax.training.step.TrainState`.
      batch_stats: likewise.
      targets: what `make_targets` computed for these images.
      images: normalized, `[share, height, width, channels]`.
      labels: integers `[share]`.
      dropout_key: for a student with dropout.

    Returns:
      The loss, and (new running statistics, what the terms measure).
    """
    student = run_model(
        objective.student,
        {"params": params["student"], **batch_stats["student"]},
        images,
        train=True,
        pullback=objective.needs_pullback,
        dropout_key=dropout_key,
    )
    stats = {"student": student.state, "connectors": {}}
    total = jnp.zeros((), jnp.result_type(float))
    measures: dict[str, Any] = {}
    for index, (weight, term) in enumerate(objective.phase.terms):
        pooled = pool_positions(student, objective.pooled[index])
        forward, running = apply_connectors(
            objective.connectors[index], index, pooled, params, batch_stats, train=True
        )
        stats["connectors"] |= running
        total += weight * jnp.mean(term.loss(forward, targets[index], labels))
        measures |= term.measures(forward, targets[index])
    if student.losses is not None:
        total += student.losses
        measures["sown_losses"] = student.losses
    return total, (stats, measures)


def apply_connectors(
    connectors: Connectors | ExtraHead | None,
    index: int,
    student: Forward,
    params: Any,
    batch_stats: Any,
    train: bool,
) -> tuple[Forward, dict[str, Any]]:
    """Maps a student's forward pass through the connectors of the term with that index.

    Returns:
      The pass as the term compares it, and the connectors' new running statistics by term.
    """
    if connectors is None:
        return student, {}
    key = f"term{index}"
    variables = {
        "params": params["connectors"][key],
        "batch_stats": batch_stats["connectors"][key],
    }
    mapped, state = connectors.apply(variables, student, train=train, mutable=["batch_stats"])
    return mapped, {key: state.get("batch_stats", batch_stats["connectors"][key])}


def connected_taps(connectors: Connectors | ExtraHead | None) -> tuple[str, ...]:
    """The taps that pass through connectors."""
    return tuple(name for name, _ in getattr(connectors, "widths", ()))
