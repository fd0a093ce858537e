"""Taps: a network's named pre-activations, and the one way to run a network for them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict

from abflax.errors import InputError, unknown

_COLLECTION = "intermediates"  # Flax leaves this one out of what `init` returns
_FEATURES = "features"


def sow_tap(module: nn.Module, name: str, value: jax.Array) -> None:
    """Sows a pre-activation under its name, as a bare array. Call it from the root module.

    With Flax's default reducer the entry is a tuple that grows with every call; this one
    overwrites. Where nobody asks for the taps, a sow costs nothing.
    """
    module.sow(_COLLECTION, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def sow_features(module: nn.Module, value: jax.Array) -> None:
    """Sows what the classifier reads, `[batch, features]`. Call it from the root module."""
    sow_tap(module, _FEATURES, value)


@struct.dataclass
class Forward:
    """What one pass of a network gives.

    Attributes:
      logits: `[batch, classes]`.
      taps: name -> pre-activations, `[batch, height, width, channels]` or `[batch, features]`,
        in `depth_order`.
      features: what the classifier reads, `[batch, features]`; None where the network does not
        say.
      batch_stats: the running statistics after the pass; those before it in evaluation mode,
        and {} for a network without any.
      pullback: {tap: cotangent} -> the gradient with respect to the images, `jax.vjp` of that
        same pass; None where `run_model` was not asked for it.
    """

    logits: jax.Array
    taps: dict[str, jax.Array]
    features: jax.Array | None
    batch_stats: Any
    pullback: Callable[[dict[str, jax.Array]], jax.Array] | None = struct.field(
        pytree_node=False, default=None
    )


def run_model(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    train: bool,
    tap_paths: Mapping[str, str] | None = None,
    pullback: bool = False,
) -> Forward:
    """Runs a network once and returns its logits, taps and running statistics.

    Args:
      model: any Linen module that takes images; `train` is passed on where its `__call__` has
        such an argument.
      variables: its `params` and, if it has any, `batch_stats`. Other collections are passed on
        unchanged.
      images: `[batch, height, width, channels]`, normalised.
      train: whether batch norms use the batch's statistics (and move the running ones).
      tap_paths: name -> path of a submodule, e.g. `{"layer1": "Block_2/BatchNorm_0"}`; that
        module's output becomes the tap. None: what the model has sown at its root with
        `sow_tap`.
      pullback: whether `Forward.pullback` is wanted; it cannot leave a `jax.jit`.

    Raises:
      ValueError: if a path is no submodule that ran, or one that ran more than once, or if it
        puts out something else than one array.
    """
    wanted = {name: tuple(path.split("/")) for name, path in (tap_paths or {}).items()}
    capture = (lambda module, method: module.path in wanted.values()) if wanted else False
    mutable = [_COLLECTION] + (["batch_stats"] if train else [])

    def run(images: jax.Array) -> tuple[dict[str, jax.Array], Forward]:
        logits, state = model.apply(
            {key: value for key, value in variables.items() if key != _COLLECTION},
            images,
            **train_argument(model, train),
            mutable=mutable,
            capture_intermediates=capture,
        )
        sown = state.get(_COLLECTION, {})
        taps = (
            {name: _output_of(sown, path, variables) for name, path in wanted.items()}
            if wanted
            else {k: v for k, v in sown.items() if k != _FEATURES and isinstance(v, jax.Array)}
        )
        stats = state.get("batch_stats", variables.get("batch_stats", {}))
        forward = Forward(logits, {}, sown.get(_FEATURES), stats)
        return {name: taps[name] for name in depth_order(taps)}, forward

    if not pullback:
        taps, forward = run(images)
        return forward.replace(taps=taps)
    taps, to_images, forward = jax.vjp(run, images, has_aux=True)
    return forward.replace(taps=taps, pullback=lambda cotangents: to_images(cotangents)[0])


def number_of_logits(model: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> int:
    """The size of the last dimension of a model's output."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jax.numpy.result_type(float))
    run = lambda v, x: run_model(model, v, x, train=False).logits  # noqa: E731
    return jax.eval_shape(run, variables, images).shape[-1]


def depth_order(names: Iterable[str]) -> list[str]:
    """The names from the shallowest to the deepest: `layer2` comes before `layer10`."""

    def key(name: str) -> list[tuple[bool, int | str]]:
        parts = re.findall(r"\d+|\D+", name)
        return [(part.isdigit(), int(part) if part.isdigit() else part) for part in parts]

    return sorted(names, key=key)


def train_argument(model: nn.Module, train: bool) -> dict[str, bool]:
    """{"train": train} for a module whose `__call__` has that argument, else {}."""
    takes = "train" in inspect.signature(type(model).__call__).parameters
    return {"train": train} if takes else {}


def tap_shapes(model: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """name -> shape of each tap for a batch of one image, without computing anything."""
    dtype = jax.numpy.result_type(float)
    images = jax.ShapeDtypeStruct((1, *image_shape), dtype)
    run = jax.eval_shape(lambda v, x: run_model(model, v, x, train=False).taps, variables, images)
    return {name: tap.shape for name, tap in run.items()}


def _output_of(
    sown: Mapping[str, Any], path: tuple[str, ...], variables: Mapping[str, Any]
) -> jax.Array:
    """The one array that the submodule at `path` has put out."""
    name, flat = "/".join(path), flatten_dict(sown)
    if (*path, "__call__") not in flat:
        modules = {
            "/".join(leaf[:depth])
            for leaf in flatten_dict(variables.get("params", {}))
            for depth in range(1, len(leaf))
        }
        raise unknown("tap path", name, modules)
    calls = flat[(*path, "__call__")]
    if len(calls) != 1 or not isinstance(calls[0], jax.Array):
        raise InputError(
            f"tap path '{name}': a tap is one array, but the module there ran {len(calls)} times "
            "or puts out something else"
        )
    return calls[0]
