"""What the engine knows of a model: `Side`, with one class for Linen and one for NNX modules."""

from __future__ import annotations

import abc
import contextvars
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from abflax.errors import InputError

if TYPE_CHECKING:
    from flax import nnx

Path = tuple[str, ...]

COLLECTION = "intermediates"  # a collection that Flax's `init` does not return
NORM_INPUT = "batch_norm_input"  # what a batch norm gets, sown where `RECORD_NORMS` is set
RECORD_NORMS: contextvars.ContextVar[bool] = contextvars.ContextVar("norms", default=False)
LOSSES = "losses"  # Flax's usual collection for losses that modules sow
_WEIGHTS = ("params", "batch_stats")
_PASSING = (COLLECTION, LOSSES, "perturbations")  # of one pass, not of the model

# The common names of the switch between training and evaluation in Flax models -> its value in
# training.
SWITCHES = dict.fromkeys(("train", "training", "is_train", "is_training"), True)
SWITCHES |= dict.fromkeys(("deterministic", "use_running_average", "inference"), False)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a model, before taps are chosen.

    Attributes:
      output: what the model returned.
      state: collection -> variables after the pass, of all collections but `params`.
      sown: path -> what was sown there, and `(*path, "__call__")` -> what the module returned; a
        tuple holds what several calls gave.
      calls: path of a module -> its class's name and the shapes that it returned, in the order in
        which modules ended. Inside `nn.scan` these are the shapes of one iteration.
      losses: the sum of the losses that modules sowed; None: there are none.
    """

    output: Any
    state: dict[str, Any]
    sown: dict[Path, Any]
    calls: dict[Path, tuple[str, list[tuple[int, ...]]]]
    losses: jax.Array | None


class Side(abc.ABC):
    """A model without its weights. Equal models have equal hashes, so runs share programs."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name of the model's class."""

    @property
    def digest(self) -> str | None:
        """Eight hexadecimal digits of its variables' names and shapes; None: fields say them."""
        return None

    @property
    @abc.abstractmethod
    def dtypes(self) -> dict[str, Any]:
        """The model's `dtype` and `param_dtype`, as far as it has such fields."""

    @property
    @abc.abstractmethod
    def synchronizes(self) -> bool:
        """Whether its batch norms can average over several devices."""

    @abc.abstractmethod
    def configured(self, fields: Mapping[str, Any]) -> Side:
        """Returns the model with other `dtype`, `param_dtype` and `axis_name`."""

    @abc.abstractmethod
    def init(self, key: jax.Array, images: jax.Array) -> dict[str, Any]:
        """Returns the variables of a new network by collection, `params` among them."""

    @abc.abstractmethod
    def apply(
        self,
        variables: Mapping[str, Any],
        images: jax.Array,
        *,
        train: bool,
        dropout_key: jax.Array | None,
        capture: bool,
    ) -> Pass:
        """Runs the model once; `capture` says whether to record what its modules return."""

    def merge(self, variables: Mapping[str, Any]) -> nnx.Module:
        """Makes an NNX module with these variables. Raises `InputError` for a Linen module."""
        raise InputError(f"{self.name} is a Linen module: use it with the network's variables")


def mode_arguments(kind: type, train: bool) -> dict[str, Any]:
    """Finds the arguments of `__call__` that set a mode.

    Raises:
      ValueError: if `__call__` needs more arguments than the images and a switch.
    """
    _, *parameters = inspect.signature(kind.__call__).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    arguments = {p.name: train == SWITCHES[p.name] for p in named if p.name in SWITCHES}
    images = next((p for p in named if p.name not in arguments), None)
    others = [p.name for p in named if p is not images and p.default is p.empty]
    if unmet := [name for name in others if name not in arguments]:
        raise InputError(
            f"{kind.__name__} needs '{unmet[0]}' besides the images, which abflax does not pass"
        )
    return arguments


def lasting(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out the collections that belong to one pass: what was sown, and random keys."""
    return {
        name: tree
        for name, tree in variables.items()
        if name in _WEIGHTS
        or (name not in _PASSING and not any(map(is_key, jax.tree.leaves(tree))))
    }


def sum_of_losses(values: Iterable[Any]) -> jax.Array | None:
    """Adds up sown losses: the mean of each array. None: there are none."""
    means = [jax.numpy.mean(loss) for value in values for loss in jax.tree.leaves(value)]
    return sum(means[1:], start=means[0]) if means else None


def is_key(leaf: Any) -> bool:
    """Whether an array holds JAX's typed random keys."""
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
