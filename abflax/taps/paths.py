"""Finds the output of a submodule by its path."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import jax

from abflax.errors import InputError, unknown


def tapped_at(
    sown: Mapping[tuple[str, ...], Any], calls: Mapping[tuple[str, ...], Any], path: str
) -> jax.Array:
    """Finds the array that the module at a path (see `run_model`) returned, or that was sown there.

    `sown` and `calls` are those of `abflax.taps.sides.Pass`.

    Raises:
      ValueError: if there is no such path, or not exactly one array.
    """
    name, *index = re.split(r"\[(\d+(?:,\d+)*)\]\Z", path)
    iteration = tuple(map(int, index[0].split(","))) if index else ()
    parts = tuple(name.split("/"))
    key = (*parts, "__call__") if (*parts, "__call__") in sown else parts
    if key not in sown and parts in calls:
        raise InputError(
            f"tap path '{path}': the module there runs inside a transformation that keeps its "
            "output; give that nn.scan (or nn.vmap) variable_axes={'intermediates': 0, …}"
        )
    if key not in sown:
        known = {"/".join(k[:-1] if k[-1] == "__call__" else k) for k in sown}
        raise unknown("tap path", name, known - {""})
    values = sown[key] if isinstance(sown[key], tuple) else (sown[key],)
    if len(values) != 1 or not isinstance(values[0], jax.Array):
        raise InputError(
            f"tap path '{path}': a tap is one array, but the module there ran {len(values)} times "
            "or returned something else"
        )
    lengths = scanned(sown, calls, key[:-1])
    if len(iteration) != len(lengths) or any(map(operator.ge, iteration, lengths)):
        last = f"'{name}[{','.join(str(n - 1) for n in lengths)}]' is the last"
        times = f"once per iteration of nn.scan; {last}" if lengths else "once"
        raise InputError(f"tap path '{path}': it runs {times}")
    return values[0][iteration]


def scanned(
    sown: Mapping[tuple[str, ...], Any],
    calls: Mapping[tuple[str, ...], Any],
    module: tuple[str, ...],
) -> tuple[int, ...]:
    """Finds the lengths of the axes that `nn.scan` and `nn.vmap` add to a module's outputs."""
    leaves = jax.tree.leaves(sown.get((*module, "__call__"), ()))
    outer = [leaf.shape for leaf in leaves if isinstance(leaf, jax.Array)]
    _, inner = calls.get(module, ("", outer))
    if not outer or not inner:
        return ()
    extra = len(outer[0]) - len(inner[0])
    if outer[0][extra:] != inner[0]:
        raise InputError(
            f"tap path '{'/'.join(module)}': the nn.scan around it stacks 'intermediates' along "
            "another axis than 0"
        )
    return outer[0][:extra]
