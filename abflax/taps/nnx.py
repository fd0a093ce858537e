"""Runs NNX modules: the graph is static, and the variables are told apart by their types."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import InvalidRngError
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax.errors import InputError
from abflax.taps.sides import (
    LOSSES,
    NORM_INPUT,
    RECORD_NORMS,
    SWITCHES,
    Pass,
    Path,
    Side,
    mode_arguments,
    sum_of_losses,
)

_OUTPUT = "__call__"
_FLAGS = ("training", "is_train", "is_training", "inference")  # those that `train()` does not set
_PASSING = (nnx.RngState, nnx.Intermediate)  # what is not part of a network's variables


@dataclasses.dataclass
class _Record:
    """What the modules and random streams of a pass put down."""

    calls: dict[Path, tuple[str, list[tuple[int, ...]]]] = dataclasses.field(default_factory=dict)
    sown: dict[Path, None] = dataclasses.field(default_factory=dict)  # their paths in order
    random: bool = False


_RECORD: contextvars.ContextVar[_Record] = contextvars.ContextVar("record")


@dataclasses.dataclass(frozen=True, eq=False)
class Nnx(Side):
    """An NNX module without its weights.

    Attributes:
      kind: the module's class.
      graph: the module's static part.
      template: (path, variable) of all its variables, with shapes in place of arrays.
      takes_dtype: whether one of its parts has a `dtype`.
      dtype: what its modules compute in; None: what they have.
      axis_name: the mapped axis over which its batch norms average; None: none.
    """

    kind: type[nnx.Module]
    graph: nnx.GraphDef[Any]
    template: tuple[tuple[tuple[Any, ...], Any], ...]
    takes_dtype: bool = True
    dtype: Any = None
    axis_name: str | None = None

    @classmethod
    def split(cls, module: nnx.Module) -> tuple[Nnx, dict[str, Any]]:
        """Splits a module, which is not changed, into the model and its variables."""
        graph, state = nnx.split(module)
        flat = list(nnx.to_flat_state(state))
        variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
        for path, leaf in flat:
            if not isinstance(leaf, _PASSING):
                variables.setdefault(_collection(leaf), {})[_names(path)] = _value(leaf)
        template = tuple((path, _with_value(leaf, _shapes(_value(leaf)))) for path, leaf in flat)
        variables = {name: unflatten_dict(tree) for name, tree in variables.items()}
        takes_dtype = any(_takes_dtype(part) for _, part in nnx.iter_graph(module))
        return cls(type(module), graph, template, takes_dtype), variables

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nnx) and self._key() == other._key() and self.graph == other.graph

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        leaves = tuple((path, str(_value(leaf))) for path, leaf in self.template)
        return self.kind, leaves, self.dtype, self.axis_name

    @property
    def name(self) -> str:
        """The name of the module's class."""
        return self.kind.__name__

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that identify names, types and shapes of the variables."""
        leaves = [(path, _collection(leaf), str(_value(leaf))) for path, leaf in self.template
                  if not isinstance(leaf, _PASSING)]  # fmt: skip
        return hashlib.sha256(repr(leaves).encode()).hexdigest()[:8]

    @property
    def dtypes(self) -> dict[str, Any]:
        """See `Side`."""
        dtype = {"dtype": self.dtype} if self.takes_dtype else {}
        return dtype | {"param_dtype": jnp.result_type(float)}

    @property
    def synchronizes(self) -> bool:
        """See `Side`."""
        return True

    def configured(self, fields: Mapping[str, Any]) -> Nnx:
        """See `Side`."""
        return dataclasses.replace(self, dtype=fields.get("dtype"), axis_name=fields["axis_name"])

    def init(self, key: jax.Array, images: jax.Array) -> dict[str, Any]:
        """Returns zeros: an NNX module always comes with its weights."""
        del key, images
        variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
        for path, leaf in self.template:
            if not isinstance(leaf, _PASSING):
                variables.setdefault(_collection(leaf), {})[_names(path)] = _zeros(_value(leaf))
        return {name: unflatten_dict(tree) for name, tree in variables.items()}

    def merge(self, variables: Mapping[str, Any], key: jax.Array | None = None) -> nnx.Module:
        """Makes a module with these variables, and with new random streams."""
        flat = {
            (collection, *path): value
            for collection, tree in variables.items()
            for path, value in flatten_dict(tree).items()
        }
        state: list[tuple[Any, Any]] = []
        for index, (path, leaf) in enumerate(self.template):
            if isinstance(leaf, nnx.RngKey):
                value = _keys(jax.random.key(0) if key is None else key, index, _value(leaf))
            elif isinstance(leaf, _PASSING):
                value = jax.tree.map(_zeros, _value(leaf))
            else:
                name = (_collection(leaf), *_names(path))
                if name not in flat:
                    raise InputError(f"the weights for {self.name}: '{'/'.join(name)}' is missing")
                value = flat[name]
            state.append((path, _with_value(leaf, value)))
        module: nnx.Module = nnx.merge(self.graph, nnx.from_flat_state(state))
        return module

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
        arguments = mode_arguments(self.kind, train)
        module = self.merge(variables, dropout_key)
        before = {path: _value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(module))}
        module.train() if train else module.eval()
        flags = {name: train == SWITCHES[name] for name in _FLAGS}
        module.set_attributes(**flags, raise_if_not_found=False)
        self._prepare(module)
        record = _Record()
        token = _RECORD.set(record)
        try:
            output, *captured = nnx.capture(
                lambda module, images: module(images, **arguments), nnx.Intermediate, _losses()
            )(module, images)
        finally:
            _RECORD.reset(token)
        if record.random and dropout_key is None:
            raise InvalidRngError(f"{self.name} draws random numbers")
        found, losses = ({_names(k): _value(v) for k, v in nnx.to_flat_state(each)}
                         for each in captured)  # fmt: skip
        state: dict[str, Any] = {}
        for path, leaf in nnx.to_flat_state(nnx.state(module)):
            if isinstance(leaf, nnx.Intermediate):
                if _value(leaf) is not before.get(path):
                    found[_names(path)] = _value(leaf)
            elif not isinstance(leaf, (nnx.RngState, nnx.Param)) and path in before:
                state.setdefault(_collection(leaf), {})[_names(path)] = _value(leaf)
        state = {"batch_stats": {}} | {k: unflatten_dict(tree) for k, tree in state.items()}
        sown = {path: found[path] for path in record.sown if path in found} | found
        del capture  # it costs nothing
        return Pass(output, state, sown, record.calls, sum_of_losses(losses.values()))

    def _prepare(self, module: nnx.Module) -> None:
        """Sets dtype and axis of a module's parts, and makes them record what they return."""
        for path, part in list(nnx.iter_graph(module)):
            if isinstance(part, nnx.RngStream):
                object.__setattr__(part, "__class__", _recording_stream(type(part)))
            if not isinstance(part, nnx.Module):
                continue
            if self.dtype is not None and _takes_dtype(part):
                setattr(part, "dtype", self.dtype)  # noqa: B010
            if isinstance(part, nnx.BatchNorm) or isinstance(getattr(part, "axis_name", 0), str):
                setattr(part, "axis_name", self.axis_name)  # noqa: B010
            if callable(part):
                setattr(part, "abflax_path", _names(path))  # noqa: B010
                object.__setattr__(part, "__class__", _recording(type(part)))


def _takes_dtype(part: Any) -> bool:
    return isinstance(part, nnx.Module) and hasattr(part, "dtype")


def _names(path: tuple[Any, ...]) -> Path:
    return tuple(map(str, path))


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _collection(leaf: Any) -> str:
    """The collection of a variable, by its type."""
    if isinstance(leaf, nnx.Param):
        return "params"
    if isinstance(leaf, nnx.BatchStat):
        return "batch_stats"
    return type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "arrays"


def _shapes(value: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), value)


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _keys(key: jax.Array, index: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The keys of one random stream, or of a stack of streams."""
    typed = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    key = jax.random.fold_in(key, index)
    shape = like.shape if typed else like.shape[:-1]
    key = jax.random.split(key, shape) if shape else key
    return key if typed else jax.random.key_data(key)


def _losses() -> type[nnx.Variable[Any]]:
    return nnx.variable_type_from_name(LOSSES, allow_register=True)


@functools.cache
def _recording(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The class of modules of that kind that sow and record what they return."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            RECORD_NORMS.get()
            and args
            and all(
                isinstance(getattr(self, name, None), nnx.BatchStat) for name in ("mean", "var")
            )
        ):
            self.sow(nnx.Intermediate, NORM_INPUT, args[0])
        outputs = kind.__call__(self, *args, **kwargs)
        self.sow(nnx.Intermediate, _OUTPUT, outputs)
        leaves = jax.tree.leaves(outputs)
        shapes = [leaf.shape for leaf in leaves if isinstance(leaf, jax.Array)]
        _RECORD.get().calls[self.abflax_path] = (kind.__name__, shapes)
        return outputs

    def sow(self: Any, variable_type: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        _RECORD.get().sown[(*self.abflax_path, name)] = None
        return kind.sow(self, variable_type, name, value, *args, **kwargs)

    def keep(self: Any, name: str, value: Any) -> None:
        if isinstance(value, nnx.Intermediate):
            _RECORD.get().sown[(*self.abflax_path, name)] = None
        kind.__setattr__(self, name, value)

    functions = {"__call__": call, "sow": sow, "__setattr__": keep, "__module__": kind.__module__}
    made: type[nnx.Module] = type(kind)(kind.__name__, (kind,), functions)  # type: ignore[misc]
    return made


@functools.cache
def _recording_stream(kind: type[nnx.RngStream]) -> type[nnx.RngStream]:
    """The class of random streams that record that they were used."""

    def call(self: Any) -> jax.Array:
        _RECORD.get().random = True
        return kind.__call__(self)

    functions = {"__call__": call, "__module__": kind.__module__}
    made: type[nnx.RngStream] = type(kind)(kind.__name__, (kind,), functions)  # type: ignore[misc]
    return made
