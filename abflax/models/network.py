"""Holds a network: an architecture with its weights, and its name in records."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict

from abflax.errors import InputError
from abflax.models import model_name
from abflax.taps import Model, Tapped, module_of


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A Linen module and its variables.

    Attributes:
      model: the module, or `Tapped(module, {"layer1": path, …})`.
      variables: its `params` and, if it has any, `batch_stats`.
      name: the network's name in records; None: the architecture's name and a digest of the
        weights.
    """

    model: Model
    variables: Any
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.variables, Mapping):
            kind = type(self.variables).__name__
            raise InputError(f"a network's variables are a dict with 'params', not {kind}")
        if "params" not in self.variables:
            raise InputError(
                f"a network's variables need 'params'; there are {sorted(self.variables)}"
            )
        if self.name is None:
            name = f"{model_name(self.model)}:{digest(self.variables)}"
            object.__setattr__(self, "name", name)


def digest(variables: Any) -> str:
    """Computes twelve hexadecimal digits that identify a tree of arrays."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        leaf = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)}{leaf.dtype}{leaf.shape}".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()[:12]


def configure_model(model: Model, precision: str, axis_name: str | None) -> Model:
    """Sets the fields of a module for a run: its dtypes, and the axis of its batch norms.

    Fields that the module does not have are skipped.

    Raises:
      ValueError: if the precision is bfloat16 and the module has no field `dtype`; or if a field
        cannot be hashed, since runs share programs by the hash of the module.
    """
    module = module_of(model)
    fields: dict[str, Any] = {
        "dtype": jnp.bfloat16 if precision == "bfloat16" else None,
        "param_dtype": jnp.result_type(float),
        "axis_name": axis_name,
    }
    names = {field.name for field in dataclasses.fields(module)}
    if precision == "bfloat16" and "dtype" not in names:
        raise InputError(
            f"{type(module).__name__} has no field dtype, so it cannot be set to bfloat16"
        )
    module = _hashable(module.clone(**{name: fields[name] for name in fields.keys() & names}))
    try:
        hash(module)
    except TypeError as error:
        raise InputError(
            f"{type(module).__name__} has a field that cannot be hashed: use tuples, numbers, "
            "strings, functions and modules"
        ) from error
    return dataclasses.replace(model, model=module) if isinstance(model, Tapped) else module


def _hashable(value: Any) -> Any:
    """Replaces lists by tuples among a module's fields, at every depth, as for `nn.Sequential`."""
    if isinstance(value, nn.Module):
        changed = {}
        for field in dataclasses.fields(value):
            if field.init and field.name not in ("parent", "name"):
                old = getattr(value, field.name)
                new = _hashable(old)
                if new is not old:
                    changed[field.name] = new
        return value.clone(**changed) if changed else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        items = tuple(map(_hashable, value))
        same = isinstance(value, tuple) and all(map(lambda a, b: a is b, items, value))
        return value if same else items
    if isinstance(value, dict):
        return FrozenDict({key: _hashable(item) for key, item in value.items()})
    return value
