"""The one rule about dtypes that every loss follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from abflax.errors import InputError


def at_least_float32(x: jax.Array) -> jax.Array:
    """bfloat16, float16 and integers become float32; float32 and float64 stay what they are.

    Raises:
      ValueError: for complex numbers.
    """
    x = real(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def real(x: jax.Array) -> jax.Array:
    """As a JAX array of real numbers or booleans. Raises `InputError` for complex numbers."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise InputError(f"real numbers are needed, not {x.dtype} of shape {x.shape}")
    return x


def require_spreads(what: str, x: jax.typing.ArrayLike, shape: tuple[int, ...]) -> None:
    """Raises `InputError` where an array does not broadcast to a shape: nothing else grows."""
    own = jnp.shape(x)
    fits = len(own) <= len(shape) and all(
        a in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise InputError(f"{what} of shape {own} does not spread over {shape}")
