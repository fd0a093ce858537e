"""Processes that decode images into memory that they share with this one, ahead of who trains.

They are started as scripts and not forked, since JAX has threads, nor spawned by
`multiprocessing`, which would import the main module, JAX and all, in each of them. The tasks go
round: a batch is shared out among all processes, which answer in the order in which they were
asked, so that nothing depends on who is quicker. When this process ends, however it ends, their
connections close and they end as well.

Grain 0.2.18 with the same crops costs as much CPU an image, here and there, but its processes
import the main module: two of them took 13 s of CPU and 270 MB each before the first batch, where
these take less than 1 s and 25 MB.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import psutil

from abflax.data import decoding
from abflax.data.decoding import ImageSource, Task
from abflax.data.image_files import ImageFiles
from abflax.errors import InputError

_MOST_PROCESSES = 16  # by default


class Decoders:
    """A number of decoding processes.

    Args:
      slots: images that the shared memory holds, `[slots, side, side, 3]`.
      side: of the crops, in pixels.
      workers: how many processes; None: one for each core, 16 at most.

    Raises:
      ValueError: if there are to be none.

    Attributes:
      memory: the shared memory.
      decoded: how many tasks each process has performed.
    """

    def __init__(self, slots: int, side: int, workers: int | None = None) -> None:
        count = min(default_workers(), _MOST_PROCESSES) if workers is None else workers
        if count < 1:
            raise InputError(f"workers must be at least 1, not {count}")
        shape = (slots, side, side, 3)
        size = max(1, math.prod(shape))
        # Of no name, so that nothing is left over, and not in /dev/shm, which may be small.
        descriptor = os.memfd_create("images") if hasattr(os, "memfd_create") else _unnamed_file()
        os.ftruncate(descriptor, size)
        self.memory: np.ndarray = np.ndarray(shape, np.uint8, mmap.mmap(descriptor, size))
        self.decoded = [0] * count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._asked: list[deque[PendingBatch]] = [deque() for _ in range(count)]
        for _ in range(count):
            ours, theirs = Pipe()
            command = [sys.executable, "-P", decoding.__file__, theirs.fileno(), descriptor]
            self._processes.append(
                subprocess.Popen(
                    [*map(str, command), str(slots), str(side)],
                    pass_fds=(theirs.fileno(), descriptor),
                    stdin=subprocess.DEVNULL,
                )
            )
            theirs.close()
            self._connections.append(ours)
        os.close(descriptor)

    def ask(self, tasks: Sequence[Task]) -> PendingBatch:
        """Shares tasks out among the processes, and returns at once."""
        count = len(self._connections)
        ticket = PendingBatch(list(tasks))
        for index, connection in enumerate(self._connections):
            if part := ticket.tasks[index::count]:
                while self._asked[index] and connection.poll():  # it waits, once its answers fill
                    self._take(index)  # the connection, and so would what is sent to it now
                ticket.waiting.append(index)
                self._asked[index].append(ticket)
                try:
                    connection.send(part)
                except OSError:
                    self._gone(index)
        return ticket

    def wait(self, ticket: PendingBatch) -> list[tuple[bool, Any]]:
        """What became of each task (see `decoding.perform`)."""
        while ticket.waiting:
            self._take(ticket.waiting[0])
        return ticket.found

    def _take(self, index: int) -> None:
        """The next answer of a process."""
        try:
            found = self._connections[index].recv()
        except (EOFError, OSError):
            self._gone(index)
        first = self._asked[index].popleft()
        first.waiting.remove(index)
        first.found[index :: len(self._connections)] = found
        self.decoded[index] += len(found)

    def seconds(self) -> float:
        """CPU time of the processes."""
        times = [psutil.Process(each.pid).cpu_times() for each in self._processes]
        return sum(each.user + each.system for each in times)

    def close(self) -> None:
        """Ends the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()  # what it may be decoding is of no use to anybody
            process.wait()

    def _gone(self, index: int) -> None:
        code = self._processes[index].wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise InputError(
            f"a process that decodes images has ended with {how}; where memory is short, use fewer "
            "of them (workers)"
        )


class PendingBatch:
    """What was asked for at once, and what has come of it.

    Attributes:
      tasks, found: the tasks, and what became of each.
      waiting: the processes that have not answered.
    """

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks
        self.found: list[tuple[bool, Any]] = [(False, None)] * len(tasks)
        self.waiting: list[int] = []


class DecodedBatches:
    """DecodedBatches of crops in order, the next of them decoded while somebody works on one.

    The processes start with the first batch.

    Args:
      data: the photographs.
      crops: number of a batch -> (kind of crop, examples, a key for each): the kinds are "random
        crop", of key (seed, epoch, example), and "centre crop", of key ().
      size: examples in the largest batch.
      ahead: batches that are decoded, or being decoded, at once.
      workers: see `Decoders`.
    """

    def __init__(
        self,
        data: ImageFiles,
        crops: Callable[[int], tuple[str, Sequence[int], Sequence[tuple[int, ...]]]],
        size: int,
        ahead: int,
        workers: int | None,
    ) -> None:
        self._data, self._crops, self._size, self._ahead = data, crops, size, ahead
        self._workers = workers
        self.decoders: Decoders | None = None
        self._asked: dict[int, PendingBatch] = {}

    def into(self, number: int, images: np.ndarray) -> None:
        """Writes a batch into the first of `images`, and has those after it decoded.

        Raises:
          ValueError: naming an image that can no longer be read.
        """
        if self.decoders is None:
            slots = self._size * self._ahead
            self.decoders = Decoders(slots, self._data.side, self._workers)
        wanted = range(number, number + self._ahead)
        for other in [each for each in self._asked if each not in wanted]:
            self.decoders.wait(self._asked.pop(other))  # before its slots are used again
        self._ask(self.decoders, wanted)
        ticket = self._asked.pop(number)
        for task, (good, reason) in zip(ticket.tasks, self.decoders.wait(ticket), strict=True):
            if not good:
                raise InputError(f"image {task[2]} cannot be read any more: {reason}")
        start, count = self._slot(number), len(ticket.tasks)
        images[:count] = self.decoders.memory[start : start + count]
        self._ask(self.decoders, range(number + 1, number + 1 + self._ahead))

    def close(self) -> None:
        """Ends the processes."""
        if self.decoders is not None:
            self.decoders.close()

    def _ask(self, decoders: Decoders, numbers: range) -> None:
        for number in numbers:
            if number not in self._asked:
                kind, examples, keys = self._crops(number)
                slots = itertools.count(self._slot(number))
                self._asked[number] = decoders.ask(
                    [
                        (kind, slot, self._data.places[example], (self._data.side, *key))
                        for slot, example, key in zip(slots, examples, keys, strict=False)
                    ]
                )

    def _slot(self, number: int) -> int:
        return number % self._ahead * self._size


def inspect(places: Sequence[ImageSource], workers: int | None = None) -> list[tuple[bool, str]]:
    """(True, the SHA-256 of its bytes) of each image that can be decoded, or (False, why not)."""
    decoders = Decoders(0, 1, workers)
    try:
        return decoders.wait(decoders.ask([("inspect", None, place, ()) for place in places]))
    finally:
        decoders.close()


def default_workers() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _unnamed_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
