"""Decodes images ahead of training, in processes that share memory with this process.

The processes run `decoding.py` as a script. Forking is unsafe with JAX's threads, and
`multiprocessing` would import the main module, with JAX, in each of them. Every process decodes a
part of each batch and answers in the order of its requests, so the result does not depend on their
speed. When this process ends, their connections close and they end too.

Grain 0.2.18 with the same crops needs as much CPU time per image, but its processes import the main
module: two of them took 13 s of CPU and 270 MB each before the first batch. These take less than
1 s and 25 MB.
"""

from __future__ import annotations

import dataclasses
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
    """A pool of decoding processes.

    Args:
      slots: the number of images in the shared memory.
      side: of the crops, in pixels.
      workers: the number of processes; None: one per core, at most 16.

    Raises:
      ValueError: if `workers` is below 1.

    Attributes:
      memory: the shared memory, `[slots, side, side, 3]`.
      decoded: how many tasks each process has performed.
    """

    def __init__(self, slots: int, side: int, workers: int | None = None) -> None:
        count = workers if workers is not None else min(_available_cores(), _MOST_PROCESSES)
        if count < 1:
            raise InputError(f"workers must be at least 1, not {count}")
        shape = (slots, side, side, 3)
        size = max(1, math.prod(shape))
        # A file without a name needs no cleanup. /dev/shm may be too small.
        descriptor = os.memfd_create("images") if hasattr(os, "memfd_create") else _unnamed_file()
        os.ftruncate(descriptor, size)
        self.memory: np.ndarray = np.ndarray(shape, np.uint8, mmap.mmap(descriptor, size))
        self.decoded = [0] * count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._pending: list[deque[PendingBatch]] = [deque() for _ in range(count)]
        for _ in range(count):
            ours, theirs = Pipe()
            files = (theirs.fileno(), descriptor)
            command = map(str, (sys.executable, "-P", decoding.__file__, *files, slots, side))
            process = subprocess.Popen([*command], pass_fds=files, stdin=subprocess.DEVNULL)
            self._processes.append(process)
            theirs.close()
            self._connections.append(ours)
        os.close(descriptor)

    def ask(self, tasks: Sequence[Task]) -> PendingBatch:
        """Distributes tasks over the processes, without waiting for results."""
        count = len(self._connections)
        batch = PendingBatch(list(tasks), [(False, None)] * len(tasks), [])
        for index, connection in enumerate(self._connections):
            if part := batch.tasks[index::count]:
                # A process blocks once its unread answers fill the connection, and `send` would
                # block then too. So its answers are read first.
                while self._pending[index] and connection.poll():
                    self._receive(index)
                batch.waiting.append(index)
                self._pending[index].append(batch)
                try:
                    connection.send(part)
                except OSError:
                    self._raise_ended(index)
        return batch

    def wait(self, batch: PendingBatch) -> list[tuple[bool, Any]]:
        """Waits for a batch and returns the result of each task (see `decoding.perform`)."""
        while batch.waiting:
            self._receive(batch.waiting[0])
        return batch.results

    def _receive(self, index: int) -> None:
        """Receives the next answer of a process."""
        try:
            results = self._connections[index].recv()
        except (EOFError, OSError):
            self._raise_ended(index)
        batch = self._pending[index].popleft()
        batch.waiting.remove(index)
        batch.results[index :: len(self._connections)] = results
        self.decoded[index] += len(results)

    def seconds(self) -> float:
        """Returns the CPU time of the processes, in seconds."""
        times = [psutil.Process(process.pid).cpu_times() for process in self._processes]
        return sum(time.user + time.system for time in times)

    def close(self) -> None:
        """Ends the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()  # nobody needs what it may still be decoding
            process.wait()

    def _raise_ended(self, index: int) -> None:
        code = self._processes[index].wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise InputError(
            f"a process that decodes images has ended with {how}; if memory is short, use fewer "
            "processes (workers)"
        )


@dataclasses.dataclass
class PendingBatch:
    """A batch of tasks, the result of each, and the processes that have not answered yet."""

    tasks: list[Task]
    results: list[tuple[bool, Any]]
    waiting: list[int]


@dataclasses.dataclass(eq=False)
class DecodedBatches:
    """Batches of crops in order; the next ones are decoded while one is used.

    The processes start with the first batch.

    Attributes:
      data: the images.
      crops: number of a batch -> (kind of crop, examples, a key for each example). The kinds are
        "random crop", with the key (seed, epoch, example), and "centre crop", with the key ().
      size: examples in the largest batch.
      ahead: the number of batches that are decoded, or being decoded, at a time.
      workers: see `Decoders`.
      decoders: the processes; None before the first batch.
    """

    data: ImageFiles
    crops: Callable[[int], tuple[str, Sequence[int], Sequence[tuple[int, ...]]]]
    size: int
    ahead: int
    workers: int | None
    decoders: Decoders | None = None
    _pending: dict[int, PendingBatch] = dataclasses.field(default_factory=dict)

    def into(self, number: int, images: np.ndarray) -> None:
        """Writes a batch into the first of `images`, and starts decoding the batches after it.

        Raises:
          ValueError: if an image can no longer be read; the message names it.
        """
        if self.decoders is None:
            self.decoders = Decoders(self.size * self.ahead, self.data.side, self.workers)
        upcoming = range(number, number + self.ahead)
        for other in [pending for pending in self._pending if pending not in upcoming]:
            self.decoders.wait(self._pending.pop(other))  # before its slots are used again
        self._ask(self.decoders, upcoming)
        batch = self._pending.pop(number)
        for task, (good, reason) in zip(batch.tasks, self.decoders.wait(batch), strict=True):
            if not good:
                raise InputError(f"image {task[2]} cannot be read any more: {reason}")
        start, count = self._slot(number), len(batch.tasks)
        images[:count] = self.decoders.memory[start : start + count]
        self._ask(self.decoders, range(number + 1, number + 1 + self.ahead))

    def close(self) -> None:
        """Ends the processes."""
        if self.decoders is not None:
            self.decoders.close()

    def _ask(self, decoders: Decoders, numbers: range) -> None:
        for number in numbers:
            if number not in self._pending:
                kind, examples, keys = self.crops(number)
                pairs = enumerate(zip(examples, keys, strict=True), start=self._slot(number))
                tasks: list[Task] = [
                    (kind, slot, self.data.places[example], (self.data.side, *key))
                    for slot, (example, key) in pairs
                ]
                self._pending[number] = decoders.ask(tasks)

    def _slot(self, number: int) -> int:
        return number % self.ahead * self.size


def inspect(places: Sequence[ImageSource], workers: int | None = None) -> list[tuple[bool, str]]:
    """Decodes images; returns (True, SHA-256 of the bytes) or (False, reason) for each."""
    decoders = Decoders(0, 1, workers)
    try:
        return decoders.wait(decoders.ask([("inspect", None, place, ()) for place in places]))
    finally:
        decoders.close()


def _available_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _unnamed_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
