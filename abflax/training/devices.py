"""Which devices a run uses, and how arrays are laid out on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from abflax.errors import InputError

AXIS = "devices"
"""The mapped axis over which gradients, statistics and batch norms are averaged."""


def usable_devices(count: int | None = None) -> tuple[jax.Device, ...]:
    """The first `count` devices of each process, process by process; None: all.

    Raises:
      ValueError: if there are fewer, or the processes differ in their number of devices.
    """
    each = [jax.local_devices(process_index=index) for index in range(jax.process_count())]
    if len({len(devices) for devices in each}) > 1:
        raise InputError(f"the processes have {[*map(len, each)]} devices: they need as many each")
    if count is not None and not 1 <= count <= len(each[0]):
        raise InputError(f"there are {len(each[0])} devices here, so {count} cannot be used")
    return tuple(device for devices in each for device in devices[:count])


def local_devices(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """The devices that belong to this process."""
    return tuple(device for device in devices if device.process_index == jax.process_index())


def default_steps_per_dispatch(devices: Sequence[jax.Device], streamed: bool = False) -> int:
    """Returns 1 on CPUs; else 100, or 8 where each dispatch brings its own images.

    On CPUs a dispatch costs little, and in a loop XLA is slow for the gradients of convolutions
    other than `models.convolution.convolve`.
    """
    return 1 if devices[0].platform == "cpu" else 8 if streamed else 100


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Puts one logical copy of a tree on all of this process's devices.

    The result is an array that this process can read alone, and that `pmap` takes as this
    process's part of an array over all processes.
    """
    mesh = jax.sharding.Mesh(np.asarray(local_devices(devices)), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def shard_batch(batch: np.ndarray, devices: Sequence[jax.Device]) -> np.ndarray:
    """`[steps, batch, ...]` -> `[devices, steps, share, ...]`, the rows of this process's devices.

    Raises:
      ValueError: if the batch does not divide among the devices.
    """
    steps, size, *rest = batch.shape
    if size % len(devices):
        raise InputError(f"a batch of {size} does not divide among {len(devices)} devices")
    here = [device.process_index == jax.process_index() for device in devices]
    shares = batch.reshape(steps, len(devices), size // len(devices), *rest)
    return shares.swapaxes(0, 1)[here]
