"""The compiled programs of a phase: the seam to the devices, and the only file that says pmap.

`PhaseProgram` is what to know; the rest may be skipped. The state is one logical copy on all
devices (`in_axes=None`, `out_axes=None`), batches are split over them, gradients and statistics are
averaged. `pmap` is `jit` + `shard_map` since JAX 0.8, so a move to `shard_map` (with
`check_vma=False`) is a change to this file alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from abflax.data import Augment, Preprocessing, augment, draw_views, normalize, view
from abflax.methods import Objective, Phase, PhaseSchedule, bind
from abflax.methods.objective import make_all_targets, make_targets
from abflax.metrics import Metric
from abflax.models.variables import init_variables
from abflax.taps import Model, run_model
from abflax.training.devices import AXIS, local_devices
from abflax.training.diagnosis import find_nonfinite
from abflax.training.step import (
    TrainState,
    create_train_state,
    eval_step,
    teacher_forward,
    train_step,
)

_DROPOUT = 1  # folded into an example's key; the augmentation has the key before this fold
_VIEW = 2  # likewise, for views
_AUGMENT = 3  # likewise, for an augmentation of the user's
_TARGET = 2**32 - 1  # folded into the augmentation's key, for target data; no epoch is as late


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """How images reach the networks: all that a compiled program depends on besides them.

    Attributes:
      preprocessing: normalization and augmentation.
      image_shape: (height, width, channels).
      devices: those that share each batch.
      streamed: whether each dispatch brings its own images and labels; else the data set is on the
        devices.
      steps_per_dispatch: the most steps that one dispatch makes.
      target: likewise of the unlabelled images of another domain; None: there are none.
      dtype: the default floating dtype when the program is traced.
      augment: of the user's, of training images; None: there is none.
      metrics: of the user's, by name: what an evaluation measures besides.
      code: what networks, terms, optimizers and views from outside abflax compute now: these may
        read what the user has changed since a program was compiled.
    """

    preprocessing: Preprocessing
    image_shape: tuple[int, ...]
    devices: tuple[jax.Device, ...]
    streamed: bool = False
    steps_per_dispatch: int = 1
    target: Preprocessing | None = None
    dtype: Any = dataclasses.field(default_factory=lambda: jnp.result_type(float))
    augment: Augment | None = None
    metrics: tuple[tuple[str, Metric], ...] = ()
    code: str = ""


@struct.dataclass
class StepInputs:
    """The inputs of one dispatch.

    Attributes:
      images: `[examples, height·width·channels]`, the whole data set; or, where images are
        streamed, those of the dispatch, `[devices, steps, share, height, width, channels]`.
      labels: integers `[examples]`; or, where images are streamed, `[devices, steps, share]`.
      examples: which examples each step sees, `[devices, steps, share]`.
      epochs: the epoch of each of them, likewise; None in evaluation.
      mask: False for padding, likewise; None in training.
      target: likewise of the other domain, whose data set is on the devices; None: there is none.
    """

    images: Any
    labels: Any
    examples: Any
    epochs: Any = None
    mask: Any = None
    target: Any = None


def _axes(spec: InputSpec) -> StepInputs:
    """The axis of each input that is split over the devices."""
    data = 0 if spec.streamed else None
    target = None if spec.target is None else StepInputs(None, None, 0, 0, 0)
    return StepInputs(images=data, labels=data, examples=0, epochs=0, mask=0, target=target)


@dataclasses.dataclass(frozen=True, eq=False)
class PhaseProgram:
    """The compiled functions of one phase on some devices.

    Attributes:
      objective: gives a step its loss.
      optimizer: gives a step its updates.
      init: key -> variables of a new student.
      begin: (student variables, teacher statistics, key, teacher params, the connectors' params of
        the phase before) -> the phase's first `TrainState`. Without the last two, its shapes,
        unless the teacher is trained along.
      targets: (teacher params, teacher statistics, images, examples, views) -> the targets of
        those views of those examples, booleans packed into bytes; all `[devices, share, ...]`.
        Each process computes its own share, on its own devices.
      find_nonfinite: (state, teacher params, inputs, key) -> which arrays of the first step are
        not finite (see `abflax.training.diagnosis`); compiled when it is first called.
      schedule: the phase's own step -> learning rate.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    init: Callable[[jax.Array], Any]
    begin: Callable[..., TrainState]
    targets: jax.stages.Wrapped
    find_nonfinite: Callable[..., dict[str, Any]]
    schedule: Callable[[int], Any]


@functools.lru_cache(maxsize=64)
def compile_phase(
    student: Model, teacher: Model | None, phase: Phase, schedule: PhaseSchedule, spec: InputSpec
) -> PhaseProgram:
    """The program of a phase. The same arguments give the same program, so seeds share it.

    Raises:
      ValueError: if the phase cannot compare the two networks (see `abflax.methods.bind`).
    """
    shape = spec.image_shape
    objective = bind(
        student,
        teacher,
        phase,
        shape,
        axis_name=AXIS,
        steps_per_epoch=schedule.steps_per_epoch,
        epochs=schedule.epochs,
    )
    optimizer = phase.transformation(schedule, objective.trainable())

    def begin(variables: Any, teacher_stats: Any, key: jax.Array, *start: Any) -> TrainState:
        return create_train_state(objective, optimizer, variables, teacher_stats, key, *start)

    return PhaseProgram(
        objective=objective,
        optimizer=optimizer,
        init=jax.jit(lambda key: init_variables(student, key, shape)),
        begin=jax.jit(begin),
        targets=jax.pmap(
            functools.partial(_targets, objective, spec.preprocessing),
            axis_name=AXIS,
            in_axes=(None, None, None, 0, 0),
            devices=local_devices(spec.devices),
        ),
        find_nonfinite=jax.pmap(
            functools.partial(_find_nonfinite, objective, spec),
            axis_name=AXIS,
            in_axes=(None, None, _axes(spec), None),
            out_axes=None,
            devices=spec.devices,
        ),
        schedule=phase.optimizer.schedule(schedule),
    )


@functools.lru_cache(maxsize=64)
def compile_steps(
    programs: tuple[PhaseProgram, ...], spec: InputSpec
) -> Callable[..., tuple[tuple[TrainState, ...], tuple[dict[str, Any], ...]]]:
    """The training steps of one student, or of several with the same batches and teacher.

    Returns:
      (states, teacher params, inputs, key, count, cached targets) -> (states, metrics). The first
      `count` steps of the inputs are made; the cached targets are None, or those of all views for
      each student; the metrics are `[steps]`. The states are donated.
    """
    return jax.pmap(
        functools.partial(_train_steps, programs, spec),
        axis_name=AXIS,
        in_axes=(None, None, _axes(spec), None, None, None),
        out_axes=None,
        devices=spec.devices,
        donate_argnums=(0,),
    )


@functools.lru_cache(maxsize=64)
def compile_evaluation(
    programs: tuple[PhaseProgram, ...], spec: InputSpec
) -> Callable[..., tuple[dict[str, Any], ...]]:
    """The evaluation of one student, or of several with the same teacher.

    Returns:
      (students, teacher params, inputs) -> for each student sums, `[batches]` each, and "fired":
      layer -> whether each neuron fired on one of the examples. A student is its state's
      (params, batch_stats).
    """
    return jax.pmap(
        functools.partial(_evaluate, programs, spec),
        axis_name=AXIS,
        in_axes=(None, None, _axes(spec)),
        out_axes=None,
        devices=spec.devices,
    )


def _train_steps(
    programs: tuple[PhaseProgram, ...],
    spec: InputSpec,
    states: tuple[TrainState, ...],
    teacher_params: Any,
    inputs: StepInputs,
    key: jax.Array,
    count: jax.Array,
    cached: tuple[Any, ...] | None,
) -> tuple[tuple[TrainState, ...], tuple[dict[str, Any], ...]]:
    """Up to `steps_per_dispatch` optimization steps, from indices to new states, on the devices."""
    all_examples, all_epochs = inputs.examples, inputs.epochs

    def step(index: Any, states: tuple[TrainState, ...]) -> Any:
        examples, epochs = all_examples[index], all_epochs[index]
        images, labels = _training_batch(inputs, index, key, spec)
        dropout_key = _batch_key(examples, epochs, key, _DROPOUT)
        # The teacher's statistics are the same in all states: it saw the same batches.
        targets, stats = _targets_of_all(
            programs, teacher_params, states[0].batch_stats["teacher"], images, labels,
            _view_keys(examples, epochs, key), _target_batch(inputs, index, key, spec),
            _cached_rows(cached, examples, epochs, key, spec.preprocessing),
        )  # fmt: skip
        trained = (
            train_step(
                program.objective, program.optimizer, state, teacher_params, images, labels,
                dropout_key, (of_student, stats),
            )
            for program, state, of_student in zip(programs, states, targets, strict=True)
        )  # fmt: skip
        return tuple(zip(*trained, strict=True))

    if spec.steps_per_dispatch == 1:
        states, metrics = step(0, states)
        return states, jax.tree.map(lambda leaf: leaf[None], metrics)

    def body(index: jax.Array, carry: Any) -> Any:
        states, metrics = step(index, carry[0])
        return states, jax.tree.map(lambda all_, new: all_.at[index].set(new), carry[1], metrics)

    shapes = jax.eval_shape(lambda states: step(0, states)[1], states)
    metrics = jax.tree.map(
        lambda leaf: jnp.zeros((spec.steps_per_dispatch, *leaf.shape), leaf.dtype), shapes
    )
    return jax.lax.fori_loop(0, count, body, (states, metrics))


def _targets_of_all(
    programs: tuple[PhaseProgram, ...],
    teacher_params: Any,
    teacher_stats: Any,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array | None,
    target_images: jax.Array | None,
    packed: Any | None,
) -> tuple[tuple[Any, ...], Any]:
    """The targets for each student, from the cache or from one pass of the teacher."""
    objectives = tuple(program.objective for program in programs)
    compute = functools.partial(make_all_targets, objectives, teacher_params, teacher_stats)
    if packed is None:
        return compute(images, labels, keys, target_images)
    return _unpack(packed, jax.eval_shape(compute, images)[0]), teacher_stats


def _cached_rows(
    cached: tuple[Any, ...] | None,
    examples: jax.Array,
    epochs: jax.Array,
    key: jax.Array,
    preprocessing: Preprocessing,
) -> Any | None:
    """The cached targets of the views that a step shows; None without a cache."""
    if cached is None:
        return None
    drawn = draw_views(examples, epochs, key, preprocessing)
    rows = examples * preprocessing.shown_views + drawn
    return jax.tree.map(lambda leaf: leaf[rows], cached)


def _targets(
    objective: Objective,
    preprocessing: Preprocessing,
    teacher_params: Any,
    teacher_stats: Any,
    all_images: jax.Array,
    examples: jax.Array,
    views: jax.Array,
) -> Any:
    """A phase's targets for some views, booleans packed: `[share, bytes]`."""
    images = _rows(all_images, examples, objective.image_shape)
    images = view(images, examples, views, preprocessing)
    images = normalize(images, preprocessing)
    targets, _ = make_targets(objective, teacher_params, teacher_stats, images)
    return jax.tree.map(
        lambda leaf: (
            jnp.packbits(leaf.reshape(len(leaf), -1), axis=-1) if leaf.dtype == bool else leaf
        ),
        targets,
    )


def _unpack(packed: Any, like: Any) -> Any:
    """Targets of the shapes and dtypes of `like`."""

    def unpack(packed: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if like.dtype != bool:
            return packed
        bits = jnp.unpackbits(packed, axis=-1, count=math.prod(like.shape[1:]))
        return bits.reshape(like.shape).astype(bool)

    return jax.tree.map(unpack, packed, like)


def _training_batch(
    inputs: StepInputs, index: Any, key: jax.Array, spec: InputSpec
) -> tuple[jax.Array, jax.Array]:
    """Augmented and normalized images, and labels, of the step with that index."""
    examples, epochs = inputs.examples[index], inputs.epochs[index]
    images = augment(_images(inputs, index, spec), examples, epochs, key, spec.preprocessing)
    if spec.augment is not None:
        images = _augment_whole(spec.augment, images, examples, epochs, key)
    return normalize(images, spec.preprocessing), _labels(inputs, index)


def _augment_whole(
    own: Augment, images: jax.Array, examples: jax.Array, epochs: jax.Array, key: jax.Array
) -> jax.Array:
    """Augments the whole batch on every device, so that their number changes nothing.

    Returns this device's share.
    """
    share = len(images)
    images, examples, epochs = jax.lax.all_gather((images, examples, epochs), AXIS, tiled=True)
    batch_key = _batch_key(examples, epochs, key, _AUGMENT)
    augmented = own(batch_key, images.astype(jnp.result_type(float)))
    return jax.lax.dynamic_slice_in_dim(augmented, jax.lax.axis_index(AXIS) * share, share)


def _target_batch(
    inputs: StepInputs, index: Any, key: jax.Array, spec: InputSpec
) -> jax.Array | None:
    """The images of the other domain, likewise; None: there is none."""
    if spec.target is None:
        return None
    own = dataclasses.replace(spec, preprocessing=spec.target)
    return _training_batch(inputs.target, index, jax.random.fold_in(key, _TARGET), own)[0]


def _images(inputs: StepInputs, index: Any, spec: InputSpec) -> jax.Array:
    """The stored images of the step with that index."""
    if inputs.images.ndim == 2:
        return _rows(inputs.images, inputs.examples[index], spec.image_shape)
    return inputs.images[index]


def _rows(images: jax.Array, examples: jax.Array, image_shape: tuple[int, ...]) -> jax.Array:
    """Selects images of the data set, of which each is a row on the devices."""
    return images[examples].reshape(*examples.shape, *image_shape)


def _labels(inputs: StepInputs, index: Any) -> jax.Array:
    """The labels of the step with that index."""
    resident = inputs.labels.ndim == 1
    return inputs.labels[inputs.examples[index] if resident else index]


def _batch_key(examples: jax.Array, epochs: jax.Array, key: jax.Array, use: int) -> jax.Array:
    """The key of a batch, from its first example in its epoch, which no other batch begins with."""
    return _example_key(examples[0], epochs[0], key, use)


def _view_keys(examples: jax.Array, epochs: jax.Array, key: jax.Array) -> jax.Array:
    """A key for each example in its epoch, whichever device has it."""
    return jax.vmap(_example_key, in_axes=(0, 0, None, None))(examples, epochs, key, _VIEW)


def _example_key(example: jax.Array, epoch: jax.Array, key: jax.Array, use: int) -> jax.Array:
    """The key of an example in its epoch, for one of the uses above."""
    own = jax.random.fold_in(jax.random.fold_in(key, epoch), example)
    return jax.random.fold_in(own, use)


def _find_nonfinite(
    objective: Objective,
    spec: InputSpec,
    state: TrainState,
    teacher_params: Any,
    inputs: StepInputs,
    key: jax.Array,
) -> dict[str, Any]:
    """`find_nonfinite` for the first of the inputs' steps."""
    images, labels = _training_batch(inputs, 0, key, spec)
    dropout_key = _batch_key(inputs.examples[0], inputs.epochs[0], key, _DROPOUT)
    view_keys = _view_keys(inputs.examples[0], inputs.epochs[0], key)
    targets, _ = make_targets(
        objective,
        teacher_params,
        state.batch_stats["teacher"],
        images,
        labels,
        view_keys,
        _target_batch(inputs, 0, key, spec),
    )
    return find_nonfinite(objective, state, teacher_params, images, labels, targets, dropout_key)


def _evaluate(
    programs: tuple[PhaseProgram, ...],
    spec: InputSpec,
    students: tuple[tuple[Any, Any], ...],
    teacher_params: Any,
    inputs: StepInputs,
) -> tuple[dict[str, Any], ...]:
    """The evaluation step over all batches in one dispatch."""
    objectives = tuple(program.objective for program in programs)
    teacher_stats = students[0][1]["teacher"]  # the same beside all of them

    def step(index: jax.Array, mask: jax.Array) -> tuple[dict[str, Any], ...]:
        images = normalize(_images(inputs, index, spec), spec.preprocessing)
        labels = _labels(inputs, index)
        teacher = teacher_forward(objectives, teacher_params, teacher_stats, images)

        def moved(objective: Objective, params: Any, stats: Any) -> Any:
            if objective.teacher is None or not objective.phase.trains_teacher:
                return teacher
            variables = {"params": params["teacher"], **stats["teacher"]}
            return run_model(objective.teacher, variables, images, train=False)

        return tuple(
            eval_step(
                objective,
                params,
                stats,
                moved(objective, params, stats),
                images,
                labels,
                mask,
                spec.metrics,
            )
            for objective, (params, stats) in zip(objectives, students, strict=True)
        )

    def body(fired: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        sums = step(*batch)
        fired = jax.tree.map(jnp.logical_or, fired, tuple(each.pop("fired") for each in sums))
        return fired, jax.lax.psum(sums, AXIS)

    batches = (jnp.arange(len(inputs.mask)), inputs.mask)
    shapes = jax.eval_shape(lambda index, mask: step(index[0], mask[0]), *batches)
    never = jax.tree.map(
        lambda shape: jnp.zeros(shape.shape, bool), tuple(each["fired"] for each in shapes)
    )
    fired, sums = jax.lax.scan(body, never, batches)
    fired = jax.lax.pmax(jax.tree.map(lambda leaf: leaf.astype(jnp.int32), fired), AXIS)
    fired = jax.tree.map(lambda leaf: leaf > 0, fired)
    return tuple(each | {"fired": neurons} for each, neurons in zip(sums, fired, strict=True))
