"""Whether networks, weights, data and method can go together; told before anything is written."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from abflax.config import RunConfig
from abflax.data import Dataset
from abflax.errors import InputError
from abflax.models import model_name
from abflax.networks import Network
from abflax.step import abstract_variables
from abflax.taps import number_of_logits


def require_fits(what: str, model: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> None:
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


def require_classes(what: str, model: nn.Module, image_shape: tuple[int, ...], classes: int):
    """Raises `InputError` where a model has not one logit for each class."""
    variables = abstract_variables(model, image_shape)
    logits = number_of_logits(model, variables, image_shape)
    if logits != classes:
        raise InputError(f"{what}, {model_name(model)}, has {logits} logits for {classes} classes")


def require_compatible(
    config: RunConfig,
    student: nn.Module,
    teacher: Network | None,
    data: Dataset,
    test: Dataset | None,
) -> None:
    """Raises where method, networks and data cannot go together."""
    require_classes("the student", student, data.image_shape, data.num_classes)
    needs = any(term.needs_teacher for phase in config.phases() for _, term in phase.terms)
    if needs and teacher is None:
        raise InputError(f"method {config.method} needs a teacher")
    if teacher is not None:
        require_fits("the teacher's weights", teacher.model, teacher.variables, data.image_shape)
    if test is None:
        return
    if test.image_shape != data.image_shape:
        raise InputError(
            f"the test images have shape {test.image_shape}, the training images {data.image_shape}"
        )
    ours, theirs = data.preprocessing, test.preprocessing
    if (ours.mean, ours.std) != (theirs.mean, theirs.std):
        raise InputError(
            f"the test images are normalised by {theirs.mean} and {theirs.std}, the training "
            f"images by {ours.mean} and {ours.std}"
        )
