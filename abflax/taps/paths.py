"""Where a module is among those that run, and what it has put out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from abflax.errors import InputError, unknown


def watch(calls: dict[tuple[str, ...], Any]) -> Callable[..., Any]:
    """An interceptor that notes the class and the output's shapes of every module that runs.

    Shapes are those that the module itself sees, without the axes that `nn.scan` adds.
    """

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            shapes = [jax.numpy.shape(leaf) for leaf in jax.tree.leaves(out)]
            calls[context.module.path] = (type(context.module).__name__, shapes)
        return out

    return note


def tapped_at(
    sown: Mapping[str, Any], calls: Mapping[tuple[str, ...], Any], path: str
) -> jax.Array:
    """The one array that the module at `path` has put out, or that was sown there."""
    name, *within = re.split(r"\[(\d+(?:,\d+)*)\]\Z", path)
    steps = tuple(map(int, within[0].split(","))) if within else ()
    place, flat = tuple(name.split("/")), flatten_dict(dict(sown))
    key = (*place, "__call__") if (*place, "__call__") in flat else place
    if key not in flat and place in calls:
        raise InputError(
            f"tap path '{path}': the module there runs inside a transformation that keeps its "
            "output; give that nn.scan (or nn.vmap) variable_axes={'intermediates': 0, …}"
        )
    if key not in flat:
        named = {"/".join(k[:-1] if k[-1] == "__call__" else k) for k in flat}
        raise unknown("tap path", name, named - {""})
    values = flat[key] if isinstance(flat[key], tuple) else (flat[key],)
    if len(values) != 1 or not isinstance(values[0], jax.Array):
        raise InputError(
            f"tap path '{path}': a tap is one array, but the module there ran {len(values)} times "
            "or puts out something else"
        )
    lengths = scanned(flat, calls, key[:-1])
    if len(steps) != len(lengths) or any(i >= n for i, n in zip(steps, lengths, strict=True)):
        last = f"'{name}[{','.join(str(n - 1) for n in lengths)}]' is the last"
        raise InputError(
            f"tap path '{path}': "
            + (f"it runs once an iteration of nn.scan; {last}" if lengths else "it runs once")
        )
    return values[0][steps]


def scanned(
    flat: Mapping[tuple[str, ...], Any],
    calls: Mapping[tuple[str, ...], Any],
    module: tuple[str, ...],
) -> tuple[int, ...]:
    """Finds the leading axes that `nn.scan` and `nn.vmap` add to what a module returns or sows.

    They are the lengths of the loops around it.
    """
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
