"""Whether networks, weights, data and method can go together; told before anything is written."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax.config import RunConfig
from abflax.data import Dataset, Photographs
from abflax.errors import InputError
from abflax.models import model_name
from abflax.networks import Network, prepared
from abflax.step import abstract_variables
from abflax.taps import Model, number_of_logits, run_model


def require_runs(
    what: str, model: Model, image_shape: tuple[int, ...], *, train: bool, dropout: bool
) -> None:
    """Raises `InputError` where a model cannot run, in evaluation mode and, if asked, in training
    mode, with nothing but its `params` and `batch_stats`.

    Args:
      what: what the message begins with.
      train: whether it runs in training mode too.
      dropout: whether it is given a key for dropout there.
    """
    name, key = model_name(model), jax.random.key(0) if dropout else None
    try:
        abstract_variables(model, image_shape)
        for mode in (False, True)[: 1 + train]:
            _abstract_pass(model, image_shape, mode, key if mode else None)
    except InputError:
        raise
    except flax_errors.InvalidRngError as error:
        hint = "which only a student while training is given, and only those called 'dropout'"
        if train and not dropout:
            hint = (
                "which a teacher whose batch norms use the batch's statistics would need: use a "
                "protocol where they use the running ones, such as paper"
            )
        raise InputError(f"{what}, {name}, asks for random numbers, {hint}") from error
    except (flax_errors.FlaxError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{what}, {name}, cannot run on images of shape {image_shape}: {reason}"
        ) from error


def uses_dropout(model: Model, image_shape: tuple[int, ...]) -> bool:
    """Whether a model asks for random numbers in training mode."""
    try:
        _abstract_pass(prepared(model, "float32", None), image_shape, True, None)
    except flax_errors.InvalidRngError:
        return True
    return False


def _abstract_pass(
    model: Model, image_shape: tuple[int, ...], train: bool, key: jax.Array | None
) -> Any:
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.result_type(float))
    run = lambda v, x: run_model(model, v, x, train=train, dropout_key=key).logits  # noqa: E731
    return jax.eval_shape(run, abstract_variables(model, image_shape), images)


def require_fits(what: str, model: Model, variables: Any, image_shape: tuple[int, ...]) -> None:
    """Raises `InputError` where variables are not those of a model on such images.

    Args:
      what: what the message begins with.
    """
    found = flatten_dict(dict(variables), sep="/")
    wanted = flatten_dict(abstract_variables(model, image_shape), sep="/")
    name = model_name(model)
    for key in sorted({*found, *wanted}):
        if key not in found or key not in wanted:
            problem = "is missing" if key not in found else "is no weight of this architecture"
            raise InputError(f"{what} for {name}: '{key}' {problem}")
        if found[key].shape != wanted[key].shape:
            raise InputError(
                f"{what} for {name}: '{key}' has shape {found[key].shape}, where images of "
                f"{image_shape[-1]} channels need {wanted[key].shape}"
            )
        if not jnp.issubdtype(found[key].dtype, jnp.floating):
            raise InputError(f"{what} for {name}: '{key}' holds {found[key].dtype}, no floats")


def require_part(what: str, model: Model, variables: Any, image_shape: tuple[int, ...]) -> None:
    """Raises `InputError` where variables are not some of a model's, as `require_fits` does."""
    found = flatten_dict(dict(variables))
    wanted = flatten_dict(abstract_variables(model, image_shape))
    rest = {path: leaf for path, leaf in wanted.items() if path not in found}
    require_fits(what, model, unflatten_dict(found | rest), image_shape)


def require_classes(what: str, model: Model, image_shape: tuple[int, ...], classes: int) -> None:
    """Raises `InputError` where a model has not one logit for each class."""
    variables = abstract_variables(model, image_shape)
    logits = number_of_logits(model, variables, image_shape)
    if logits != classes:
        raise InputError(f"{what}, {model_name(model)}, has {logits} logits for {classes} classes")


def require_compatible(
    config: RunConfig,
    student: Model | Network,
    teacher: Network | None,
    data: Dataset | Photographs,
    test: Dataset | Photographs | None,
) -> None:
    """Raises where method, networks and data cannot go together."""
    if isinstance(student, Network):
        given, student = student.variables, student.model
        require_part("the student's weights", student, given, data.image_shape)
    if isinstance(data, Photographs) and config.views is not None:
        raise InputError(
            "photographs show another crop in each epoch, so their views cannot be counted"
        )
    phases = config.phases()
    drifts = any(phase.teacher_batch_statistics for phase in phases)
    require_runs("the student", student, data.image_shape, train=True, dropout=True)
    require_classes("the student", student, data.image_shape, data.num_classes)
    if any(phase.needs_teacher for phase in phases) and teacher is None:
        raise InputError(f"method {config.method} needs a teacher")
    if teacher is not None:
        require_runs("the teacher", teacher.model, data.image_shape, train=drifts, dropout=False)
        require_fits("the teacher's weights", teacher.model, teacher.variables, data.image_shape)
    if test is None:
        return
    if test.image_shape != data.image_shape:
        raise InputError(
            f"the test images have shape {test.image_shape}, the training images {data.image_shape}"
        )
    if test.num_classes > data.num_classes:
        raise InputError(
            f"the test images are of {test.num_classes} classes, the training images of "
            f"{data.num_classes}"
        )
    ours, theirs = data.preprocessing, test.preprocessing
    if (ours.mean, ours.std) != (theirs.mean, theirs.std):
        raise InputError(
            f"the test images are normalised by {theirs.mean} and {theirs.std}, the training "
            f"images by {ours.mean} and {ours.std}"
        )
