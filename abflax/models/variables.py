"""Fresh variables of a network, and their shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from abflax.taps import Model, in_mode, module_of


def abstract_variables(model: Model, image_shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of what `init_variables` makes."""
    return jax.eval_shape(lambda key: init_variables(model, key, image_shape), jax.random.key(0))


def init_variables(model: Model, key: jax.Array, image_shape: tuple[int, ...]) -> Any:
    """{"params", "batch_stats"} of a fresh network, floats in the default floating dtype."""
    dtype = jnp.result_type(float)
    module, mode = in_mode(module_of(model), False)
    variables = module.init(key, jnp.zeros((1, *image_shape), dtype), **mode)
    kept = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    return floats_in(dtype, kept)


def floats_in(dtype: Any, tree: Any) -> Any:
    """Modules without a field param_dtype, and all statistics, begin in float32 in any run."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)
