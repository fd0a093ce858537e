"""The teacher only once: the targets of every view of every example, computed once and kept.

A boolean is kept as a bit, anything else as it is, so a run on kept targets has the losses of one
that asks the teacher at every step (bits may differ for neurons within rounding of zero).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import psutil

from abflax import parallel
from abflax.errors import InputError
from abflax.networks import digest
from abflax.phase import Phase
from abflax.processes import highest

_MOST_ENTRIES = 4  # kinds of targets, such as the phases of a method have

# What was computed in this process: seeds, margins and students of one teacher share it.
_kept: dict[tuple[Any, ...], Any] = {}


def require_keepable(phases: Sequence[Phase], views: int | None) -> None:
    """Raises `InputError` where targets depend on more than teacher, image and view."""
    if views is None:
        raise InputError("targets are kept for given views of each image: say how many (views)")
    for phase in phases:
        if phase.teacher_batch_statistics:
            raise InputError(
                f"in phase {phase.name} of this protocol the teacher's batch norms use the batch's "
                "statistics, so its targets depend on the batch and cannot be kept"
            )


def keep_targets(
    program: parallel.Program,
    teacher_params: Any,
    teacher_stats: Any,
    data: dict[str, jax.Array],
    views: int,
    batch_size: int,
    devices: tuple[jax.Device, ...],
) -> Any:
    """A phase's targets for all views of all examples, on the devices.

    They are what `abflax.parallel.Program.targets` gives. Computed once in a process for one
    teacher, data set and kind of targets, whatever margin, student or seed. The four that were used
    last stay.

    Args:
      data: the images and labels, as `abflax.parallel.compile_steps` takes them.
      views: how many of an image.
      batch_size: of the teacher's pass.

    Returns:
      A pytree of `[examples · views, ...]`; the v-th view of an example is row
      example · views + v.

    Raises:
      ValueError: if they do not fit into the memory that is free.
    """
    arguments = (teacher_params, teacher_stats, data)
    one = np.zeros((len(devices), batch_size // len(devices)), np.int32)
    computation = program.targets.lower(*arguments, one, one).as_text()
    key = (hashlib.sha256(computation.encode()).hexdigest(), digest(arguments), views, devices)
    if key not in _kept:
        while len(_kept) >= _MOST_ENTRIES:
            del _kept[next(iter(_kept))]
        rows = _ask(program, arguments, one, views, devices[0])
        _kept[key] = parallel.replicate(rows, devices)
    _kept[key] = _kept.pop(key)  # the last used stands last
    return _kept[key]


def _ask(
    program: parallel.Program,
    arguments: tuple[Any, ...],
    one: np.ndarray,
    views: int,
    device: jax.Device,
) -> Any:
    """The targets of all views of all examples, in host memory, batch by batch like `one`."""
    examples = len(arguments[-1]["labels"])
    total = examples * views
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((total, *leaf.shape[2:]), leaf.dtype),
        jax.eval_shape(program.targets, *arguments, one, one),
    )
    _require_room(shapes, examples, views, device)
    rows = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    for start in range(0, total, one.size):
        row = np.arange(start, start + one.size, dtype=np.int32) % total
        found = program.targets(*arguments, *np.divmod(row.reshape(one.shape), views))
        for all_, new in zip(jax.tree.leaves(rows), jax.tree.leaves(found), strict=True):
            all_[row] = np.asarray(new).reshape(one.size, *new.shape[2:])
    return rows


def _require_room(shapes: Any, examples: int, views: int, device: jax.Device) -> None:
    taken = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    free = _free_bytes(device)
    if highest(taken > free):  # of the processes; none goes on without the others
        _kept.clear()  # those of other runs, which they may still hold
        free = _free_bytes(device)
    if highest(taken > free):
        raise InputError(
            f"the targets of {views} views of {examples:,} images take {taken / 1e9:.3g} GB, where "
            f"{free / 1e9:.3g} GB are free: {int(free / (taken / views))} views would fit"
        )


def _free_bytes(device: jax.Device) -> float:
    """Of the device; of the host, where that is the device (it holds a copy while they move)."""
    if device.platform == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what glibc holds though it was freed is free too
        return psutil.virtual_memory().available / 2
    statistics = device.memory_stats() or {}
    return 0.9 * statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)
