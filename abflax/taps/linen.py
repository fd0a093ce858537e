"""Runs Linen modules."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import FrozenDict
from flax.errors import ModifyScopeVariableError
from flax.traverse_util import flatten_dict

from abflax.errors import InputError
from abflax.taps.sides import (
    COLLECTION,
    LOSSES,
    SWITCHES,
    Pass,
    Side,
    lasting,
    mode_arguments,
    sum_of_losses,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Linen(Side):
    """A Linen module.

    Attributes:
      module: the module.
      axis_name: the mapped axis over which norms with an axis of their own average; None: none.
    """

    module: nn.Module
    axis_name: str | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Linen) or self.axis_name != other.axis_name:
            return False
        try:
            return self.module is other.module or bool(self.module == other.module)
        except ValueError:  # arrays among the fields have no truth value
            return False

    def __hash__(self) -> int:
        try:
            return hash(self.module)
        except TypeError:  # some field has no hash: equality tells such modules apart
            return hash(type(self.module))

    @property
    def name(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    @property
    def dtypes(self) -> dict[str, Any]:
        """See `Side`."""
        names = ("dtype", "param_dtype")
        return {k: getattr(self.module, k) for k in names if hasattr(self.module, k)}

    @property
    def synchronizes(self) -> bool:
        """See `Side`."""
        return hasattr(self.module, "axis_name")

    def configured(self, fields: Mapping[str, Any]) -> Linen:
        """See `Side`."""
        names = {field.name for field in dataclasses.fields(self.module)} & fields.keys()
        module = _frozen(self.module.clone(**{name: fields[name] for name in names}))
        return Linen(module, fields["axis_name"])

    def init(self, key: jax.Array, images: jax.Array) -> dict[str, Any]:
        """See `Side`."""
        module, arguments = _in_mode(self.module, False)
        with self._intercepted({}):
            # Modules that are bridged from NNX ask for the stream when they are made.
            variables = module.init({"params": key, "dropout": key}, images, **arguments)
        return {"params": {}, "batch_stats": {}, **lasting(nn.unbox(variables))}

    def apply(
        self,
        variables: Mapping[str, Any],
        images: jax.Array,
        *,
        train: bool,
        dropout_key: jax.Array | None,
        capture: bool,
    ) -> Pass:
        """See `Side`."""
        module, arguments = _in_mode(self.module, train)
        lasting_ = {name: tree for name, tree in variables.items() if name != COLLECTION}
        state = {name: tree for name, tree in lasting_.items() if name != "params"}
        calls: dict[tuple[str, ...], Any] = {}
        try:
            with self._intercepted(calls):
                output, changed = module.apply(
                    lasting_,
                    images,
                    **arguments,
                    rngs=None if dropout_key is None else {"dropout": dropout_key},
                    mutable=[COLLECTION, LOSSES, "batch_stats", *state] if train else [COLLECTION],
                    # Not a filter of the paths: `nn.jit` would reuse a trace of another filter.
                    capture_intermediates=capture,
                )
        except ModifyScopeVariableError as error:
            raise InputError(
                f"{self.name} changes its variables in evaluation mode: "
                f"{str(error).split(' (')[0].strip()}"
            ) from error
        state |= {name: tree for name, tree in changed.items() if name not in (COLLECTION, LOSSES)}
        sown = flatten_dict(dict(changed.get(COLLECTION, {})))
        losses = sum_of_losses(changed.get(LOSSES, {}).values())
        return Pass(output, state, sown, calls, losses)

    @contextlib.contextmanager
    def _intercepted(self, calls: dict[tuple[str, ...], Any]) -> Iterator[None]:
        """Records the calls of modules, and sets the axis of norms that name one themselves."""

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            fields = {field.name for field in dataclasses.fields(module)}
            if "axis_name" in fields and isinstance(module.axis_name, str):
                object.__setattr__(module, "axis_name", self.axis_name)
            outputs = call(*args, **kwargs)
            if context.method_name == "__call__":
                leaves = jax.tree.leaves(outputs)
                shapes = [leaf.shape for leaf in leaves if isinstance(leaf, jax.Array)]
                calls[module.path] = (type(module).__name__, shapes)
            return outputs

        with nn.intercept_methods(intercept):
            yield


def _in_mode(module: nn.Module, train: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Sets a module's fields to a mode; returns it, and the arguments of `__call__`.

    The switch is an argument of `__call__` with a name in `SWITCHES`, or else a field. A module
    without such a switch has one mode.
    """
    arguments = mode_arguments(type(module), train)
    fields = {field.name for field in dataclasses.fields(module)} - set(arguments)
    switched: dict[str, Any] = {k: train == v for k, v in SWITCHES.items() if k in fields}
    return (module.clone(**switched) if switched else module), arguments


def _frozen(value: Any) -> Any:
    """Copies what the caller could change among a module's fields, at every depth.

    Lists become tuples and dicts `FrozenDict`, as Flax does it; so most modules have a hash.
    """
    if isinstance(value, nn.Module):
        changed = {}
        for field in dataclasses.fields(value):
            if field.init and field.name not in ("parent", "name"):
                old = getattr(value, field.name)
                new = _frozen(old)
                if new is not old:
                    changed[field.name] = new
        return value.clone(**changed) if changed else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        items = tuple(map(_frozen, value))
        same = isinstance(value, tuple) and all(map(lambda a, b: a is b, items, value))
        return value if same else items
    if type(value) is dict:
        return FrozenDict({key: _frozen(item) for key, item in value.items()})
    try:
        hash(value)
    except TypeError:
        return copy.deepcopy(value)
    return value
