"""A cache of the teacher's targets: every view of every example, computed once.

A boolean takes one bit, anything else its own size. A run on cached targets has the losses of one
that runs the teacher at every step (bits may differ for neurons within rounding of zero).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import psutil

from abflax.errors import InputError
from abflax.models.network import digest
from abflax.runtime.distributed import max_over_processes
from abflax.training.devices import local_devices, replicate
from abflax.training.parallel import InputSpec, PhaseProgram

_MOST_ENTRIES = 4  # kinds of targets, such as the phases of a method have

# What this process has computed: seeds, margins and students of one teacher share it.
_cache: dict[tuple[Any, ...], Any] = {}


def cached_targets(
    program: PhaseProgram,
    spec: InputSpec,
    teacher_params: Any,
    teacher_stats: Any,
    images: jax.Array,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, batches: None,
) -> Any:
    """A phase's targets for all views of all examples, on the devices.

    They are computed once in a process for one teacher, data set and kind of targets, whatever the
    margin, student or seed. The four that were used last are kept.

    Args:
      program: of the phase.
      spec: says which devices, and how many views of an image there are.
      teacher_params: the teacher's weights.
      teacher_stats: its running statistics.
      images: `[examples, height·width·channels]`, as they lie on the devices.
      batch_size: of the teacher's pass.
      progress: told before the first batch and after each one, if anything is computed, how many
        of how many are done.

    Returns:
      A pytree of `[examples · views, ...]`; the v-th view of an example is row
      example · views + v.

    Raises:
      ValueError: if they do not fit into the memory that is free.
    """
    views, devices = spec.preprocessing.shown_views, local_devices(spec.devices)
    arguments = (teacher_params, teacher_stats, images)
    batch = np.zeros((len(devices), batch_size // len(devices)), np.int32)
    computation = program.targets.lower(*arguments, batch, batch).as_text()
    key = (hashlib.sha256(computation.encode()).hexdigest(), digest(arguments), views, devices)
    if key not in _cache:
        while len(_cache) >= _MOST_ENTRIES:
            del _cache[next(iter(_cache))]
        rows = _compute(program, arguments, batch, views, devices[0], progress)
        _cache[key] = replicate(rows, devices)
    _cache[key] = _cache.pop(key)  # the last used comes last
    return _cache[key]


def _compute(
    program: PhaseProgram,
    arguments: tuple[Any, ...],
    batch: np.ndarray,
    views: int,
    device: jax.Device,
    progress: Callable[[int, int], None],
) -> Any:
    """The targets of all views of all examples, in host memory, in batches shaped like `batch`."""
    examples = len(arguments[-1])
    total = examples * views
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((total, *leaf.shape[2:]), leaf.dtype),
        jax.eval_shape(program.targets, *arguments, batch, batch),
    )
    _require_free_memory(shapes, examples, views, device)
    rows = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    starts = range(0, total, batch.size)
    progress(0, len(starts))
    for index, start in enumerate(starts):
        row = np.arange(start, start + batch.size, dtype=np.int32) % total
        targets = program.targets(*arguments, *np.divmod(row.reshape(batch.shape), views))
        for all_, new in zip(jax.tree.leaves(rows), jax.tree.leaves(targets), strict=True):
            all_[row] = np.asarray(new).reshape(batch.size, *new.shape[2:])
        progress(index + 1, len(starts))
    return rows


def _require_free_memory(shapes: Any, examples: int, views: int, device: jax.Device) -> None:
    """Raises `InputError` where targets do not fit, on any process."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    free = _free_bytes(device)
    if max_over_processes(needed > free):
        _cache.clear()  # other runs' targets may still take memory
        free = _free_bytes(device)
    if max_over_processes(needed > free):
        raise InputError(
            f"the targets of {views} views of {examples:,} images take {needed / 1e9:.3g} GB, "
            f"where {free / 1e9:.3g} GB are free: {int(free / (needed / views))} views would fit"
        )


def _free_bytes(device: jax.Device) -> float:
    """Free memory of the device; half of the host's on a CPU, which briefly holds two copies."""
    if device.platform == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc holds memory that was freed
        return psutil.virtual_memory().available / 2
    statistics = device.memory_stats() or {}
    return 0.9 * statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)
