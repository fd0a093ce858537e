"""One optimisation step and one evaluation step, pure functions of one device's share.

Left of `make_targets` nothing is trained; right of it nothing knows where targets came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from abflax.connectors import (
    Connectors,
    ExtraHead,
    common_positions,
    connect,
    pool_positions,
    require_same_positions,
    require_same_taps,
)
from abflax.errors import InputError
from abflax.losses import activation_indicator, cross_entropy
from abflax.metrics import activation_agreement, misclassified
from abflax.phase import Phase
from abflax.taps import Forward, Model, in_mode, module_of, number_of_logits, run_model, tap_shapes
from abflax.terms import LayerTerm


@struct.dataclass
class TrainState:
    """All that training moves.

    Attributes:
      step: of the phase, from 0.
      params: {"student": …, "connectors": {term: …}}.
      batch_stats: running statistics of "student", "connectors" and "teacher".
      opt_state: optax's.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """A phase bound to two networks.

    Attributes:
      student, teacher: Linen modules, with their taps by path where they do not sow them; no
        teacher where no term needs one.
      phase: what is optimised.
      connectors: one for each term, None where a term has none.
      pooled: for each term, the layers whose larger map is pooled, and to which positions.
      measured: the layers whose agreement can be measured (after the connectors, if there are
        any, both networks have the same neurons there).
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
    def asks(self) -> bool:
        """Whether a term needs the teacher, and there is one."""
        return self.teacher is not None and self.phase.needs_teacher


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

    Raises:
      ValueError: if a layer is missing in one of them, or their positions differ.
    """
    ours = tap_shapes(student, abstract_variables(student, image_shape), image_shape)
    theirs = (
        tap_shapes(teacher, abstract_variables(teacher, image_shape), image_shape)
        if teacher is not None
        else {}
    )
    module = module_of(student)
    fields = {k: getattr(module, k) for k in ("dtype", "param_dtype") if hasattr(module, k)}
    connectors: list[Connectors | ExtraHead | None] = []
    pooled: list[tuple[tuple[str, tuple[int, int]], ...]] = []
    for _, term in phase.terms:
        layers = term.chosen(ours)
        if isinstance(term, LayerTerm):
            everything = term.layers is None
            require_same_taps(ours if everything else layers, term.chosen(theirs))
            if not layers:
                raise InputError(
                    f"{type(term).__name__} compares taps, of which neither network has one: name "
                    "some with abflax.Tapped (abflax.taps.suggest tells which there could be)"
                )
        if term.positions == "same":
            require_same_positions(ours, theirs, layers)
        pools = term.positions == "pooled"
        pooled.append(common_positions(ours, theirs, layers) if pools else ())
        if term.connects == "taps":
            connectors.append(connect(theirs, layers, axis_name=axis_name, **fields))
        elif term.connects == "features":
            if teacher is None:
                raise InputError(
                    "an extra head is over the classes of a teacher, which is not given"
                )
            connectors.append(ExtraHead(_classes(teacher, image_shape), **fields))
        else:
            connectors.append(None)
    connected = {name for each in connectors for name in connected_taps(each)}
    measured = tuple(
        name
        for name in ours
        if ours[name] == theirs.get(name)
        or (name in connected and ours[name][:-1] == theirs[name][:-1])
    )
    return Objective(student, teacher, phase, tuple(connectors), tuple(pooled), measured, axis_name)


def abstract_variables(model: Model, image_shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of what `init_variables` makes."""
    return jax.eval_shape(lambda key: init_variables(model, key, image_shape), jax.random.key(0))


def init_variables(model: Model, key: jax.Array, image_shape: tuple[int, ...]) -> Any:
    """{"params", "batch_stats"} of a fresh network, floats in the default floating dtype."""
    dtype = jnp.result_type(float)
    module, mode = in_mode(module_of(model), False)
    variables = module.init(key, jnp.zeros((1, *image_shape), dtype), **mode)
    kept = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    return _floats_in(dtype, kept)


def begin_phase(
    objective: Objective,
    optimiser: optax.GradientTransformation,
    student: Any,
    teacher_stats: Any,
    key: jax.Array,
    image_shape: tuple[int, ...],
) -> TrainState:
    """The state at the start of a phase: the student as it is, fresh connectors and optimiser."""
    dtype = jnp.result_type(float)
    images = jnp.zeros((1, *image_shape), dtype)
    forward = run_model(objective.student, student, images, train=False)
    params: dict[str, Any] = {"student": student["params"], "connectors": {}}
    stats = {"student": student["batch_stats"], "connectors": {}, "teacher": teacher_stats}
    for index, connectors in enumerate(objective.connectors):
        if connectors is not None:
            variables = connectors.init(jax.random.fold_in(key, index), forward, train=False)
            params["connectors"][f"term{index}"] = variables.get("params", {})
            moved = _floats_in(dtype, variables.get("batch_stats", {}))
            stats["connectors"][f"term{index}"] = moved
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimiser.init(params))


def make_targets(
    objective: Objective, teacher_params: Any, teacher_stats: Any, images: jax.Array
) -> tuple[tuple[Any, ...], Any]:
    """What a batch needs of the teacher, term by term, and its running statistics afterwards."""
    (targets,), stats = make_all_targets((objective,), teacher_params, teacher_stats, images)
    return targets, stats


def make_all_targets(
    objectives: Sequence[Objective], teacher_params: Any, teacher_stats: Any, images: jax.Array
) -> tuple[tuple[tuple[Any, ...], ...], Any]:
    """`make_targets` of several objectives that ask one teacher in one mode: one forward pass."""
    teacher = next((each.teacher for each in objectives if each.asks), None)
    if teacher is None:
        return tuple(tuple(None for _ in each.phase.terms) for each in objectives), teacher_stats
    forward = run_model(
        teacher,
        {"params": teacher_params, "batch_stats": teacher_stats},
        images,
        train=any(each.phase.teacher_batch_statistics for each in objectives),
        pullback=any(_needs_pullback(each.phase) for each in objectives),
    )
    found = {each: _targets(each, forward) for each in dict.fromkeys(objectives)}
    targets = tuple(found[each] for each in objectives)
    return jax.lax.stop_gradient((targets, forward.batch_stats))


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

    Args:
      dropout_key: for a student with dropout.

    Returns:
      The loss, and (new running statistics, what the terms measure).
    """
    variables = {"params": params["student"], "batch_stats": batch_stats["student"]}
    pullback = _needs_pullback(objective.phase)
    student = run_model(
        objective.student,
        variables,
        images,
        train=True,
        pullback=pullback,
        dropout_key=dropout_key,
    )
    stats = {"student": student.batch_stats, "connectors": {}}
    total = jnp.zeros((), jnp.result_type(float))
    measures: dict[str, Any] = {}
    for index, (weight, term) in enumerate(objective.phase.terms):
        forward, moved = through_connectors(
            objective.connectors[index],
            index,
            pool_positions(student, objective.pooled[index]),
            params,
            batch_stats,
            train=True,
        )
        stats["connectors"] |= moved
        total += weight * jnp.mean(term.loss(forward, targets[index], labels))
        measures |= term.measures(forward, targets[index])
    return total, (stats, measures)


def train_step(
    objective: Objective,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    teacher_params: Any,
    images: jax.Array,
    labels: jax.Array,
    dropout_key: jax.Array | None = None,
    asked: tuple[tuple[Any, ...], Any] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One optimisation step on one device's share of a batch.

    Args:
      images: normalised, `[share, height, width, channels]`.
      labels: integers `[share]`.
      dropout_key: for a student with dropout.
      asked: what `make_targets` gave for them before; None: the teacher is asked.

    Returns:
      The new state, and metrics averaged over the devices: "loss", "gradient_norm" and what the
      terms measure.
    """
    if asked is None:
        stats = state.batch_stats["teacher"]
        asked = make_targets(objective, teacher_params, stats, images)
    targets, teacher_stats = asked
    (loss, (stats, measures)), gradients = jax.value_and_grad(
        lambda params: student_loss(
            objective, params, state.batch_stats, targets, images, labels, dropout_key
        ),
        has_aux=True,
    )(state.params)
    stats = stats | {"teacher": teacher_stats}
    metrics = {"loss": loss, **measures}
    if objective.axis_name is not None:
        gradients, stats, metrics = jax.lax.pmean((gradients, stats, metrics), objective.axis_name)
    updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    return TrainState(state.step + 1, params, stats, opt_state), metrics


def see_teacher(
    objectives: Sequence[Objective], teacher_params: Any, teacher_stats: Any, images: jax.Array
) -> Forward | None:
    """The teacher in evaluation mode; None where none of the objectives can be compared with it."""
    teacher = next((each.teacher for each in objectives if each.measured), None)
    if teacher is None:
        return None
    variables = {"params": teacher_params, "batch_stats": teacher_stats}
    return run_model(teacher, variables, images, train=False)


def eval_step(
    objective: Objective,
    params: Any,
    batch_stats: Any,
    teacher: Forward | None,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
) -> dict[str, Any]:
    """Sums over the unmasked examples of a device's share, in evaluation mode.

    Args:
      teacher: what `see_teacher` gave for them.

    Returns:
      "examples", "errors", "cross_entropy"; "agreement": layer -> the sum of the examples'
      agreements; and "fired": layer -> booleans, whether each neuron of the student (before any
      connector, which belongs to a phase and not to the student) fires on one of the examples.
    """
    variables = {"params": params["student"], "batch_stats": batch_stats["student"]}
    student = run_model(objective.student, variables, images, train=False)
    sums: dict[str, Any] = {
        "examples": mask.sum(),
        "errors": (misclassified(student.logits, labels) & mask).sum(),
        "cross_entropy": jnp.where(mask, cross_entropy(student.logits, labels), 0).sum(),
        "agreement": {},
        "fired": {
            layer: jax.vmap(jnp.logical_and)(activation_indicator(tap), mask).any(axis=0)
            for layer, tap in student.taps.items()
        },
    }
    if teacher is None:
        return sums
    connected: dict[str, jax.Array] = {}
    for index, connectors in enumerate(objective.connectors):
        if names := connected_taps(
            connectors
        ):  # of several terms' connectors the first term's count
            view, _ = through_connectors(connectors, index, student, params, batch_stats, False)
            connected = {name: view.taps[name] for name in names} | connected
    student = dataclasses.replace(student, taps=student.taps | connected)
    for layer in objective.measured:
        share = jax.vmap(activation_agreement)(student.taps[layer], teacher.taps[layer])
        sums["agreement"][layer] = jnp.where(mask, share, 0).sum()
    return sums


def _classes(model: Model, image_shape: tuple[int, ...]) -> int:
    return number_of_logits(model, abstract_variables(model, image_shape), image_shape)


def connected_taps(connectors: Connectors | ExtraHead | None) -> tuple[str, ...]:
    """The taps that pass through connectors."""
    return tuple(name for name, _ in getattr(connectors, "widths", ()))


def _floats_in(dtype: Any, tree: Any) -> Any:
    """Modules without a field param_dtype, and all statistics, begin in float32 in any run."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)


def _needs_pullback(phase: Phase) -> bool:
    return any(term.needs_pullback for _, term in phase.terms)


def through_connectors(
    connectors: Connectors | ExtraHead | None,
    index: int,
    student: Forward,
    params: Any,
    batch_stats: Any,
    train: bool,
) -> tuple[Forward, dict[str, Any]]:
    """The student as a term sees it, and the running statistics of its connectors."""
    if connectors is None:
        return student, {}
    key = f"term{index}"
    variables = {
        "params": params["connectors"][key],
        "batch_stats": batch_stats["connectors"][key],
    }
    view, state = connectors.apply(variables, student, train=train, mutable=["batch_stats"])
    return view, {key: state.get("batch_stats", batch_stats["connectors"][key])}
