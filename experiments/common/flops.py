"""How many floating-point operations a function takes."""

from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations, counted on the program as it was written."""
    costs = jax.jit(function).lower(*arguments).cost_analysis() or {}
    return float(costs["flops"])
