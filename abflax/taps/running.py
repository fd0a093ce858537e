"""Sown taps, and the one way to run a network for its taps."""

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

COLLECTION = "intermediates"  # Flax leaves this one out of what `init` returns
FEATURES = "features"


def sow_tap(module: nn.Module, name: str, value: jax.Array) -> None:
    """Sows a pre-activation under its name, as a bare array. Call it from the root module.

    With Flax's default reducer the entry is a tuple that grows with every call; this one
    overwrites. Where nobody asks for the taps, a sow costs nothing.
    """
    module.sow(COLLECTION, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def sow_features(module: nn.Module, value: jax.Array) -> None:
    """Sows what the classifier reads, `[batch, features]`. Call it from the root module."""
    sow_tap(module, FEATURES, value)


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
      pullback: {tap: cotangent} -> the gradient with respect to the images, through that same
        pass, from the taps that are given; None where `run_model` was not asked for it.
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
    """A model that knows nothing of abflax, and where it is tapped.

    Goes wherever a module goes: `distill(Tapped(student, {"layer1": "Conv_0"}),
    Network(Tapped(teacher, {"layer1": "Block_2/norm"}), variables), data)`.

    Attributes:
      model: any Linen module that takes images.
      tap_paths: (name, path) of each tap; see `abflax.taps.run_model`. Given as a mapping.
    """

    model: nn.Module
    tap_paths: tuple[tuple[str, str], ...]

    def __init__(self, model: nn.Module, tap_paths: Mapping[str, str] | Iterable[Any]) -> None:
        paths = dict(tap_paths)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "tap_paths", tuple((k, paths[k]) for k in depth_order(paths)))


Model = nn.Module | Tapped
"""What can be run for its taps: a module that sows them, or one that is told where they are."""


def module_of(model: Model) -> nn.Module:
    """The Linen module itself."""
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
      model: any Linen module that takes images, or one with its taps (`Tapped`). It is told of
        `train` as `in_mode` says.
      variables: its `params` and, if it has any, `batch_stats`. Other collections are passed on
        unchanged.
      images: `[batch, height, width, channels]`, normalised.
      train: whether batch norms use the batch's statistics (and move the running ones).
      tap_paths: name -> path of a submodule, e.g. `{"layer1": "Block_2/BatchNorm_0"}`; that
        module's output becomes the tap. Or the path of what a module has sown into
        `intermediates`. What runs under `nn.scan` is tapped an iteration at a time, `"Scan_0/
        Conv_0[2]"` (`[2,0]` where scans nest), if the scan carries `intermediates` along axis 0.
        None: what the model has sown at its root with `sow_tap`.
      pullback: whether `Forward.pullback` is wanted; it cannot leave a `jax.jit`.
      dropout_key: of the random numbers called "dropout"; None: there are none.

    Raises:
      ValueError: if a path is nothing that ran, or ran more than once, or puts out something else
        than one array; or if the model does not put out one array of logits.

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
    wanted = dict(tap_paths or {})
    mutable = [COLLECTION] + (["batch_stats"] if train else [])
    rngs: dict[str, Any] = {} if dropout_key is None else {"rngs": {"dropout": dropout_key}}

    def run(images: jax.Array) -> tuple[dict[str, jax.Array], Forward]:
        calls: dict[tuple[str, ...], Any] = {}
        with nn.intercept_methods(watch(calls)):
            logits, state = module.apply(
                {key: value for key, value in variables.items() if key != COLLECTION},
                images,
                **mode,
                **rngs,
                mutable=mutable,
                # All or nothing: `nn.jit` keeps what it has traced, whatever was asked for then.
                capture_intermediates=bool(wanted),
            )
        if not isinstance(logits, jax.Array):
            raise InputError(
                f"{type(module).__name__} puts out a {type(logits).__name__}, where one array of "
                "logits is needed"
            )
        sown = state.get(COLLECTION, {})
        taps = (
            {name: tapped_at(sown, calls, path) for name, path in wanted.items()}
            if wanted
            else {k: v for k, v in sown.items() if k != FEATURES and isinstance(v, jax.Array)}
        )
        features = sown.get(FEATURES)
        forward = Forward(
            logits,
            {},
            features if isinstance(features, jax.Array) else None,
            state.get("batch_stats", variables.get("batch_stats", {})),
        )
        return {name: taps[name] for name in depth_order(taps)}, forward

    if not pullback:
        taps, forward = run(images)
        return dataclasses.replace(forward, taps=taps)
    taps, tangents, forward = jax.linearize(run, images, has_aux=True)

    def pull(cotangents: dict[str, jax.Array]) -> jax.Array:
        # Of the linear part only what leads to these taps: nothing behind the deepest is passed.
        some = lambda images: {name: tangents(images)[name] for name in cotangents}  # noqa: E731
        return jax.linear_transpose(some, images)(cotangents)[0]

    return dataclasses.replace(forward, taps=taps, pullback=pull)


def number_of_logits(model: Model, variables: Any, image_shape: tuple[int, ...]) -> int:
    """How many classes a model tells apart.

    Raises:
      ValueError: if it does not put out `[batch, classes]`.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jax.numpy.result_type(float))
    run = lambda v, x: run_model(model, v, x, train=False).logits  # noqa: E731
    shape = jax.eval_shape(run, variables, images).shape
    if len(shape) != 2:
        raise InputError(
            f"{type(module_of(model)).__name__} puts out {shape} for one image, where logits "
            "[batch, classes] are needed"
        )
    return shape[-1]


def depth_order(names: Iterable[str]) -> list[str]:
    """The names from the shallowest to the deepest: `layer2` comes before `layer10`."""

    def key(name: str) -> list[tuple[bool, int | str]]:
        parts = re.findall(r"\d+|\D+", name)
        return [(part.isdigit(), int(part) if part.isdigit() else part) for part in parts]

    return sorted(names, key=key)


# What Flax models call the switch between training and evaluation -> its value while training.
_SWITCHES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def in_mode(module: nn.Module, train: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A module in training or evaluation mode, and what its `__call__` is to be told of it.

    The switch is the argument `train`, `training`, `is_training`, `deterministic` or
    `use_running_average` of `__call__`, or else a field of that name. A module without any has
    one mode.

    Raises:
      ValueError: if `__call__` needs something else besides the images.
    """
    _, *arguments = inspect.signature(type(module).__call__).parameters.values()
    named = [each for each in arguments if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    told = {each.name: train == _SWITCHES[each.name] for each in named if each.name in _SWITCHES}
    images = next((each for each in named if each.name not in told), None)
    for each in named:
        if each is not images and each.name not in told and each.default is each.empty:
            raise InputError(
                f"{type(module).__name__} needs '{each.name}' besides the images, which nothing "
                "here gives it"
            )
    fields = {field.name for field in dataclasses.fields(module)} - set(told)
    switched: dict[str, Any] = {
        name: train == _SWITCHES[name] for name in _SWITCHES if name in fields
    }
    return (module.clone(**switched) if switched else module), told


def tap_shapes(model: Model, variables: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Name -> shape of each tap for a batch of one image, without computing anything."""
    dtype = jax.numpy.result_type(float)
    images = jax.ShapeDtypeStruct((1, *image_shape), dtype)
    run = jax.eval_shape(lambda v, x: run_model(model, v, x, train=False).taps, variables, images)
    return {name: tap.shape for name, tap in run.items()}
