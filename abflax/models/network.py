"""Holds a network: an architecture with its weights, and its name in records."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from abflax.errors import InputError
from abflax.models import is_local, model_name
from abflax.models.variables import abstract_variables
from abflax.taps import Model, Side, Tapped, is_nnx, side_of, split_nnx, with_side
from abflax.taps.sides import is_key, lasting

if TYPE_CHECKING:
    from flax import nnx


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A module and its variables.

    Attributes:
      model: a Linen module, or an NNX module, which is copied; or
        `Tapped(module, {"layer1": path, …})`.
      variables: its `params` and, if it has any, `batch_stats` and other collections; what was
        sown, and random keys, are left out. None: those that the NNX module holds.
      name: the network's name in records; None: the architecture's name and a digest of the
        weights.
    """

    model: Model
    variables: Any = None
    name: str | None = None

    def __post_init__(self) -> None:
        module = self.model.model if isinstance(self.model, Tapped) else self.model
        variables = self.variables
        if is_nnx(module):
            side, own = split_nnx(module)
            object.__setattr__(self, "model", with_side(self.model, side))
            variables = own if variables is None else variables
        if not isinstance(variables, Mapping):
            kind = type(variables).__name__
            raise InputError(f"a network's variables are a dict with 'params', not {kind}")
        if "params" not in variables:
            raise InputError(f"a network's variables need 'params'; there are {sorted(variables)}")
        variables = lasting(nn.unbox(variables))
        for path, leaf in flatten_dict(variables, sep="/").items():
            if is_key(leaf):
                raise InputError(f"a network's variables: '{path}' holds random keys, no weights")
        object.__setattr__(self, "variables", variables)
        if self.name is None:
            name = f"{model_name(self.model)}:{digest(self.variables)}"
            object.__setattr__(self, "name", name)

    @property
    def module(self) -> nnx.Module:
        """A new NNX module with the network's weights."""
        return side_of(self.model).merge(self.variables)


def as_network(model: Any) -> Any:
    """Returns the `Network` of an NNX module, which brings its weights; else what was given."""
    module = model.model if isinstance(model, Tapped) else model
    return Network(model) if is_nnx(module) else model


def require_network(what: str, model: Any) -> Network:
    """Returns what `as_network` does. Raises `InputError` if that is no network."""
    network = as_network(model)
    if not isinstance(network, Network):
        raise InputError(
            f"{what} must be a Network(model, variables) or an NNX module, not "
            f"{type(network).__name__}"
        )
    return network


def digest(variables: Any) -> str:
    """Computes twelve hexadecimal digits that identify a tree of arrays."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        leaf = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)}{leaf.dtype}{leaf.shape}".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()[:12]


def student_name(model: Model, image_shape: tuple[int, ...]) -> str:
    """Returns `model_name`, and for a local class a digest of its variables' names and shapes.

    So a class that is edited in a notebook, with another layer, makes another run.
    """
    name = model_name(model)
    if not is_local(model):
        return name
    try:
        flat = flatten_dict(abstract_variables(model, image_shape), sep="/")
    except Exception:  # noqa: BLE001 - a model that cannot run is refused by name later
        return name
    shapes = sorted((path, leaf.shape) for path, leaf in flat.items())
    return f"{name}, variables {hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]}"


def configure_model(model: Model, precision: str, axis_name: str | None) -> Side | Tapped:
    """Sets the fields of a module for a run: its dtypes, and the axis of its batch norms.

    Fields that the module does not have are skipped.

    Raises:
      ValueError: if the precision is bfloat16 and the module has no field `dtype`.
    """
    side = side_of(model)
    if precision == "bfloat16" and "dtype" not in side.dtypes:
        raise InputError(f"{side.name} has no field dtype, so it cannot be set to bfloat16")
    fields = {
        "dtype": jnp.bfloat16 if precision == "bfloat16" else None,
        "param_dtype": jnp.result_type(float),
        "axis_name": axis_name,
    }
    return with_side(model, side.configured(fields))
