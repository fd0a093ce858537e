"""Initializes a network's variables, or computes their shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from abflax.taps import Model, side_of
from abflax.taps.sides import is_key


def abstract_variables(model: Model, image_shape: tuple[int, ...]) -> Any:
    """Computes the shapes and dtypes of what `init_variables` returns."""
    return jax.eval_shape(lambda key: init_variables(model, key, image_shape), jax.random.key(0))


def init_variables(model: Model, key: jax.Array, image_shape: tuple[int, ...]) -> Any:
    """Initializes {"params", "batch_stats", …}, with floats in the default floating dtype."""
    dtype = jnp.result_type(float)
    images = jnp.zeros((1, *image_shape), dtype)
    return floats_in(dtype, side_of(model).init(key, images))


def floats_in(dtype: Any, tree: Any) -> Any:
    """Converts all floats of a tree to a dtype.

    Flax initializes statistics, and modules without the field `param_dtype`, in float32.
    """
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)


def not_finite(variables: Any) -> list[str]:
    """Finds the arrays that hold NaN or infinity, by their paths, such as "params/stem/bias".

    A network's outputs do not tell: on CPUs JAX 0.12 compiles some ReLUs so that NaN becomes 0.
    """
    flat = flatten_dict(dict(variables), sep="/")
    numbers = {name: leaf for name, leaf in flat.items() if not is_key(leaf)}
    return [name for name, leaf in numbers.items() if not np.isfinite(leaf).all()]
