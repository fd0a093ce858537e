"""From a student's taps to the teacher's shape: connectors for the width, pooling for positions.

A connector is a 1×1 convolution without bias and a batch norm, trained with the student and
thrown away after the phase that trained it. Left out where the widths are equal already
(Heo et al., AAAI 2019). An extra head does the same for logits over the teacher's own classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.errors import InputError
from abflax.losses.features import average_pooled
from abflax.models.batch_norm import BatchNorm
from abflax.taps import Forward

# N(0, √(2 / C_out)): for a 1×1 kernel, the published N(0, √(2 / (k²·C_out))).
_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default


class Connectors(nn.Module):
    """Maps a network's taps to given widths, tap by tap.

    The 1×1 convolution is written as a matrix product over flattened positions: the same numbers,
    twice as fast on CPUs, and right for `[batch, features]` taps too.

    Attributes:
      widths: (tap, channels of the teacher) for every tap that is passed on; a tap that has that
        many channels already passes unchanged.
      dtype, param_dtype: of the computation (None: that of taps and parameters), and of the
        parameters.
      axis_name: the mapped axis over which batch norm averages; None: this device alone.
    """

    widths: tuple[tuple[str, int], ...]
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, student: Forward, *, train: bool) -> Forward:
        """The pass with its named taps mapped, each `[..., channels of the teacher]`."""
        mapped = {
            name: self._connect(name, student.taps[name], width, train)
            for name, width in self.widths
        }
        return dataclasses.replace(student, taps={**student.taps, **mapped})

    def _connect(self, name: str, tap: jax.Array, width: int, train: bool) -> jax.Array:
        if tap.shape[-1] == width:
            return tap
        flat = tap.reshape(-1, tap.shape[-1])
        flat = nn.Dense(
            width,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_INIT,
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


class ExtraHead(nn.Module):
    """A second classifier on a network's features, over other classes than its own.

    Attributes:
      num_classes: the teacher's.
      dtype, param_dtype: as those of `Connectors`.
    """

    num_classes: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, student: Forward, *, train: bool) -> Forward:
        """The pass with this head's logits, `[batch, num_classes]`.

        Raises:
          ValueError: where the network does not say what its features are.
        """
        del train
        if student.features is None:
            raise InputError("an extra head reads the features, which the student does not sow")
        head = nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_DENSE_INIT,
            name="head",
        )
        return dataclasses.replace(student, logits=head(student.features))


def connect(
    teacher: Mapping[str, tuple[int, ...]], layers: tuple[str, ...], **fields: Any
) -> Connectors:
    """Connectors for the chosen layers.

    Args:
      teacher: tap -> shape, with a leading batch dimension.
      layers: which of them to connect.
      **fields: `dtype`, `param_dtype` and `axis_name` of `Connectors`.
    """
    return Connectors(tuple((layer, teacher[layer][-1]) for layer in layers), **fields)


def require_same_taps(student: Iterable[str], teacher: Iterable[str]) -> None:
    """Raises `InputError` where two networks do not have the same taps."""
    student, teacher = sorted(student), sorted(teacher)
    if student != teacher:
        raise InputError(
            f"the student's taps {', '.join(student) or 'none'} are not the teacher's "
            f"{', '.join(teacher) or 'none'}: choose layers that both have"
        )


def require_same_positions(
    student: Mapping[str, tuple[int, ...]],
    teacher: Mapping[str, tuple[int, ...]],
    layers: tuple[str, ...],
) -> None:
    """Raises `InputError` where a layer's height or width differs between the networks."""
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
) -> tuple[tuple[str, tuple[int, int]], ...]:
    """(layer, (height, width)) to which the larger map of a layer is pooled, where they differ.

    Raises:
      ValueError: where neither map's sides are whole multiples of the other's.
    """
    common = []
    for layer in layers:
        small, large = sorted((student[layer][1:-1], teacher[layer][1:-1]))
        if small == large:
            continue
        if len(small) != 2 or len(large) != 2 or large[0] % small[0] or large[1] % small[1]:
            raise InputError(
                f"{layer}: of the student's positions {_by(student[layer][1:-1])} and the "
                f"teacher's {_by(teacher[layer][1:-1])}, neither can be pooled to the other"
            )
        common.append((layer, small))
    return tuple(common)


def pool_positions(forward: Forward, positions: tuple[tuple[str, tuple[int, int]], ...]) -> Forward:
    """A pass whose named taps are average-pooled to the given sides, pullback included."""
    sides, inner = dict(positions), forward.pullback

    def pool(taps: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: average_pooled(tap, sides[name]) if name in sides else tap
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
