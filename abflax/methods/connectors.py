"""Maps a student's taps to the teacher's shape: connectors for the width, pooling for positions.

A connector is a 1×1 convolution without bias and a batch norm. It is trained with the student, in
its phase alone, and kept for the analysis. Taps of equal width need none (Heo et al., AAAI 2019).
An extra head maps the student's features to logits over the teacher's classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.errors import InputError
from abflax.losses.features import common_sides, pooled_to
from abflax.models.batch_norm import BatchNorm
from abflax.models.layers import CONV_INIT, DENSE_INIT, ConfiguredModule
from abflax.taps import Forward

Positions = tuple[tuple[str, tuple[int, ...]], ...]
"""(layer, the positions it is pooled to), …"""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two networks, as a term's module is made for them.

    Attributes:
      layers: those that the term compares, the shallowest first.
      student: the shapes of its forward pass, for a batch of one.
      teacher: likewise; None where there is none.
      fields: the student's `dtype`, `param_dtype`, and the `axis_name`.
    """

    layers: tuple[str, ...]
    student: Forward
    teacher: Forward | None
    fields: Mapping[str, Any]

    @property
    def widths(self) -> tuple[tuple[str, int], ...]:
        """(layer, channels of the teacher) of each layer."""
        assert self.teacher is not None
        return tuple((layer, self.teacher.taps[layer].shape[-1]) for layer in self.layers)


class Connectors(ConfiguredModule):
    """Maps a network's taps to the teacher's widths, tap by tap.

    The 1×1 convolution is a matrix product over flattened positions. This gives the same numbers,
    is twice as fast on CPUs, and is a dense layer for taps `[batch, tokens, features]` and
    `[batch, features]`; the norm then averages over examples and tokens.

    Attributes:
      widths: (tap, channels of the teacher) of the taps to map; a tap that already has that many
        channels is left unchanged.
      equal: whether a tap that already has that many channels is mapped as well.
    """

    widths: tuple[tuple[str, int], ...]
    equal: bool = False

    @classmethod
    def between(cls, pair: Pair, equal: bool = False) -> Connectors:
        """Creates the connectors of the layers that a term compares."""
        return cls(pair.widths, equal, **pair.fields)

    @nn.compact
    def __call__(self, student: Forward, targets: Any, *, train: bool) -> tuple[Forward, Any]:
        """Maps the student's taps, each to `[..., channels of the teacher]`."""
        mapped = {
            name: self._connect(name, student.taps[name], width, train)
            for name, width in self.widths
        }
        return dataclasses.replace(student, taps={**student.taps, **mapped}), targets

    def _connect(self, name: str, tap: jax.Array, width: int, train: bool) -> jax.Array:
        if tap.shape[-1] == width and not self.equal:
            return tap
        flat = tap.reshape(-1, tap.shape[-1])
        flat = nn.Dense(
            width,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=CONV_INIT,
            name=f"{name}_conv",
        )(flat)
        flat = BatchNorm(
            not train,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
            name=f"{name}_norm",
        )(flat)
        return flat.reshape(*tap.shape[:-1], width)


def connect(variables: Mapping[str, Any], forward: Forward) -> Forward:
    """Maps the taps of a pass by connectors that were kept after a run, in evaluation mode.

    Args:
      variables: `params` and `batch_stats`, as `abflax.Result.connectors` has them.
      forward: of the student.

    Raises:
      ValueError: if they are those of other taps.
    """
    kernels = {
        name.removesuffix("_conv"): tree["kernel"]
        for name, tree in variables["params"].items()
        if "kernel" in tree
    }
    for name, kernel in kernels.items():
        if name not in forward.taps or forward.taps[name].shape[-1] != kernel.shape[0]:
            raise InputError(f"the connectors' {name} of width {kernel.shape[0]} is no tap here")
    widths = tuple((name, kernel.shape[1]) for name, kernel in kernels.items())
    connected, _ = Connectors(widths, equal=True).apply(variables, forward, None, train=False)
    return connected


class ExtraHead(nn.Module):
    """A second classifier on a network's features, over the teacher's classes.

    Attributes:
      num_classes: of the teacher.
      dtype: of the computation; None: that of features and parameters.
      param_dtype: of the parameters.
    """

    num_classes: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @classmethod
    def between(cls, pair: Pair) -> ExtraHead:
        """Creates the head. Raises `ValueError` if there is no teacher."""
        if pair.teacher is None:
            raise InputError("an extra head is over the classes of a teacher, which is not given")
        fields = {name: value for name, value in pair.fields.items() if name != "axis_name"}
        return cls(pair.teacher.logits.shape[-1], **fields)

    @nn.compact
    def __call__(self, student: Forward, targets: Any, *, train: bool) -> tuple[Forward, Any]:
        """Replaces the student's logits by this head's, `[batch, num_classes]`.

        Raises:
          ValueError: if the network does not sow its features.
        """
        del train
        if student.features is None:
            raise InputError("an extra head reads the features, which the student does not sow")
        head = nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=DENSE_INIT,
            name="head",
        )
        return dataclasses.replace(student, logits=head(student.features)), targets


def require_same_taps(student: Iterable[str], teacher: Iterable[str]) -> None:
    """Raises `InputError` if two networks do not have the same taps in the same order."""
    student, teacher = list(student), list(teacher)
    if student != teacher and sorted(student) == sorted(teacher):
        raise InputError(
            f"the student's taps are in the order {', '.join(student)}, the teacher's in the order "
            f"{', '.join(teacher)}: give both from the shallowest to the deepest"
        )
    if student != teacher:
        raise InputError(
            f"the student's taps {', '.join(student) or 'none'} are not the teacher's "
            f"{', '.join(teacher) or 'none'}; choose layers that both have"
        )


def require_same_positions(
    student: Mapping[str, tuple[int, ...]],
    teacher: Mapping[str, tuple[int, ...]],
    layers: tuple[str, ...],
) -> None:
    """Raises `InputError` if a layer's height or width differs between the networks."""
    for layer in layers:
        ours, theirs = student[layer][1:-1], teacher[layer][1:-1]
        if ours != theirs:
            raise InputError(
                f"{layer}: the student's positions {_by(ours)} are not the teacher's "
                f"{_by(theirs)}; the method compares neuron by neuron"
            )


def common_positions(
    student: Mapping[str, tuple[int, ...]],
    teacher: Mapping[str, tuple[int, ...]],
    layers: tuple[str, ...],
) -> Positions:
    """Finds the layers whose positions differ, and what the larger map is pooled to.

    Returns:
      (layer, (height, width)) or (layer, (tokens,)) of each of these layers, see `common_sides`.

    Raises:
      ValueError: if neither map can be pooled to the other.
    """
    common = []
    for layer in layers:
        ours, theirs = student[layer][1:-1], teacher[layer][1:-1]
        if ours == theirs:
            continue
        sides = common_sides(ours, theirs)
        if sides is None:
            raise InputError(
                f"{layer}: of the student's positions {_by(ours)} and the teacher's {_by(theirs)}, "
                "neither can be pooled to the other"
            )
        common.append((layer, sides))
    return tuple(common)


def pool_positions(forward: Forward, positions: Positions) -> Forward:
    """Average-pools the named taps of a forward pass to the given sides, pullback included."""
    sides, inner = dict(positions), forward.pullback

    def pool(taps: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: pooled_to(tap, sides[name]) if name in sides else tap
            for name, tap in taps.items()
        }

    def pullback(cotangents: dict[str, jax.Array]) -> jax.Array:
        assert inner is not None
        pooled = {name: forward.taps[name] for name in cotangents}
        return inner(*jax.linear_transpose(pool, pooled)(cotangents))

    if not positions:
        return forward
    pooled = dataclasses.replace(forward, taps=pool(forward.taps))
    return pooled if inner is None else dataclasses.replace(pooled, pullback=pullback)


def _by(positions: tuple[int, ...]) -> str:
    return "×".join(map(str, positions)) or "(none)"
