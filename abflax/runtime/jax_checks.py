"""JAX as abflax needs it: its devices are there, and checks of the caller's own code are off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from abflax.errors import InputError


@contextmanager
def jax_defaults() -> Iterator[None]:
    """Sets what JAX checks of a caller's code to its defaults, inside a `with` block or a function.

    Strict dtypes, rank promotion and the transfer guard fail in Flax, optax and abflax alike.
    """
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        yield


def require_devices() -> None:
    """Raises `InputError` where JAX cannot start on the devices that it is told to use."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "there are none")
        platforms = jax.config.values["jax_platforms"]
        raise InputError(f"JAX cannot start on JAX_PLATFORMS={platforms}: {reason}") from error
