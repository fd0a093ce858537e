"""Finds what the batch norms of a network get, as taps are found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import Array

from abflax.taps.linen import Linen
from abflax.taps.running import Model, Tapped, logits_of, side_of
from abflax.taps.sides import COLLECTION, NORM_INPUT, RECORD_NORMS, Path


def run_with_norms(
    model: Model, variables: Mapping[str, Any], images: Array
) -> tuple[Array, dict[str, tuple[Array, Array, Array]]]:
    """Runs a network once in evaluation mode, and returns what its batch norms get.

    A batch norm is a module with the variables `mean` and `var` in `batch_stats`; Flax's and those
    of abflax have them, Linen or NNX.

    Args:
      model: any Linen or NNX module that takes images, or a `Tapped` one.
      variables: its `params`, `batch_stats` and other collections.
      images: `[batch, height, width, channels]`, normalized.

    Returns:
      The logits, and path -> (inputs, running mean, running variance) in the order of the calls. A
      norm that is called twice has two entries, `path` and `path[1]`. Under `nn.scan` all three are
      stacked along the first axis.
    """
    side, order = side_of(model), list[Path]()
    token = RECORD_NORMS.set(True)
    try:
        with _sow_inputs(order) if isinstance(side, Linen) else contextlib.nullcontext():
            passed = side.apply(variables, images, train=False, dropout_key=None, capture=False)
    finally:
        RECORD_NORMS.reset(token)
    chosen = model.output if isinstance(model, Tapped) else None
    logits = logits_of(side.name, passed.output, chosen)
    statistics = flatten_dict(dict(variables.get("batch_stats", {})))
    sown = {path[:-1]: value for path, value in passed.sown.items() if path[-1] == NORM_INPUT}
    norms = {}
    for path in dict.fromkeys([*(each for each in order if each in sown), *sown]):
        own = tuple(statistics[(*path, name)] for name in ("mean", "var"))
        calls = jax.tree.leaves(sown[path])
        for index, inputs in enumerate(calls):
            norms["/".join(path) + f"[{index}]" * (index > 0)] = (inputs, *own)
    return logits, norms


@contextlib.contextmanager
def _sow_inputs(order: list[Path]) -> Iterator[None]:
    """Makes Linen's batch norms sow what they get."""

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and args:
            own = (module.has_variable("batch_stats", name) for name in ("mean", "var"))
            if all(own):
                module.sow(COLLECTION, NORM_INPUT, args[0])
                order.append(module.path)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield
