"""Training one run with several processes, by `jax.distributed`.

Every process makes every step, on its devices' share of the batch, and holds the whole state. The
processes differ in their disks, clocks and signals. So only process 0 accesses the disk, and
`on_process_zero` broadcasts its return value or exception to all (also a restored checkpoint, so
only process 0 needs the workdir). Decisions that depend on a clock or a signal are shared by
`max_over_processes` at the same step. With one process both are trivial.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from abflax.errors import InputError, LostError
from abflax.runtime.jax_checks import require_devices
from abflax.runtime.rendezvous import require_together

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

SILENCE = 30
"""Seconds without a heartbeat after which a process counts as dead."""

# Words in the errors of CPU and GPU collectives and of JAX's service when a process is gone.
_GONE = re.compile(r"gloo|nccl|connection|coordination|heartbeat", re.IGNORECASE)


def initialize_distributed(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    task: str = "",
) -> None:
    """Connects this process to the others of its run. Call it before any other use of JAX.

    It waits for the other processes, at most five minutes. If all arguments are None, JAX takes
    them from the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU).

    Args:
      coordinator: "HOST:PORT" of process 0, with a free port there.
      processes: the number of processes.
      process: the number of this process, from 0.
      task: what all processes must have been told to do, in words.

    Raises:
      ValueError: if the arguments do not fit together, here or in another process, the port is
        taken, or JAX finds no cluster.
      LostError: if another process ends before all are connected, or does not come.
    """
    missing = [argument is None for argument in (coordinator, processes, process)]
    if any(missing) and not all(missing):
        raise InputError("coordinator, processes and process are given together, or none of them")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(f"the coordinator must be HOST:PORT, not '{coordinator}'")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise InputError(f"of {processes} processes none has the number {process}")
    if coordinator is not None and processes is not None and process is not None:
        require_together(coordinator, processes, process, task)
    # Else JAX would handle SIGTERM itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
        )
    except ValueError as error:
        raise InputError(f"JAX knows no cluster here ({error}): give HOST:PORT,N,I") from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise LostError(f"the processes of this run cannot connect: {reason}") from error
    require_devices()
    # CPU devices connect at their first collective, which times out after 30 s. Here all processes
    # are at the same point; later one may load or compile for longer than another.
    devices = jax.devices()
    sharding = NamedSharding(Mesh(np.asarray(devices), ("all",)), PartitionSpec("all"))
    zeros = np.zeros(len(devices), np.int32)
    array = jax.make_array_from_callback(zeros.shape, sharding, lambda index: zeros[index])
    with detect_lost_process():
        multihost_utils.process_allgather(array, tiled=True)
        max_over_processes(0)


def is_first() -> bool:
    """Tells whether this is process 0, which accesses the disk and prints."""
    return jax.process_index() == 0


def on_process_zero(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Makes a function run in process 0 only.

    All processes must call it at the same point. Process 0's return value or exception is
    broadcast to all processes, so it must be picklable.
    """

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if jax.process_count() == 1:
            return function(*args, **kwargs)
        message = b""
        if is_first():
            try:
                message = pickle.dumps((function(*args, **kwargs), None))
            except Exception as error:
                _broadcast(pickle.dumps((None, error)))
                raise
        value, exception = pickle.loads(_broadcast(message))
        if exception is not None:
            raise exception
        return value

    return call


def max_over_processes(number: int) -> int:
    """Returns the largest number of all processes, which must call this at the same point."""
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def require_same(what: str, text: str) -> None:
    """Raises `InputError` in all processes if a process's text differs from that of process 0."""
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(own)
    differs = (digests != digests[0]).any(axis=1)
    if differs.any():
        raise InputError(f"process {int(differs.argmax())} differs from process 0 in {what}")


@contextmanager
def detect_lost_process() -> Iterator[None]:
    """Converts JAX's errors about a lost process to `LostError`, inside a `with` block.

    Raises:
      LostError: if another process was lost.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _GONE.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostError(
            f"another process of this run was lost ({reason}); start all processes again to "
            "resume from the last checkpoint"
        ) from error


def _broadcast(message: bytes) -> bytes:
    """Returns process 0's message in all processes."""
    size = multihost_utils.broadcast_one_to_all(np.int32(len(message)))
    data = np.frombuffer(message, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return multihost_utils.broadcast_one_to_all(data).tobytes()
