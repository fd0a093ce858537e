"""Checks and converts dtypes, and checks broadcasting, by the rules that every loss follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import InputError


def at_least_float32(x: jax.Array) -> jax.Array:
    """Converts bfloat16, float16 and integers to float32; leaves float32 and float64 unchanged.

    Raises:
      ValueError: if x is complex.
    """
    x = real(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def real(x: jax.Array) -> jax.Array:
    """Converts to a JAX array. Raises `InputError` if it is complex."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise InputError(f"real numbers are needed, not {x.dtype} of shape {x.shape}")
    return x


def require_broadcastable(what: str, x: jax.typing.ArrayLike, shape: tuple[int, ...]) -> None:
    """Raises `InputError` if x cannot be broadcast to a shape, or would enlarge that shape."""
    own = jnp.shape(x)
    fits = len(own) <= len(shape) and all(
        a in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise InputError(f"{what} of shape {own} cannot be broadcast to {shape}")
