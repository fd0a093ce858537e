"""Connectors: from a student's tap to the teacher's width, trained with the student.

A 1×1 convolution without bias and a batch norm, thrown away after the phase that trained it. Left
out where the widths are equal already (Heo et al., AAAI 2019, section "Distillation of hidden
layers").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.errors import InputError, unknown

# N(0, √(2 / C_out)): for a 1×1 kernel, the published N(0, √(2 / (k²·C_out))).
_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Connectors(nn.Module):
    """Maps a network's taps to given widths, tap by tap.

    The 1×1 convolution is written as a matrix product over the last axis: the same numbers,
    twice as fast on CPUs, and right for `[batch, features]` taps too.

    Attributes:
      widths: (tap, channels of the teacher) for every tap that is passed on; a tap that has that
        many channels already passes unchanged.
    """

    widths: tuple[tuple[str, int], ...]
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, taps: Mapping[str, jax.Array], *, train: bool) -> dict[str, jax.Array]:
        """The named taps, each `[..., channels of the teacher]`."""
        return {name: self._connect(name, taps[name], width, train) for name, width in self.widths}

    def _connect(self, name: str, tap: jax.Array, width: int, train: bool) -> jax.Array:
        if tap.shape[-1] == width:
            return tap
        tap = nn.Dense(
            width,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_INIT,
            name=f"{name}_conv",
        )(tap)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
            name=f"{name}_norm",
        )(tap)


def shared_layers(
    student: Iterable[str], teacher: Iterable[str], layers: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """The taps that a term compares: those chosen, or all, which both networks must have.

    Raises:
      ValueError: if a chosen layer is missing, or the networks do not have the same taps.
    """
    student, teacher = sorted(student), sorted(teacher)
    for layer in layers or ():
        if layer not in student or layer not in teacher:
            raise unknown("layer", layer, set(student) & set(teacher))
    if layers is None and student != teacher:
        raise InputError(
            f"the student's taps {', '.join(student) or 'none'} are not the teacher's "
            f"{', '.join(teacher) or 'none'}: choose layers that both have"
        )
    return tuple(layers) if layers is not None else tuple(student)


def connect(
    student: Mapping[str, tuple[int, ...]],
    teacher: Mapping[str, tuple[int, ...]],
    layers: tuple[str, ...],
    **fields: Any,
) -> Connectors:
    """Connectors for the chosen layers.

    Args:
      student: tap -> shape, with a leading batch dimension.
      teacher: the same of the teacher.
      layers: which of them to connect.
      **fields: `dtype`, `param_dtype` and `axis_name` of `Connectors`.

    Raises:
      ValueError: if a layer's positions (height and width) differ between the networks.
    """
    for layer in layers:
        ours, theirs = student[layer][1:-1], teacher[layer][1:-1]
        if ours != theirs:
            raise InputError(
                f"{layer}: the student's positions {_by(ours)} are not the teacher's "
                f"{_by(theirs)}; activation boundaries are compared neuron by neuron"
            )
    return Connectors(tuple((layer, teacher[layer][-1]) for layer in layers), **fields)


def _by(positions: tuple[int, ...]) -> str:
    return "×".join(map(str, positions)) or "(none)"
