"""A network: an architecture with its weights, and the name under which records know it."""

from __future__ import annotations

import dataclasses
import hashlib
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
      model: the module, or with its taps: `Tapped(module, {"layer1": path, …})`.
      variables: its `params` and, if it has any, `batch_stats`.
      name: how records call it; None: the architecture's name and a digest of the weights.
    """

    model: Model
    variables: Any
    name: str | None = None

    def __post_init__(self) -> None:
        if "params" not in self.variables:
            raise InputError(
                f"a network's variables need 'params'; there are {sorted(self.variables)}"
            )
        if self.name is None:
            name = f"{model_name(self.model)}:{digest(self.variables)}"
            object.__setattr__(self, "name", name)


def digest(variables: Any) -> str:
    """Twelve hexadecimal digits that identify a tree of arrays."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        leaf = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)}{leaf.dtype}{leaf.shape}".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()[:12]


def configure_model(model: Model, precision: str, axis_name: str | None) -> Model:
    """The module as a run uses it: in its precision, its batch norms averaged over the devices.

    Fields that the module does not have are left alone.

    Raises:
      ValueError: where the precision is bfloat16 and the module cannot be told; or where a field
        cannot be hashed, so that programs could not be shared between runs.
    """
    module = module_of(model)
    wanted: dict[str, Any] = {
        "dtype": jnp.bfloat16 if precision == "bfloat16" else None,
        "param_dtype": jnp.result_type(float),
        "axis_name": axis_name,
    }
    names = {field.name for field in dataclasses.fields(module)}
    if precision == "bfloat16" and "dtype" not in names:
        raise InputError(
            f"{type(module).__name__} has no field dtype, so it cannot be told to use bfloat16"
        )
    told = {key: value for key, value in wanted.items() if key in names}
    module = _hashable(module.clone(**told))
    try:
        hash(module)
    except TypeError as error:
        raise InputError(
            f"{type(module).__name__} has a field that cannot be hashed: use tuples, numbers, "
            "strings, functions and modules"
        ) from error
    return dataclasses.replace(model, model=module) if isinstance(model, Tapped) else module


def _hashable(value: Any) -> Any:
    """Replaces lists among a module's fields by tuples, at every depth, as in `nn.Sequential`."""
    if isinstance(value, nn.Module):
        fields = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.init and field.name not in ("parent", "name")
        }
        frozen = {name: _hashable(field) for name, field in fields.items()}
        changed = {name: new for name, new in frozen.items() if new is not fields[name]}
        return value.clone(**changed) if changed else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        inside = tuple(map(_hashable, value))
        same = isinstance(value, tuple) and all(map(lambda a, b: a is b, inside, value))
        return value if same else inside
    if isinstance(value, dict):
        return FrozenDict({key: _hashable(each) for key, each in value.items()})
    return value
