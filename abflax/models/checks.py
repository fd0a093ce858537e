"""Whether a model runs, and whether variables fit it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax.errors import InputError
from abflax.models import model_name
from abflax.models.network import configure_model
from abflax.models.variables import abstract_variables
from abflax.taps import Model, number_of_logits, run_model


def require_runs(
    what: str, model: Model, image_shape: tuple[int, ...], *, train: bool, dropout: bool
) -> None:
    """Raises `InputError` if a model cannot run with nothing but its `params` and `batch_stats`.

    Args:
      what: what the message begins with.
      model: the model.
      image_shape: (height, width, channels).
      train: whether it must run in training mode too.
      dropout: whether it gets a key for dropout there.
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
        _abstract_pass(configure_model(model, "float32", None), image_shape, True, None)
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
    """Raises `InputError` if variables are not those of a model on such images.

    Args:
      what: what the message begins with.
      model: the model.
      variables: `params`, and `batch_stats` if it has any.
      image_shape: (height, width, channels).
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
