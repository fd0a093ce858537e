"""Finds what can be tapped in a model, and which taps follow the paper's rule."""

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
    """A possible tap.

    Attributes:
      path: for `run_model`'s `tap_paths`.
      shape: of the tap, for the given batch.
      kind: the module's class, or "sown".
      rectified: whether no entry is negative, which means that a ReLU (or a sigmoid) came before
        and this is not a pre-activation; None if the images or the variables are abstract. (In an
        untrained network this also holds for a batch norm of rectified inputs.)
      marked: whether the paper's rule would tap it.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    rectified: bool | None
    marked: bool = False


def suggest(model: Model, variables: Any, images: Any) -> tuple[Candidate, ...]:
    """Lists the possible taps of a model, in the order in which its modules run.

    The marked ones follow the paper's rule: the last pre-activation of each spatial size. If the
    model has sown arrays of that size, the last of them is marked, else the last output of a
    module that is not known to be rectified. Maps of one position count as features. If there are
    no maps, the deepest features are marked.

    Args:
      model: any Linen module that takes images.
      variables: its variables, arrays or shapes.
      images: `[batch, …]`, an array or a `jax.ShapeDtypeStruct`. `jax.eval_shape` finds the
        shapes; only `rectified` needs a forward pass, of at most 16 images.

    Returns:
      The candidates; `marked` turns them into `tap_paths`.

    Examples:
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, images):
      ...         x = nn.relu(nn.Conv(4, (3, 3))(images))
      ...         x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
      ...         return nn.Dense(10)(x.mean(axis=(1, 2)))
      >>> images = jax.numpy.ones((1, 8, 8, 1))
      >>> candidates = suggest(Net(), Net().init(jax.random.key(0), images), images)
      >>> for tap in candidates:
      ...     print(tap.path, tap.shape, tap.marked)
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
    candidates = []
    shapes = jax.eval_shape(trace, variables, images)
    # The taps in one scan are listed iteration by iteration.
    for (_, lengths), group in itertools.groupby(
        zip(keys, shapes, strict=True), lambda pair: (pair[0][0][0], pair[0][2])
    ):
        taps = list(group)
        for iteration in np.ndindex(*lengths):
            suffix = f"[{','.join(map(str, iteration))}]" if iteration else ""
            for (key, kind, _), tap in taps:
                path = "/".join(key[:-1] if key[-1] == "__call__" else key) + suffix
                candidates.append(Candidate(path, tap.shape[len(iteration) :], kind, None))
    candidates = [tap for tap in candidates if len(tap.shape) in (2, 4)]
    if not any(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((variables, images))
    ):
        lowest = _lowest(model, variables, images[:16], [tap.path for tap in candidates])
        for index, tap in enumerate(candidates):
            candidates[index] = dataclasses.replace(tap, rectified=bool(lowest[tap.path] >= 0))
    chosen = _chosen(candidates)
    return tuple(dataclasses.replace(tap, marked=tap in chosen) for tap in candidates)


def _chosen(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Finds the last pre-activation of each spatial size; sown ones take precedence."""
    last: dict[tuple[int, ...], Candidate] = {}
    for tap in candidates:
        size = tap.shape[1:-1] if tap.shape[1:-1] != (1, 1) else ()
        sown_before = size in last and last[size].kind == "sown"
        if tap.rectified or tap.path == FEATURES or (sown_before and tap.kind != "sown"):
            continue
        last[size] = tap
    return [tap for size, tap in last.items() if size or len(last) == 1]


def marked(candidates: Iterable[Candidate]) -> dict[str, str]:
    """Returns {"layer1": path, …} of the marked candidates, the second argument of `Tapped`."""
    paths = [tap.path for tap in candidates if tap.marked]
    return {f"layer{index}": path for index, path in enumerate(paths, start=1)}


def _in_order(stored: list[tuple[str, ...]], ran: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Sorts stored keys by the order in which the modules ran.

    A sown array comes after the module that it follows in the store.
    """
    order, position = [key for key in ran if key in stored], 0
    for key in stored:
        if key in order:
            position = order.index(key) + 1
        else:
            order.insert(position, key)
            position += 1
    return order


def _lowest(model: Model, variables: Any, images: Any, paths: list[str]) -> dict[str, Any]:
    """Computes {path: smallest entry of that tap}."""

    @jax.jit
    def lowest(variables: Any, images: Any) -> dict[str, jax.Array]:
        named = {path: path for path in paths}
        taps = run_model(model, variables, images, train=False, tap_paths=named).taps
        return {path: tap.min() for path, tap in taps.items()}

    return jax.device_get(lowest(variables, images))
