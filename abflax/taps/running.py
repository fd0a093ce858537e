"""Sows taps, and runs a network for its taps."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import struct

from abflax.errors import InputError
from abflax.taps.paths import tapped_at, watch

COLLECTION = "intermediates"  # a collection that Flax's `init` does not return
FEATURES = "features"


def sow_tap(module: nn.Module, name: str, value: jax.Array) -> None:
    """Sows a pre-activation under its name, as a bare array. Call it from the root module.

    With Flax's default reducer the entry would be a tuple that grows with every call; this one
    overwrites it. It costs nothing if the collection is not mutable.
    """
    module.sow(COLLECTION, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def sow_features(module: nn.Module, value: jax.Array) -> None:
    """Sows the classifier's input, `[batch, features]`. Call it from the root module."""
    sow_tap(module, FEATURES, value)


@struct.dataclass
class Forward:
    """The results of one forward pass of a network.

    Attributes:
      logits: `[batch, classes]`.
      taps: name -> pre-activations, `[batch, height, width, channels]` or `[batch, features]`,
        in `depth_order`.
      features: the classifier's input, `[batch, features]`; None if the network does not sow it.
      batch_stats: the running statistics after the pass, which does not change them in evaluation
        mode; {} for a network without any.
      pullback: {tap: cotangent} -> the gradient of these taps with respect to the images, through
        the same pass; None unless `run_model` was called with `pullback=True`.
    """

    logits: jax.Array
    taps: dict[str, jax.Array]
    features: jax.Array | None
    batch_stats: Any
    pullback: Callable[[dict[str, jax.Array]], jax.Array] | None = struct.field(
        pytree_node=False, default=None
    )


@dataclasses.dataclass(frozen=True, init=False)
class Tapped:
    """A model that does not sow its taps, with the paths of its taps.

    Use it in place of a module: `distill(Tapped(student, {"layer1": "Conv_0"}),
    Network(Tapped(teacher, {"layer1": "Block_2/norm"}), variables), data)`.

    Args:
      model: any Linen module that takes images.
      tap_paths: name -> path of each tap; see `abflax.taps.run_model`.

    Attributes:
      model: the module.
      tap_paths: (name, path) of each tap, in `depth_order`.
    """

    model: nn.Module
    tap_paths: tuple[tuple[str, str], ...]

    def __init__(self, model: nn.Module, tap_paths: Mapping[str, str] | Iterable[Any]) -> None:
        paths = dict(tap_paths)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "tap_paths", tuple((k, paths[k]) for k in depth_order(paths)))


Model = nn.Module | Tapped
"""A module that sows its taps, or a `Tapped` one."""


def module_of(model: Model) -> nn.Module:
    """Returns the Linen module of a model."""
    return model.model if isinstance(model, Tapped) else model


def run_model(
    model: Model,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    train: bool,
    tap_paths: Mapping[str, str] | None = None,
    pullback: bool = False,
    dropout_key: jax.Array | None = None,
) -> Forward:
    """Runs a network once and returns its logits, taps and running statistics.

    Args:
      model: any Linen module that takes images, or a `Tapped` one. Its mode is set by `in_mode`.
      variables: its `params` and, if it has any, `batch_stats`. Other collections are passed on
        unchanged.
      images: `[batch, height, width, channels]`, normalized.
      train: whether batch norms use the batch's statistics (and update the running ones).
      tap_paths: name -> path of a submodule, e.g. `{"layer1": "Block_2/BatchNorm_0"}`, whose
        output becomes the tap; or the path of an array that was sown into `intermediates`. Under
        `nn.scan` a path names one iteration, `"Scan_0/Conv_0[2]"` (`[2,0]` in nested scans); the
        scan must stack `intermediates` along axis 0. None: the taps that the model sows at its
        root with `sow_tap`.
      pullback: whether to compute `Forward.pullback`, which cannot be returned from a `jax.jit`.
      dropout_key: for the random numbers named "dropout"; None: there are none.

    Raises:
      ValueError: if nothing at a path ran, or it ran more than once or returned something else
        than one array; or if the model does not return one array of logits.

    Examples:
      >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(10)])
      >>> images = jax.numpy.ones((2, 64))
      >>> variables = model.init(jax.random.key(0), images)
      >>> paths = {"layer1": "layers_0"}
      >>> forward = run_model(model, variables, images, train=False, tap_paths=paths)
      >>> forward.logits.shape, forward.taps["layer1"].shape
      ((2, 10), (2, 16))
    """
    if isinstance(model, Tapped) and tap_paths is None:
        tap_paths = dict(model.tap_paths)
    module, mode = in_mode(module_of(model), train)
    paths = dict(tap_paths or {})

    def run(images: jax.Array) -> tuple[dict[str, jax.Array], Forward]:
        calls: dict[tuple[str, ...], Any] = {}
        with nn.intercept_methods(watch(calls)):
            logits, state = module.apply(
                {key: value for key, value in variables.items() if key != COLLECTION},
                images,
                **mode,
                rngs=None if dropout_key is None else {"dropout": dropout_key},
                mutable=[COLLECTION, "batch_stats"] if train else [COLLECTION],
                # Not a filter of the paths: `nn.jit` would reuse a trace with an earlier filter.
                capture_intermediates=bool(paths),
            )
        if not isinstance(logits, jax.Array):
            raise InputError(
                f"{type(module).__name__} returns a {type(logits).__name__}, where one array of "
                "logits is needed"
            )
        sown = state.get(COLLECTION, {})
        arrays = {name: value for name, value in sown.items() if isinstance(value, jax.Array)}
        features = arrays.pop(FEATURES, None)
        taps = {k: tapped_at(sown, calls, path) for k, path in paths.items()} if paths else arrays
        statistics = state.get("batch_stats", variables.get("batch_stats", {}))
        ordered = {name: taps[name] for name in depth_order(taps)}
        return ordered, Forward(logits, {}, features, statistics)

    if not pullback:
        taps, forward = run(images)
        return dataclasses.replace(forward, taps=taps)
    taps, tangents, forward = jax.linearize(run, images, has_aux=True)

    def pull(cotangents: dict[str, jax.Array]) -> jax.Array:
        # Only these taps are transposed, so nothing beyond the deepest of them is computed.
        part = lambda images: {name: tangents(images)[name] for name in cotangents}  # noqa: E731
        return jax.linear_transpose(part, images)(cotangents)[0]

    return dataclasses.replace(forward, taps=taps, pullback=pull)


def abstract_forward(
    model: Model,
    variables: Any,
    shape: tuple[int, ...],
    *,
    train: bool = False,
    dropout_key: jax.Array | None = None,
) -> Forward:
    """Finds the shapes that `run_model` returns for images of a shape, without computing."""
    run = lambda v, x: run_model(model, v, x, train=train, dropout_key=dropout_key)  # noqa: E731
    return jax.eval_shape(run, variables, jax.ShapeDtypeStruct(shape, jax.numpy.result_type(float)))


def number_of_logits(model: Model, variables: Any, image_shape: tuple[int, ...]) -> int:
    """Finds the number of classes of a model's logits, without computing anything.

    Raises:
      ValueError: if the model does not return `[batch, classes]`.
    """
    shape = abstract_forward(model, variables, (1, *image_shape)).logits.shape
    if len(shape) != 2:
        raise InputError(
            f"{type(module_of(model)).__name__} returns {shape} for one image, where logits "
            "[batch, classes] are needed"
        )
    return shape[-1]


def depth_order(names: Iterable[str]) -> list[str]:
    """Sorts names from the shallowest to the deepest; `layer2` comes before `layer10`."""

    def key(name: str) -> list[tuple[bool, int | str]]:
        parts = re.findall(r"\d+|\D+", name)
        return [(part.isdigit(), int(part) if part.isdigit() else part) for part in parts]

    return sorted(names, key=key)


# The common names of the switch between training and evaluation in Flax models -> its value in
# training.
_SWITCHES = dict.fromkeys(("train", "training", "is_training"), True)
_SWITCHES |= dict.fromkeys(("deterministic", "use_running_average"), False)


def in_mode(module: nn.Module, train: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Sets a module's fields to a mode; returns it, and the arguments of that mode for `__call__`.

    The switch is the argument `train`, `training`, `is_training`, `deterministic` or
    `use_running_average` of `__call__`, or else a field of that name. A module without such a
    switch has one mode.

    Raises:
      ValueError: if `__call__` needs more arguments than the images and a switch.
    """
    _, *parameters = inspect.signature(type(module).__call__).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    arguments = {p.name: train == _SWITCHES[p.name] for p in named if p.name in _SWITCHES}
    images = next((p for p in named if p.name not in arguments), None)
    others = [p.name for p in named if p is not images and p.default is p.empty]
    if unmet := [name for name in others if name not in arguments]:
        raise InputError(
            f"{type(module).__name__} needs '{unmet[0]}' besides the images, which abflax does not "
            "pass"
        )
    fields = {field.name for field in dataclasses.fields(module)} - set(arguments)
    switched: dict[str, Any] = {k: train == v for k, v in _SWITCHES.items() if k in fields}
    return (module.clone(**switched) if switched else module), arguments


def tap_shapes(model: Model, variables: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Finds {name: shape} of the taps for a batch of one image, without computing anything."""
    taps = abstract_forward(model, variables, (1, *image_shape)).taps
    return {name: tap.shape for name, tap in taps.items()}
