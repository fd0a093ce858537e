"""Finds what can be tapped in a model, and which taps follow the paper's rule."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax.errors import InputError, brief, require_instances
from abflax.taps.dataflow import Dataflow
from abflax.taps.paths import scanned
from abflax.taps.running import (
    FEATURES,
    Model,
    Tapped,
    is_nnx,
    logits_of,
    require_model,
    run_model,
    side_of,
    split_nnx,
)
from abflax.taps.sides import COLLECTION, Path

_NO_OUTPUT = (
    "the pre-activation, such as a residual sum, is no module's output; this comes after the "
    "activation and fires exactly where it is positive: right for a teacher; in a student, add "
    "self.sow('intermediates', 'pre', x) before the activation and tap that"
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A possible tap.

    Attributes:
      path: for `run_model`'s `tap_paths`.
      shape: of the tap, for the given batch.
      kind: the module's class, or "sown".
      rectified: whether no entry can be negative, which means that a ReLU (or a sigmoid) came
        before and this is not a pre-activation.
      marked: whether the paper's rule would tap it.
      note: what to know about it.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    rectified: bool
    marked: bool = False
    note: str = ""


def suggest(model: Model, variables: Any = None, images: Any = None) -> tuple[Candidate, ...]:
    """Lists the possible taps of a model, in the order in which its modules run.

    The marked ones follow the paper's rule: the last pre-activation of each spatial size (or number
    of tokens), which is what the last non-linearity there reads. Where no module returns it and
    nothing sowed it, as with the residual sums of most ResNets, what comes after the non-linearity
    is marked, with a `note`. Maps of one position count as features. If there are no maps, the
    deepest features are marked. Nothing is computed: arrays are followed through the traced
    computation.

    Args:
      model: any Linen or NNX module that takes images.
      variables: its variables, arrays or shapes; None: those of an NNX module.
      images: `[batch, …]`, an array or a `jax.ShapeDtypeStruct`.

    Returns:
      The candidates; `marked` turns them into `tap_paths`.

    Examples:
      >>> from flax import linen as nn
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
    require_model("model", model)
    require_instances({"variables": (variables, Mapping | None)})
    module = model.model if isinstance(model, Tapped) else model
    if is_nnx(module):
        module, own = split_nnx(module)
        variables = own if variables is None else variables
    _require_given(variables, images)
    side = side_of(module)
    keys: list[tuple[Path, str, tuple[int, ...]]] = []

    def trace(variables: Any, images: Any) -> list[jax.Array]:
        passed = side.apply(variables, images, train=False, dropout_key=None, capture=True)
        logits = logits_of(side.name, passed.output, getattr(model, "output", None))
        taps = []
        for key in _in_order(list(passed.sown), [(*path, "__call__") for path in passed.calls]):
            value = passed.sown[key]
            values = value if isinstance(value, tuple) else (value,)
            one = len(values) == 1 and isinstance(values[0], jax.Array)
            inside = passed.calls.get(key[:-2], ("", ()))[0]
            heads = one and values[0].ndim == 4 and "Attention" in inside
            is_output = one and values[0] is logits
            if key != ("__call__",) and one and not is_output and not heads:
                kind = passed.calls.get(key[:-1], ("module", ()))[0]
                kind = kind if key[-1] == "__call__" else "sown"
                keys.append((key, kind, scanned(passed.sown, passed.calls, key[:-1])))
                taps.append(values[0])
        return taps

    variables = {name: tree for name, tree in variables.items() if name != COLLECTION}
    flow = Dataflow(trace, variables, images)
    rectified = flow.never_negative()
    candidates, arrays = [], []
    # The taps in one scan are listed iteration by iteration.
    for (_, lengths), group in itertools.groupby(
        zip(keys, flow.outputs, strict=True), lambda pair: (pair[0][0][0], pair[0][2])
    ):
        taps = list(group)
        for iteration in np.ndindex(*lengths):
            suffix = f"[{','.join(map(str, iteration))}]" if iteration else ""
            for (key, kind, _), array in taps:
                path = "/".join(key[:-1] if key[-1] == "__call__" else key) + suffix
                shape = flow.shapes[array][len(iteration) :]
                if len(shape) in (2, 3, 4):
                    candidates.append(Candidate(path, shape, kind, array in rectified))
                    arrays.append(array)
    notes = _chosen(candidates, arrays, flow)
    return tuple(
        dataclasses.replace(tap, marked=index in notes, note=notes.get(index, ""))
        for index, tap in enumerate(candidates)
    )


def _require_given(variables: Any, images: Any) -> None:
    if variables is None:
        raise InputError("a Linen module needs its variables: suggest(model, variables, images)")
    if getattr(images, "ndim", 0) < 2:
        raise InputError(f"images must be a batch of them, [batch, …], not {brief(images)}")


def _chosen(
    candidates: Sequence[Candidate], arrays: Sequence[int], flow: Dataflow
) -> dict[int, str]:
    """Finds index -> note of what the last non-linearity of each size reads, or else puts out."""
    last: dict[tuple[int, ...], tuple[int, str]] = {}
    usable = [index for index, tap in enumerate(candidates) if tap.path != FEATURES]
    for activation in flow.activations():
        shape = flow.shapes[activation.before]
        if len(shape) not in (2, 3, 4):
            continue
        before = [i for i in usable if flow.inner(arrays[i]) == activation.before]
        after = [
            i for i in usable
            if candidates[i].rectified and candidates[i].shape == shape
            and flow.derives(flow.inner(arrays[i]), activation.before)
        ]  # fmt: skip
        # Sown arrays take precedence, and in a scan the last iteration.
        before.sort(key=lambda i: (candidates[i].kind != "sown", -_iteration(candidates[i])))
        size = shape[1:-1] if set(shape[1:-1]) != {1} else ()
        last.pop(size, None)
        if before and not candidates[before[0]].rectified:
            last[size] = (before[0], "")
        elif after:
            last[size] = (after[0], _NO_OUTPUT)
    return {index: note for size, (index, note) in last.items() if size or len(last) == 1}


def _iteration(tap: Candidate) -> int:
    """The number of the iteration in a path's "[…]"; 0 without one."""
    digits = tap.path.partition("[")[2].strip("]").replace(",", "")
    return int(digits or 0)


def marked(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Returns {"layer1": path, …} of the marked candidates, the second argument of `Tapped`."""
    paths = [tap.path for tap in candidates if tap.marked]
    return {f"layer{index}": path for index, path in enumerate(paths, start=1)}


def moved_statistics(
    model: Model,
    variables: Any,
    shape: tuple[int, ...],
    *,
    train: bool,
    dropout_key: jax.Array | None = None,
) -> list[str]:
    """Finds which variables besides `params` a pass changes, without computing anything."""
    state = {name: tree for name, tree in variables.items() if name != "params"}
    flat = flatten_dict(state, sep="/")

    def after(flat: dict[str, Any], params: Any, images: Any) -> list[Any]:
        own = {"params": params, **unflatten_dict(flat, sep="/")}
        forward = run_model(model, own, images, train=train, dropout_key=dropout_key)
        changed = flatten_dict(dict(forward.state), sep="/")
        return [changed[name] for name in sorted(flat)]

    images = jax.ShapeDtypeStruct(shape, jax.numpy.result_type(float))
    flow = Dataflow(after, flat, variables["params"], images)
    names = sorted(flat)
    return [n for n, i, o in zip(names, flow.inputs, flow.outputs, strict=False) if i != o]


def rectified_taps(model: Model, variables: Any, shape: tuple[int, ...]) -> list[str]:
    """Finds the taps without negative entries, so that they are no pre-activations."""
    order: list[str] = []

    def taps(variables: Any, images: Any) -> list[jax.Array]:
        found = run_model(model, variables, images, train=False).taps
        order[:] = found
        return list(found.values())

    images = jax.ShapeDtypeStruct(shape, jax.numpy.result_type(float))
    flow = Dataflow(taps, variables, images)
    positive = flow.never_negative()
    return [name for name, array in zip(order, flow.outputs, strict=True) if array in positive]


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
