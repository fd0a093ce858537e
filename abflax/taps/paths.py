"""Finds the output of a submodule by its path."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from abflax.errors import InputError, unknown


def watch(calls: dict[tuple[str, ...], Any]) -> Callable[..., Any]:
    """Returns an interceptor that puts {path: (class name, output shapes)} of modules into `calls`.

    The shapes are those inside the module, without the axes that `nn.scan` adds.
    """

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        outputs = call(*args, **kwargs)
        if context.method_name == "__call__":
            shapes = [jax.numpy.shape(leaf) for leaf in jax.tree.leaves(outputs)]
            calls[context.module.path] = (type(context.module).__name__, shapes)
        return outputs

    return intercept


def tapped_at(
    sown: Mapping[str, Any], calls: Mapping[tuple[str, ...], Any], path: str
) -> jax.Array:
    """Finds the array that the module at a path (see `run_model`) returned, or that was sown there.

    `sown` is the collection `intermediates`, and `calls` is what `watch` recorded.

    Raises:
      ValueError: if there is no such path, or not exactly one array.
    """
    name, *index = re.split(r"\[(\d+(?:,\d+)*)\]\Z", path)
    iteration = tuple(map(int, index[0].split(","))) if index else ()
    parts, flat = tuple(name.split("/")), flatten_dict(dict(sown))
    key = (*parts, "__call__") if (*parts, "__call__") in flat else parts
    if key not in flat and parts in calls:
        raise InputError(
            f"tap path '{path}': the module there runs inside a transformation that keeps its "
            "output; give that nn.scan (or nn.vmap) variable_axes={'intermediates': 0, …}"
        )
    if key not in flat:
        known = {"/".join(k[:-1] if k[-1] == "__call__" else k) for k in flat}
        raise unknown("tap path", name, known - {""})
    values = flat[key] if isinstance(flat[key], tuple) else (flat[key],)
    if len(values) != 1 or not isinstance(values[0], jax.Array):
        raise InputError(
            f"tap path '{path}': a tap is one array, but the module there ran {len(values)} times "
            "or returned something else"
        )
    lengths = scanned(flat, calls, key[:-1])
    if len(iteration) != len(lengths) or any(map(operator.ge, iteration, lengths)):
        last = f"'{name}[{','.join(str(n - 1) for n in lengths)}]' is the last"
        times = f"once per iteration of nn.scan; {last}" if lengths else "once"
        raise InputError(f"tap path '{path}': it runs {times}")
    return values[0][iteration]


def scanned(
    flat: Mapping[tuple[str, ...], Any],
    calls: Mapping[tuple[str, ...], Any],
    module: tuple[str, ...],
) -> tuple[int, ...]:
    """Finds the lengths of the axes that `nn.scan` and `nn.vmap` add to a module's outputs."""
    outer = [leaf.shape for leaf in jax.tree.leaves(flat.get((*module, "__call__"), ()))]
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
