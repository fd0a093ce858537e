"""Sows taps, and runs a network for its taps."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import jax
from flax import linen as nn
from flax import struct

from abflax.errors import InputError, brief
from abflax.taps.linen import Linen
from abflax.taps.paths import tapped_at
from abflax.taps.sides import COLLECTION, Side

if TYPE_CHECKING:
    from flax import nnx

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
      taps: name -> pre-activations, `[batch, height, width, channels]`, `[batch, tokens, features]`
        or `[batch, features]`, in the order of `Tapped`, or in which they were sown. (A function
        that `jax.jit` transforms returns them sorted by name.)
      features: the classifier's input, `[batch, features]`; None if the network does not sow it.
      state: collection -> variables after the pass, of all collections but `params`. A pass in
        evaluation mode does not change them.
      losses: the sum of the losses that modules sowed into `losses`; None: there are none.
      views: name -> the pass on images that were made from these (`abflax.methods.views`).
      pullback: {tap: cotangent} -> the gradient of these taps with respect to the images, through
        the same pass; None unless `run_model` was called with `pullback=True`.
    """

    logits: jax.Array
    taps: dict[str, jax.Array]
    features: jax.Array | None
    state: Any
    losses: jax.Array | None = None
    views: dict[str, Forward] = struct.field(default_factory=dict)
    pullback: Callable[[dict[str, jax.Array]], jax.Array] | None = struct.field(
        pytree_node=False, default=None
    )

    @property
    def batch_stats(self) -> Any:
        """The running statistics after the pass; {} for a network without any."""
        return self.state.get("batch_stats", {})


@dataclasses.dataclass(frozen=True, init=False)
class Tapped:
    """A model with the paths of its taps, and with what of its output are the logits.

    Use it in place of a module: `distill(Tapped(student, {"layer1": "Conv_0"}),
    Network(Tapped(teacher, {"layer1": "Block_2/norm"}), variables), data)`.

    Args:
      model: any Linen or NNX module that takes images.
      tap_paths: name -> path of each tap, from the shallowest to the deepest; see
        `abflax.taps.run_model`.
      output: what the model returns -> logits. None: the output itself, or the first of a tuple, or
        the field or entry `logits`.

    Attributes:
      model: the module.
      tap_paths: (name, path) of each tap, in the order given.
      output: as above.
    """

    model: Any
    tap_paths: tuple[tuple[str, str], ...]
    output: Callable[[Any], jax.Array] | None

    def __init__(
        self,
        model: nn.Module | nnx.Module | Side,
        tap_paths: Mapping[str, str] | Iterable[Any] = (),
        output: Callable[[Any], jax.Array] | None = None,
    ) -> None:
        if isinstance(model, Tapped):
            raise InputError("the model is Tapped already")
        require_model("model", model)
        if output is not None and not callable(output):
            raise InputError(
                f"output is a function, what a model returns -> logits, not {brief(output)}"
            )
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "tap_paths", _pairs(tap_paths))
        object.__setattr__(self, "output", output)


def _pairs(tap_paths: Any) -> tuple[tuple[str, str], ...]:
    """(name, path) of each tap. Raises `InputError` for what names no paths."""
    pairs = tap_paths.items() if isinstance(tap_paths, Mapping) else tap_paths
    is_listed = isinstance(pairs, Iterable) and not isinstance(pairs, str)
    listed = tuple(pairs) if is_listed else (tap_paths,)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in listed):
        raise InputError(
            "taps are paths by name, such as {'layer1': 'Conv_0'} or marked(suggest(…)), not "
            f"{brief(tap_paths)}"
        )
    return listed


Model: TypeAlias = "nn.Module | nnx.Module | Side | Tapped"
"""A module that sows its taps, or a `Tapped` one; `Side` is how the engine holds a module."""


def is_nnx(model: object) -> TypeGuard[nnx.Module]:
    """Whether a model is an NNX module. `flax.nnx`, which is slow to import, is left alone."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def split_nnx(module: nnx.Module) -> tuple[Side, dict[str, Any]]:
    """Splits an NNX module, which is not changed, into the model and its variables."""
    from abflax.taps.nnx import Nnx

    return Nnx.split(module)


def require_model(what: str, model: object) -> None:
    """Raises `InputError` if what was given is not a `Model`."""
    if not is_nnx(model) and not isinstance(model, nn.Module | Side | Tapped):
        raise InputError(
            f"{what} must be a Linen or NNX module, or a Tapped one, not {brief(model)}"
        )


def side_of(model: Model) -> Side:
    """Returns what the engine knows of a model, without its taps."""
    inner = model.model if isinstance(model, Tapped) else model
    if is_nnx(inner):
        return split_nnx(inner)[0]
    return Linen(inner) if isinstance(inner, nn.Module) else typing.cast(Side, inner)


def with_side(model: Model, side: Side) -> Side | Tapped:
    """Returns the model with another module in place of its own."""
    return Tapped(side, model.tap_paths, model.output) if isinstance(model, Tapped) else side


def module_of(model: Model) -> nn.Module:
    """Returns the Linen module of a model."""
    side = side_of(model)
    assert isinstance(side, Linen)
    return side.module


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
    """Runs a network once and returns its logits, taps and state.

    The mode is set by an argument of `__call__` or a field of that name: `train`, `training`,
    `is_train`, `is_training`, `deterministic`, `use_running_average` or `inference`; for NNX
    modules also by `train()` and `eval()`.

    Args:
      model: any Linen or NNX module that takes images, or a `Tapped` one.
      variables: its `params` and, if it has any, `batch_stats` and other collections.
      images: `[batch, height, width, channels]`, normalized.
      train: whether batch norms use the batch's statistics (and update the running ones).
      tap_paths: name -> path of a submodule, e.g. `{"layer1": "Block_2/BatchNorm_0"}`, whose
        output becomes the tap; or the path of an array that was sown into `intermediates`, or that
        an NNX module keeps as `nnx.Intermediate`. Under `nn.scan` a path names one iteration,
        `"Scan_0/Conv_0[2]"` (`[2,0]` in nested scans); the scan must stack `intermediates` along
        axis 0. None: the taps that the model sows at its root with `sow_tap`.
      pullback: whether to compute `Forward.pullback`, which cannot be returned from a `jax.jit`.
      dropout_key: for the random numbers named "dropout" (NNX: all streams); None: there are none.

    Raises:
      ValueError: if nothing at a path ran, or it ran more than once or returned something else
        than one array; or if the model does not return logits.

    Examples:
      >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(10)])
      >>> images = jax.numpy.ones((2, 64))
      >>> variables = model.init(jax.random.key(0), images)
      >>> paths = {"layer1": "layers_0"}
      >>> forward = run_model(model, variables, images, train=False, tap_paths=paths)
      >>> forward.logits.shape, forward.taps["layer1"].shape
      ((2, 10), (2, 16))
    """
    output = None
    if isinstance(model, Tapped):
        output = model.output
        tap_paths = dict(model.tap_paths) if tap_paths is None else tap_paths
    side, paths, order = side_of(model), dict(tap_paths or {}), list[str]()

    def run(images: jax.Array) -> tuple[dict[str, jax.Array], Forward]:
        passed = side.apply(
            variables, images, train=train, dropout_key=dropout_key, capture=bool(paths)
        )
        logits = logits_of(side.name, passed.output, output)
        sown = {path[0]: value for path, value in passed.sown.items() if len(path) == 1}
        taps = {
            name: value
            for name, value in sown.items()
            if name != "__call__" and isinstance(value, jax.Array)
        }
        features = taps.pop(FEATURES, None)
        if paths:
            taps = {k: tapped_at(passed.sown, passed.calls, path) for k, path in paths.items()}
        order[:] = taps
        return taps, Forward(logits, {}, features, passed.state, passed.losses)

    if not pullback:
        taps, forward = run(images)
        return dataclasses.replace(forward, taps=taps)
    taps, tangents, forward = jax.linearize(run, images, has_aux=True)

    def pull(cotangents: dict[str, jax.Array]) -> jax.Array:
        # Only these taps are transposed, so nothing beyond the deepest of them is computed.
        part = lambda images: {name: tangents(images)[name] for name in cotangents}  # noqa: E731
        return jax.linear_transpose(part, images)(cotangents)[0]

    taps = {name: taps[name] for name in order}
    return dataclasses.replace(forward, taps=taps, pullback=pull)


def logits_of(name: str, output: Any, choose: Callable[[Any], jax.Array] | None) -> jax.Array:
    """Finds the logits in what a model returned."""
    logits = output
    if choose is not None:
        logits = choose(output)
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, tuple) and output:
        logits = output[0]
    if not isinstance(logits, jax.Array):
        raise InputError(
            f"{name} returns a {type(output).__name__}, where one array of logits is needed: "
            "say which with Tapped(model, taps, output=lambda out: …)"
        )
    return logits


def abstract_forward(
    model: Model,
    variables: Any,
    shape: tuple[int, ...],
    *,
    train: bool = False,
    dropout_key: jax.Array | None = None,
) -> Forward:
    """Finds the shapes that `run_model` returns for images of a shape, without computing."""
    order: list[str] = []

    def run(variables: Any, images: jax.Array) -> Forward:
        forward = run_model(model, variables, images, train=train, dropout_key=dropout_key)
        order[:] = forward.taps
        return forward

    images = jax.ShapeDtypeStruct(shape, jax.numpy.result_type(float))
    forward = jax.eval_shape(run, variables, images)
    return dataclasses.replace(forward, taps={name: forward.taps[name] for name in order})


def number_of_logits(model: Model, variables: Any, image_shape: tuple[int, ...]) -> int:
    """Finds the number of classes of a model's logits, without computing anything.

    Raises:
      ValueError: if the model does not return `[batch, classes]`.
    """
    shape = abstract_forward(model, variables, (1, *image_shape)).logits.shape
    if len(shape) != 2:
        raise InputError(
            f"{side_of(model).name} returns {shape} for one image, where logits [batch, classes] "
            "are needed"
        )
    return shape[-1]


def tap_shapes(model: Model, variables: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Finds {name: shape} of the taps for a batch of one image, without computing anything."""
    taps = abstract_forward(model, variables, (1, *image_shape)).taps
    return {name: tap.shape for name, tap in taps.items()}
