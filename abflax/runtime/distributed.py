"""Several processes at one run, by `jax.distributed`: what one does for all, and how they agree.

Every process makes every step, each on its devices' share of the batch, and holds the whole state;
what differs between them is the disk, the clock and signals. So what touches the disk is done
`once`, by process 0, and what it gave or raised is given and raised in all (a checkpoint that is
read reaches them this way, too: only process 0 needs to see the workdir); and what a clock or a
signal asks of one, all take from `highest` at the same step. With one process, both are the plain
call and the plain number.
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

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

SILENCE = 30
"""Seconds after which a process from which nothing is heard is taken for dead."""

# How the collectives of CPUs and GPUs, and JAX's own service, complain of a process that is gone.
_GONE = re.compile(r"gloo|nccl|connection|coordination|heartbeat", re.IGNORECASE)


def initialize_distributed(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Makes this process one of several; before anything else is asked of JAX.

    It waits for the others, five minutes at most.

    Args:
      coordinator: "HOST:PORT" of process 0, at a port that is free there.
      processes: how many there are.
      process: which of them this is, from 0. None of the three: as the cluster tells JAX (Slurm,
        Open MPI, Kubernetes, Cloud TPU).

    Raises:
      ValueError: if they do not fit, or JAX knows no cluster here.
      LostError: if another is gone before all have met.
    """
    missing = [each is None for each in (coordinator, processes, process)]
    if any(missing) and not all(missing):
        raise InputError("coordinator, processes and process are given together, or none of them")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(f"the coordinator must be HOST:PORT, not '{coordinator}'")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise InputError(f"of {processes} processes none has the number {process}")
    # JAX would take SIGTERM for itself otherwise.
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
        raise InputError(
            f"JAX knows no cluster here ({error}): name coordinator, processes and process"
        ) from error
    # On CPUs devices connect at their first collective, which gives up after 30 s: here all are at
    # the same point, later one may load or compile for longer than another.
    devices = jax.devices()
    spread = NamedSharding(Mesh(np.asarray(devices), ("all",)), PartitionSpec("all"))
    zeros = np.zeros(len(devices), np.int32)
    array = jax.make_array_from_callback(zeros.shape, spread, lambda here: zeros[here])
    with detect_lost_process():
        multihost_utils.process_allgather(array, tiled=True)
        max_over_processes(0)


def is_first() -> bool:
    """Whether this is process 0, which touches the disk and does the talking."""
    return jax.process_index() == 0


def on_process_zero(do: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function that is called in all processes and runs in the first.

    What it gives there, or raises, it gives and raises in all of them. They must all call it at the
    same point, and what is told must be picklable.
    """

    @functools.wraps(do)
    def done(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if jax.process_count() == 1:
            return do(*args, **kwargs)
        told = b""
        if is_first():
            try:
                told = pickle.dumps((do(*args, **kwargs), None))
            except Exception as error:
                _from_first(pickle.dumps((None, error)))
                raise
        value, raised = pickle.loads(_from_first(told))
        if raised is not None:
            raise raised
        return value

    return done


def max_over_processes(number: int) -> int:
    """The highest of the processes' numbers; all must ask at the same point."""
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def require_same(what: str, told: str) -> None:
    """Raises `InputError`, in all processes, where one tells another text than the first."""
    own = np.frombuffer(hashlib.sha256(told.encode()).digest(), np.uint8)
    all_ = multihost_utils.process_allgather(own)
    differs = (all_ != all_[0]).any(axis=1)
    if differs.any():
        raise InputError(f"process {int(differs.argmax())} differs from process 0 in {what}")


@contextmanager
def detect_lost_process() -> Iterator[None]:
    """A context that tells the loss of another process from other errors of JAX's runtime.

    Raises:
      LostError: where one was lost.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _GONE.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostError(
            f"another process of this run was lost ({reason}); started again, all go on from the "
            "last checkpoint"
        ) from error


def _from_first(told: bytes) -> bytes:
    """What the first process tells, in all."""
    size = multihost_utils.broadcast_one_to_all(np.int32(len(told)))
    sent = np.frombuffer(told, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return multihost_utils.broadcast_one_to_all(sent).tobytes()
