"""Whether a method, networks, data and resources go together; checked before anything is written.

A single network is checked in `abflax.models.checks`, and a phase's terms against both networks'
taps in `abflax.methods.bind`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from abflax.config import RunConfig
from abflax.data import Batches, Dataset, DataSets, ImageFiles, OwnAugmentation, TrainData
from abflax.errors import InputError, brief, require_instances
from abflax.methods import TARGET_DOMAIN, Phase
from abflax.methods.terms import ActivationBoundary
from abflax.metrics import Metric
from abflax.models.checks import (
    require_classes,
    require_part,
    require_runs,
    require_usable,
    uses_dropout,
)
from abflax.models.network import Network
from abflax.models.variables import abstract_variables
from abflax.taps import Model, rectified_taps, side_of
from abflax.training.fingerprint import as_it_is_now
from abflax.training.parallel import InputSpec
from abflax.weights import require_savable


def require_compatible(
    config: RunConfig,
    student: Model | Network,
    teacher: Network | None,
    data_sets: DataSets,
) -> None:
    """Raises where method, networks and data cannot go together."""
    phases, data = config.phases, data_sets.train
    _require_followed(config, phases)
    _require_data(config, phases, data_sets)
    if isinstance(student, Network):
        given, student = student.variables, student.model
        require_part("the student's weights", student, given, data.image_shape)
    if isinstance(data, ImageFiles) and config.views is not None:
        raise InputError(
            "photographs show another crop in each epoch, so their views cannot be counted"
        )
    if isinstance(data, Batches):
        _require_loader(config, data)
    if config.augment is not None:
        config.augment.require_fits(config.batch_size, data.image_shape)
    drifts = any(phase.teacher_batch_statistics or phase.trains_teacher for phase in phases)
    variables = require_runs("the student", student, data.image_shape, train=True, dropout=True)
    require_classes("the student", student, variables, data.image_shape, data.num_classes)
    _require_trainable(variables)
    if any(phase.needs_teacher for phase in phases) and teacher is None:
        raise InputError(f"method {config.method} needs a teacher")
    if teacher is not None:
        require_usable("the teacher", teacher, data.image_shape, train=drifts)
    if any(isinstance(term, ActivationBoundary) for phase in phases for _, term in phase.terms):
        _warn_of_rectified_taps(student, variables, data.image_shape)


def require_teachers(
    config: RunConfig, teachers: Sequence[Network], image_shape: tuple[int, ...]
) -> None:
    """Raises where a term cannot learn from the teacher of its phase."""
    for phase in config.phases:
        for _, term in phase.terms if teachers else ():
            term.require_teacher(teachers[phase.teacher], image_shape)


def _require_trainable(variables: Any) -> None:
    """Raises `InputError` where a student's variables cannot be trained, or not saved."""
    require_savable("the student's", variables)
    for name, leaf in flatten_dict(variables["params"], sep="/").items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"the student's 'params/{name}' holds {leaf.dtype}, no real numbers")


def _require_loader(config: RunConfig, data: Batches) -> None:
    """Raises `InputError` where a setting needs to know a loader's examples."""
    if config.batch_size != data.batch_size:
        raise InputError(
            f"the loader's batches have {data.batch_size} examples, so batch_size cannot be "
            f"{config.batch_size}"
        )
    settings = {"fraction": config.fraction != 1, "per_class": config.per_class is not None}
    for name in (each for each in (*settings, "views") if settings.get(each, config.views)):
        raise InputError(f"a loader gives whole batches in its own order, so {name} is said there")
    if config.target_data is not None:
        raise InputError("a loader does not go with target_data: give both as a Dataset")
    if jax.process_count() > 1:
        raise InputError("a loader is read by one process: here are several")


def _require_followed(config: RunConfig, phases: Sequence[Phase]) -> None:
    """Raises `InputError` where a phase's teacher is not there, or a teacher has no epoch."""
    count = 1 + len(config.anchors or ())
    for phase in phases:
        if phase.teacher not in range(count):
            raise InputError(
                f"phase {phase.name} follows teacher {phase.teacher}; those that are given are 0 "
                f"to {count - 1}"
            )
    followed = {phase.teacher for phase in phases if config.phase_epochs[phase.name]}
    if missing := sorted({*range(count)} - followed if count > 1 else ()):
        raise InputError(
            f"teacher {missing[0]} of {count} (from 0) has no epoch: give more epochs, or name it "
            "in a phase of your own, Phase(…, teacher=…)"
        )


def _require_data(config: RunConfig, phases: Sequence[Phase], data_sets: DataSets) -> None:
    """Raises `InputError` where data sets do not go together, or with the method."""
    data, test, target = data_sets.train, data_sets.test, data_sets.target
    for what, given in (("training", data), ("test", test)):
        if given is not None and not given.num_classes:
            raise InputError(f"the {what} data have no labels: Dataset(images, labels)")
    reads_target = any(TARGET_DOMAIN in phase.views for phase in phases)
    if reads_target != (target is not None):
        needs = "needs target_data" if reads_target else "does not read target_data"
        raise InputError(f"method {config.method} {needs}: unlabelled images of another domain")
    for what, other in (("target", target), ("test", test)):
        if other is not None:
            _require_alike(what, other, data)
    if test is not None and test.num_classes > data.num_classes:
        raise InputError(
            f"the test images are of {test.num_classes} classes, the training images of "
            f"{data.num_classes}"
        )


def _require_alike(what: str, other: Dataset | ImageFiles, data: TrainData) -> None:
    """Raises `InputError` where other data have another shape or normalization."""
    if other.image_shape != data.image_shape:
        raise InputError(
            f"the {what} images have shape {other.image_shape}, the training images "
            f"{data.image_shape}"
        )
    ours, theirs = data.preprocessing, other.preprocessing
    if (ours.mean, ours.std) != (theirs.mean, theirs.std):
        raise InputError(
            f"the {what} images are normalized by {theirs.mean} and {theirs.std}, the training "
            f"images by {ours.mean} and {ours.std}"
        )


def require_metrics(metrics: Any, classes: int) -> dict[str, Metric]:
    """Returns metrics as they are now; see `as_it_is_now`.

    Raises `InputError` where they do not give one number for each example.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise InputError(
            f"metrics are functions by name, such as {{'top5': f}}, not {brief(metrics)}"
        )
    logits = jax.ShapeDtypeStruct((2, classes), jnp.result_type(float))
    labels, fresh = jax.ShapeDtypeStruct((2,), jnp.int32), {}
    for name, metric in metrics.items():
        require_instances({"a metric's name": (name, str)})
        try:
            fresh[name] = as_it_is_now(metric, logits, labels)
            found = jax.eval_shape(fresh[name], logits, labels)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), repr(error))[:200]
            raise InputError(f"metric {name} fails on logits {logits.shape}: {reason}") from error
        if getattr(found, "shape", None) != (2,):
            raise InputError(
                f"metric {name} must give one number for each example, [batch], of logits "
                f"[batch, classes] and labels [batch], not {getattr(found, 'shape', brief(found))}"
            )
    return fresh


def require_groupable(configs: Sequence[RunConfig]) -> None:
    """Raises `InputError` for runs that are the same, or cannot be trained in one program."""
    first, *others = configs
    for other in others:
        for name, value in first.group_key.items():
            if other.group_key[name] != value:
                raise InputError(
                    "runs of a group see the same batches of the same teacher, but of two of them "
                    f"{name}: {value}, and {other.group_key[name]}"
                )
    hashes = [config.hash for config in configs]
    for config in configs:
        if hashes.count(config.hash) > 1:
            seed = config.seeds.weights
            raise InputError(f"{config.method}, seed {seed}, is in the group twice")


def require_cacheable(
    phases: Sequence[Phase], streamed: bool, augment: OwnAugmentation | None = None
) -> None:
    """Raises `InputError` where targets depend on more than teacher, image and view."""
    if streamed:
        raise InputError(
            "photographs and a loader's batches differ in each epoch, so targets cannot be cached"
        )
    if augment is not None:
        raise InputError(
            "augment draws other images in every step, and the teacher's targets are those of what "
            "the student sees, so they cannot be cached"
        )
    for phase in phases:
        if phase.teacher_batch_statistics:
            raise InputError(
                f"in phase {phase.name} of this protocol the teacher's batch norms use the batch's "
                "statistics, so its targets depend on the batch and cannot be cached"
            )
        if phase.views:
            raise InputError(
                f"phase {phase.name} reads other images at every step (the view {phase.views[0]}), "
                "so its targets cannot be cached"
            )


def require_synchronized(student: Model, teacher: Model | None, spec: InputSpec) -> None:
    """Raises `InputError` where several devices would give other numbers than one."""
    if len(spec.devices) == 1:
        return
    many, shape = f"{len(spec.devices)} devices: use one device", spec.image_shape
    for model in (student, teacher):
        if model is None:
            continue
        side = side_of(model)
        has_batch_norms = bool(abstract_variables(model, shape)["batch_stats"])
        if has_batch_norms and not side.synchronizes:
            raise InputError(
                f"{side.name} has no field axis_name, so its batch norms cannot "
                f"be averaged over {many}"
            )
        if model is student and uses_dropout(model, shape):
            raise InputError(f"{side.name} has dropout, which would drop other neurons on {many}")


def _warn_of_rectified_taps(student: Model, variables: Any, image_shape: tuple[int, ...]) -> None:
    """Warns where the hinge cannot push a student's neurons below zero, because of a ReLU."""
    if names := rectified_taps(student, variables, (2, *image_shape)):
        warnings.warn(
            f"the student's taps {', '.join(names)} are never negative: activation boundaries need "
            "what comes before the ReLU",
            stacklevel=2,
        )
