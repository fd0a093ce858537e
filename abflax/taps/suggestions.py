"""What of a model can be tapped, and what the paper would tap."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from abflax.taps.paths import scanned, watch
from abflax.taps.running import COLLECTION, FEATURES, Model, in_mode, module_of, run_model


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What can be tapped.

    Attributes:
      path: for `run_model`'s `tap_paths`.
      shape: of the tap, for the batch that was given.
      kind: the module's class, or "sown".
      rectified: whether no entry is negative, so that it comes after a ReLU (or a sigmoid) and
        is no pre-activation; None where the images or the variables are abstract. (The batch norm
        of an untrained network, too, leaves rectified inputs so.)
      marked: whether the paper's rule would tap it.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    rectified: bool | None
    marked: bool = False


def suggest(model: Model, variables: Any, images: Any) -> tuple[Candidate, ...]:
    """What can be tapped of a model, in the order in which it runs.

    Marked is the paper's choice, the last pre-activation of each spatial size: of what the model
    has sown with that size, else of the modules' outputs that are not known to be rectified. Maps
    of one position count as features; where there are no maps, the deepest features are marked.

    Args:
      model: any Linen module that takes images.
      variables: its variables, arrays or shapes.
      images: `[batch, …]`, an array or a `jax.ShapeDtypeStruct`. Shapes are found by
        `jax.eval_shape`; only `rectified` needs a pass, of at most 16 images.

    Examples:
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, images):
      ...         x = nn.relu(nn.Conv(4, (3, 3))(images))
      ...         x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
      ...         return nn.Dense(10)(x.mean(axis=(1, 2)))
      >>> images = jax.numpy.ones((1, 8, 8, 1))
      >>> candidates = suggest(Net(), Net().init(jax.random.key(0), images), images)
      >>> for each in candidates:
      ...     print(each.path, each.shape, each.marked)
      Conv_0 (1, 8, 8, 4) True
      Conv_1 (1, 4, 4, 8) True
      >>> marked(candidates)
      {'layer1': 'Conv_0', 'layer2': 'Conv_1'}
    """
    keys: list[tuple[tuple[str, ...], str, tuple[int, ...]]] = []

    def trace(variables: Any, images: Any) -> list[jax.Array]:
        module, mode = in_mode(module_of(model), False)
        calls: dict[tuple[str, ...], Any] = {}
        with nn.intercept_methods(watch(calls)):
            logits, state = module.apply(
                variables, images, **mode, mutable=[COLLECTION], capture_intermediates=True
            )
        flat, taps = flatten_dict(state[COLLECTION]), []
        for key in _in_order(list(flat), [(*path, "__call__") for path in calls]):
            values = flat[key] if isinstance(flat[key], tuple) else (flat[key],)
            one = len(values) == 1 and isinstance(values[0], jax.Array)
            if key != ("__call__",) and one and values[0] is not logits:
                kind, _ = calls.get(key[:-1], ("module", ()))
                kind = kind if key[-1] == "__call__" else "sown"
                keys.append((key, kind, scanned(flat, calls, key[:-1])))
                taps.append(values[0])
        return taps

    variables = {name: tree for name, tree in variables.items() if name != COLLECTION}
    found = []
    shapes = jax.eval_shape(trace, variables, images)
    for (_, lengths), group in itertools.groupby(
        zip(keys, shapes, strict=True), lambda each: (each[0][0][0], each[0][2])
    ):
        inside = list(group)
        for steps in np.ndindex(*lengths):
            at = f"[{','.join(map(str, steps))}]" if steps else ""
            for (key, kind, _), tap in inside:
                path = "/".join(key[:-1] if key[-1] == "__call__" else key) + at
                found.append(Candidate(path, tap.shape[len(steps) :], kind, None))
    found = [each for each in found if len(each.shape) in (2, 4)]
    if not any(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((variables, images))
    ):
        lowest = _lowest(model, variables, images[:16], [each.path for each in found])
        found = [dataclasses.replace(each, rectified=lowest[each.path] >= 0) for each in found]
    chosen = _chosen(found)
    return tuple(dataclasses.replace(each, marked=each in chosen) for each in found)


def _chosen(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The last pre-activation of each spatial size; what was sown comes before what was not."""
    last: dict[tuple[int, ...], Candidate] = {}
    for each in candidates:
        size = each.shape[1:-1] if each.shape[1:-1] != (1, 1) else ()
        sown_before = size in last and last[size].kind == "sown"
        if each.rectified or each.path == FEATURES or (sown_before and each.kind != "sown"):
            continue
        last[size] = each
    return [each for size, each in last.items() if size or len(last) == 1]


def marked(candidates: Iterable[Candidate]) -> dict[str, str]:
    """Collects the marked candidates as `Tapped` takes them.

    Example: `Tapped(model, marked(suggest(model, …)))`.

    Returns:
      {"layer1": path, …}, the shallowest first.
    """
    paths = [each.path for each in candidates if each.marked]
    return {f"layer{index}": path for index, path in enumerate(paths, start=1)}


def _in_order(stored: list[tuple[str, ...]], ran: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Sorts stored keys by the order in which the modules ran.

    What was sown stays behind the module that it follows in the store.
    """
    order, at = [key for key in ran if key in stored], 0
    for key in stored:
        if key in order:
            at = order.index(key) + 1
        else:
            order.insert(at, key)
            at += 1
    return order


def _lowest(model: Model, variables: Any, images: Any, paths: list[str]) -> dict[str, float]:
    """Path -> the smallest entry of that tap."""

    @jax.jit
    def lowest(variables: Any, images: Any) -> dict[str, jax.Array]:
        named = {path: path for path in paths}
        taps = run_model(model, variables, images, train=False, tap_paths=named).taps
        return {path: tap.min() for path, tap in taps.items()}

    return {path: float(value) for path, value in lowest(variables, images).items()}
