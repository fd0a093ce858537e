"""Checks that a model runs, and that variables fit it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax.errors import InputError
from abflax.models import model_name, without_fields
from abflax.models.network import Network, configure_model
from abflax.models.variables import abstract_variables
from abflax.taps import (
    SWITCHES,
    Model,
    abstract_forward,
    moved_statistics,
    number_of_logits,
)


def require_usable(
    what: str,
    network: Network,
    image_shape: tuple[int, ...],
    *,
    classes: int | None = None,
    train: bool = False,
) -> None:
    """Raises `InputError` unless a network runs on images and its variables fit its model.

    With `classes` it must have one logit for each; with `train` it must also run in training mode.
    """
    model = network.model
    shapes = require_runs(what, model, image_shape, train=train, dropout=False)
    if classes is not None:
        require_classes(what, model, shapes, image_shape, classes)
    _require_shapes(f"{what}'s weights", model, network.variables, shapes, image_shape)


def require_runs(
    what: str, model: Model, image_shape: tuple[int, ...], *, train: bool, dropout: bool
) -> Any:
    """Raises `InputError` if a model needs more than its variables and images to run.

    The message begins with `what`. In evaluation mode it must not move its statistics. With `train`
    it must also run in training mode, and move them; there it gets a key for dropout if `dropout`
    is true.

    Returns:
      The shapes of its variables, see `abstract_variables`.
    """
    name, key = without_fields(model_name(model)), jax.random.key(0) if dropout else None
    shape = (2, *image_shape)
    try:
        variables = abstract_variables(model, image_shape)
        moves = moved_statistics(model, variables, shape, train=False)
        if moves:
            raise InputError(
                f"{what}, {name}, moves its statistics '{moves[0]}' in evaluation mode, so its "
                "results depend on the batches before"
            )
        if train:
            moves = moved_statistics(model, variables, shape, train=True, dropout_key=key)
            if variables["batch_stats"] and not moves:
                raise InputError(
                    f"{what}, {name}, does not move its running statistics in training mode: the "
                    "switch must be an argument of __call__, or a field, of the whole model, named "
                    f"{', '.join(SWITCHES)}"
                )
        return variables
    except InputError:
        raise
    except flax_errors.InvalidRngError as error:
        hint = "but only a student in training mode gets them, and only those named 'dropout'"
        if train and not dropout:
            hint = (
                "because the protocol runs it in training mode, with the batch's statistics: use a "
                "protocol where the teacher uses its running statistics, such as paper"
            )
        raise InputError(f"{what}, {name}, needs random numbers, {hint}") from error
    except (
        flax_errors.FlaxError,
        TypeError,
        ValueError,
        NameError,
        LookupError,
        AttributeError,
    ) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{what}, {name}, cannot run on images of shape {image_shape}: {reason}"
        ) from error


def uses_dropout(model: Model, image_shape: tuple[int, ...]) -> bool:
    """Tells whether a model needs random numbers in training mode."""
    model = configure_model(model, "float32", None)
    try:
        variables = abstract_variables(model, image_shape)
        abstract_forward(model, variables, (2, *image_shape), train=True)
    except flax_errors.InvalidRngError:
        return True
    return False


def require_fits(what: str, model: Model, variables: Any, image_shape: tuple[int, ...]) -> None:
    """Raises `InputError` if variables do not fit a model; the message begins with `what`."""
    _require_shapes(what, model, variables, abstract_variables(model, image_shape), image_shape)


def _require_shapes(
    what: str, model: Model, variables: Any, shapes: Any, image_shape: tuple[int, ...]
) -> None:
    """Raises `InputError` unless variables have the paths, shapes and kinds of a model's."""
    actual = flatten_dict(dict(variables), sep="/")
    expected = flatten_dict(shapes, sep="/")
    name = without_fields(model_name(model))
    for key in sorted({*actual, *expected}):
        if key not in actual or key not in expected:
            problem = "is missing" if key not in actual else "is no weight of this architecture"
            raise InputError(f"{what} for {name}: '{key}' {problem}")
        if actual[key].shape != expected[key].shape:
            raise InputError(
                f"{what} for {name}: '{key}' has shape {actual[key].shape}, where images of "
                f"{image_shape[-1]} channels need {expected[key].shape}"
            )
        floats = jnp.issubdtype(expected[key].dtype, jnp.floating)
        if floats != jnp.issubdtype(actual[key].dtype, jnp.floating):
            kind = "no floats" if floats else "no whole numbers"
            raise InputError(f"{what} for {name}: '{key}' holds {actual[key].dtype}, {kind}")


def require_part(what: str, model: Model, variables: Any, image_shape: tuple[int, ...]) -> None:
    """Raises `InputError` unless variables are a part of a model's; see `require_fits`."""
    actual = flatten_dict(dict(variables))
    expected = flatten_dict(abstract_variables(model, image_shape))
    require_fits(what, model, unflatten_dict(expected | actual), image_shape)


def require_classes(
    what: str, model: Model, variables: Any, image_shape: tuple[int, ...], classes: int
) -> None:
    """Raises `InputError` unless a model with such variables has one logit for each class."""
    logits = number_of_logits(model, variables, image_shape)
    if logits != classes:
        name = without_fields(model_name(model))
        raise InputError(f"{what}, {name}, has {logits} logits for {classes} classes")
