"""A network: an architecture with its weights, and the name under which records know it."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from abflax.errors import InputError
from abflax.models import model_name


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A Linen module and its variables.

    Attributes:
      model: the module.
      variables: its `params` and, if it has any, `batch_stats`.
      name: how records call it; None: the architecture's name and a digest of the weights.
    """

    model: nn.Module
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


def prepared(model: nn.Module, precision: str, axis_name: str | None) -> nn.Module:
    """The module as a run uses it: in its precision, its batch norms averaged over the devices.

    Fields that the module does not have are left alone.
    """
    wanted = {
        "dtype": jnp.bfloat16 if precision == "bfloat16" else None,
        "param_dtype": jnp.result_type(float),
        "axis_name": axis_name,
    }
    names = {field.name for field in dataclasses.fields(model)}
    return model.clone(**{key: value for key, value in wanted.items() if key in names})
