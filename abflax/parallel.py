"""The seam to the devices, and the only file that says pmap.

The state is one logical copy on all devices (`in_axes=None`, `out_axes=None`), batches are split
over them, gradients and statistics are averaged. `pmap` is `jit` + `shard_map` since JAX 0.8, so
a move to `shard_map` (with `check_vma=False`) is a change to this file alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from abflax.data import Preprocessing, augment, draw_views, normalise, view
from abflax.diagnosis import look
from abflax.errors import InputError
from abflax.optim import Span
from abflax.phase import Phase
from abflax.step import (
    Objective,
    TrainState,
    begin_phase,
    bind,
    eval_step,
    init_variables,
    make_all_targets,
    make_targets,
    see_teacher,
    train_step,
)
from abflax.taps import Model
from abflax.trained import trained_parameters

AXIS = "devices"
"""The mapped axis over which gradients, statistics and batch norms are averaged."""

_DROPOUT = 1  # which of an example's keys; the augmentation has the one before this fold


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The compiled functions of one phase on some devices; `compile_steps` makes its steps, and
    `compile_evaluation` measures it.

    Attributes:
      objective, optimiser: what a step is made of.
      init: key -> variables of a fresh student.
      begin: (student variables, teacher statistics, key) -> `abflax.step.TrainState`.
      targets: (teacher params, teacher statistics, data, examples, views) -> the targets of
        those views of those examples, booleans packed into bytes; all `[devices, share, ...]`.
        Each process computes its own, on its own devices.
      look: (state, teacher params, data, key, examples, epochs) -> what is not finite in the first
        step (see `abflax.diagnosis.look`); compiled where it is first called.
      schedule: the phase's own step -> learning rate.
    """

    objective: Objective
    optimiser: optax.GradientTransformation
    init: Callable[[jax.Array], Any]
    begin: Callable[..., TrainState]
    targets: jax.stages.Wrapped
    look: Callable[..., dict[str, Any]]
    schedule: Callable[[int], Any]


def usable_devices(count: int | None = None) -> tuple[jax.Device, ...]:
    """The first `count` devices of each process, process by process; None: all.

    Raises:
      ValueError: if there are fewer, or the processes have not the same number.
    """
    each = [jax.local_devices(process_index=index) for index in range(jax.process_count())]
    if len({len(devices) for devices in each}) > 1:
        raise InputError(f"the processes have {[*map(len, each)]} devices: they need as many each")
    if count is not None and not 1 <= count <= len(each[0]):
        raise InputError(f"there are {len(each[0])} devices here, so {count} cannot be used")
    return tuple(device for devices in each for device in devices[:count])


def own(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """Those of the devices that are this process's."""
    return tuple(device for device in devices if device.process_index == jax.process_index())


def default_steps_per_dispatch(devices: Sequence[jax.Device], sent: bool = False) -> int:
    """1 on CPUs, where XLA runs convolution gradients inside loops 40 times slower; else 100, or 8
    where a dispatch's images are sent along with it."""
    return 1 if devices[0].platform == "cpu" else 8 if sent else 100


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """One logical copy on all the devices, as far as they are this process's.

    So it stays an array that this process can read alone, and `pmap` takes it for its part of what
    all processes hold.
    """
    mesh = jax.sharding.Mesh(np.asarray(own(devices)), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def split(batch: np.ndarray, devices: Sequence[jax.Device]) -> np.ndarray:
    """`[steps, batch, ...]` -> `[devices, steps, share, ...]`; a process has its devices' rows.

    Raises:
      ValueError: if the batch does not divide among the devices.
    """
    steps, size, *rest = batch.shape
    if size % len(devices):
        raise InputError(f"a batch of {size} does not divide among {len(devices)} devices")
    here = [device.process_index == jax.process_index() for device in devices]
    shares = batch.reshape(steps, len(devices), size // len(devices), *rest)
    return shares.swapaxes(0, 1)[here]


@functools.lru_cache(maxsize=64)
def compile_phase(
    student: Model,
    teacher: Model | None,
    phase: Phase,
    span: Span,
    preprocessing: Preprocessing,
    image_shape: tuple[int, ...],
    devices: tuple[jax.Device, ...],
    dtype: np.dtype,
    sent: bool = False,
) -> Program:
    """The functions of a phase; the same ones for the same arguments, so seeds share them.

    Args:
      dtype: `jnp.result_type(float)`, which tracing depends on.
      sent: whether the images of a dispatch are sent along with it; else all lie on the devices.

    Raises:
      ValueError: if the phase cannot compare the two networks (see `abflax.step.bind`).
    """
    del dtype
    objective = bind(student, teacher, phase, image_shape, axis_name=AXIS)
    optimiser = phase.optimiser
    trained = trained_parameters(objective, image_shape)
    transformation = optimiser.transformation(span, trained)

    def begin(variables: Any, teacher_stats: Any, key: jax.Array) -> TrainState:
        return begin_phase(objective, transformation, variables, teacher_stats, key, image_shape)

    return Program(
        objective=objective,
        optimiser=transformation,
        init=jax.jit(lambda key: init_variables(student, key, image_shape)),
        begin=jax.jit(begin),
        targets=jax.pmap(
            functools.partial(_targets, objective, preprocessing),
            axis_name=AXIS,
            in_axes=(None, None, None, 0, 0),
            devices=own(devices),
        ),
        look=jax.pmap(
            functools.partial(_look, objective, preprocessing),
            axis_name=AXIS,
            in_axes=(None, None, _axes(sent), None, 0, 0),
            out_axes=None,
            devices=devices,
        ),
        schedule=optimiser.schedule(span),
    )


@functools.lru_cache(maxsize=64)
def compile_steps(
    programs: tuple[Program, ...],
    preprocessing: Preprocessing,
    devices: tuple[jax.Device, ...],
    steps_per_dispatch: int,
    sent: bool = False,
) -> Callable[..., tuple[tuple[TrainState, ...], tuple[dict[str, Any], ...]]]:
    """The steps of one student, or of several that see the same batches and ask one teacher.

    Args:
      programs: of each student, compiled for these devices.
      steps_per_dispatch: how many there is room for.
      sent: see `compile_phase`.

    Returns:
      (states, teacher params, data, key, examples, epochs, count, kept) -> (states, metrics);
      `data`: what an `abflax.feed.Feed` gives; `examples` and `epochs` are `[devices, steps,
      share]`, of which the first `count` steps are made; `kept`: None, or the targets of all views
      for each student; the metrics are `[steps]`. The states are donated.
    """
    return jax.pmap(
        functools.partial(_train_many, programs, preprocessing, steps_per_dispatch),
        axis_name=AXIS,
        in_axes=(None, None, _axes(sent), None, 0, 0, None, None),
        out_axes=None,
        devices=devices,
        donate_argnums=(0,),
    )


@functools.lru_cache(maxsize=64)
def compile_evaluation(
    programs: tuple[Program, ...],
    preprocessing: Preprocessing,
    devices: tuple[jax.Device, ...],
    sent: bool = False,
) -> Callable[..., tuple[dict[str, Any], ...]]:
    """What measures students on held-out data, as `compile_steps` trains them.

    Returns:
      (students, teacher params, data, examples, mask) -> of each student sums, `[batches]` each,
      and "fired": layer -> whether each neuron fired on one of the examples; a student is its
      state's (params, batch_stats), and `examples` and `mask` are `[devices, batches, share]`.
    """
    return jax.pmap(
        functools.partial(_evaluate, programs, preprocessing),
        axis_name=AXIS,
        in_axes=(None, None, _axes(sent), 0, 0),
        out_axes=None,
        devices=devices,
    )


def _axes(sent: bool) -> dict[str, int | None]:
    """Of the data: images that are sent along are split over the devices."""
    return {"images": 0 if sent else None, "labels": None}


def _train_many(
    programs: tuple[Program, ...],
    preprocessing: Preprocessing,
    steps: int,
    states: tuple[TrainState, ...],
    teacher_params: Any,
    data: dict[str, jax.Array],
    key: jax.Array,
    examples: jax.Array,
    epochs: jax.Array,
    count: jax.Array,
    kept: tuple[Any, ...] | None,
) -> tuple[tuple[TrainState, ...], tuple[dict[str, Any], ...]]:
    """Up to `steps` optimisation steps, from indices to new states, without the host."""
    objectives = tuple(program.objective for program in programs)

    def ask(
        stats: Any, images: jax.Array, chosen: jax.Array, epochs: jax.Array
    ) -> tuple[tuple[Any, ...], Any]:
        asked = functools.partial(make_all_targets, objectives, teacher_params, stats)
        if kept is None or (views := preprocessing.views) is None:
            return asked(images)
        rows = chosen * views + draw_views(chosen, epochs, key, views)
        packed = jax.tree.map(lambda leaf: leaf[rows], kept)
        return _unpacked(packed, jax.eval_shape(asked, images)[0]), stats

    def one(index: Any, states: Any) -> Any:
        chosen, now = examples[index], epochs[index]
        images, labels = _batch(data, index, chosen, now, key, preprocessing)
        dropout = _dropout_key(chosen, now, key)
        # Its statistics are the same in all states: it saw the same batches.
        asked, stats = ask(states[0].batch_stats["teacher"], images, chosen, now)
        made = (
            train_step(
                program.objective, program.optimiser, state, teacher_params, images, labels,
                dropout, (targets, stats),
            )
            for program, state, targets in zip(programs, states, asked, strict=True)
        )  # fmt: skip
        return tuple(zip(*made, strict=True))

    if steps == 1:
        states, metrics = one(0, states)
        return states, jax.tree.map(lambda leaf: leaf[None], metrics)

    def body(index: jax.Array, carry: Any) -> Any:
        states, metrics = one(index, carry[0])
        return states, jax.tree.map(lambda all_, new: all_.at[index].set(new), carry[1], metrics)

    shapes = jax.eval_shape(lambda states: one(0, states)[1], states)
    metrics = jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, (states, metrics))


def _targets(
    objective: Objective,
    preprocessing: Preprocessing,
    teacher_params: Any,
    teacher_stats: Any,
    data: dict[str, jax.Array],
    examples: jax.Array,
    views: jax.Array,
) -> Any:
    """What a phase needs of the teacher for some views, booleans packed: `[share, bytes]`."""
    images = view(data["images"][examples], examples, views, preprocessing)
    images = normalise(images, preprocessing)
    targets, _ = make_targets(objective, teacher_params, teacher_stats, images)
    return jax.tree.map(
        lambda leaf: (
            jnp.packbits(leaf.reshape(len(leaf), -1), axis=-1) if leaf.dtype == bool else leaf
        ),
        targets,
    )


def _unpacked(packed: Any, like: Any) -> Any:
    """Targets of the shapes and dtypes of `like`."""

    def one(packed: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.dtype != bool:
            return packed
        bits = jnp.unpackbits(packed, axis=-1, count=math.prod(like.shape[1:]))
        return bits.reshape(like.shape).astype(bool)

    return jax.tree.map(one, packed, like)


def _batch(
    data: dict[str, jax.Array],
    index: Any,
    chosen: jax.Array,
    epochs: jax.Array,
    key: jax.Array,
    preprocessing: Preprocessing,
) -> tuple[jax.Array, jax.Array]:
    """Augmented and normalised images, and labels, of the chosen examples."""
    images = augment(_images(data, index, chosen), chosen, epochs, key, preprocessing)
    return normalise(images, preprocessing), data["labels"][chosen]


def _images(data: dict[str, jax.Array], index: Any, chosen: jax.Array) -> jax.Array:
    """Those of the chosen examples, of `[examples, ...]`; or, where a dispatch's were sent along
    with it, those of its index-th batch, of `[batches, share, ...]`."""
    images = data["images"]
    return images[chosen] if images.ndim == 4 else images[index]


def _dropout_key(chosen: jax.Array, epochs: jax.Array, key: jax.Array) -> jax.Array:
    """Of the batch that begins with this example in this epoch: there is but one."""
    own = jax.random.fold_in(jax.random.fold_in(key, epochs[0]), chosen[0])
    return jax.random.fold_in(own, _DROPOUT)


def _look(
    objective: Objective,
    preprocessing: Preprocessing,
    state: TrainState,
    teacher_params: Any,
    data: dict[str, jax.Array],
    key: jax.Array,
    examples: jax.Array,
    epochs: jax.Array,
) -> dict[str, Any]:
    """`look` at the first of the steps that the arguments would train."""
    images, labels = _batch(data, 0, examples[0], epochs[0], key, preprocessing)
    dropout = _dropout_key(examples[0], epochs[0], key)
    return look(objective, state, teacher_params, images, labels, dropout)


def _evaluate(
    programs: tuple[Program, ...],
    preprocessing: Preprocessing,
    students: tuple[tuple[Any, Any], ...],
    teacher_params: Any,
    data: dict[str, jax.Array],
    examples: jax.Array,
    mask: jax.Array,
) -> tuple[dict[str, Any], ...]:
    """The evaluation step over all batches in one dispatch."""
    objectives = tuple(program.objective for program in programs)
    teacher_stats = students[0][1]["teacher"]  # the same beside all of them

    def step(batch: tuple[Any, jax.Array, jax.Array]) -> tuple[dict[str, Any], ...]:
        index, chosen, valid = batch
        images = normalise(_images(data, index, chosen), preprocessing)
        labels = data["labels"][chosen]
        teacher = see_teacher(objectives, teacher_params, teacher_stats, images)
        return tuple(
            eval_step(objective, params, stats, teacher, images, labels, valid)
            for objective, (params, stats) in zip(objectives, students, strict=True)
        )

    def one(fired: Any, batch: Any) -> tuple[Any, Any]:
        sums = step(batch)
        fired = jax.tree.map(jnp.logical_or, fired, tuple(each.pop("fired") for each in sums))
        return fired, jax.lax.psum(sums, AXIS)

    batches = (jnp.arange(len(mask)), examples, mask)
    shapes = jax.eval_shape(step, jax.tree.map(lambda leaf: leaf[0], batches))
    never = jax.tree.map(
        lambda shape: jnp.zeros(shape.shape, bool), tuple(each["fired"] for each in shapes)
    )
    fired, sums = jax.lax.scan(one, never, batches)
    fired = jax.lax.pmax(jax.tree.map(lambda leaf: leaf.astype(jnp.int32), fired), AXIS)
    fired = jax.tree.map(lambda leaf: leaf > 0, fired)
    return tuple(each | {"fired": its} for each, its in zip(sums, fired, strict=True))
