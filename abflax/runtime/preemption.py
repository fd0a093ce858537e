"""Ctrl-C and SIGTERM, acted on between two dispatches rather than in the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has: the checkpoint is written.

    Attributes:
      signal: which signal asked.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


class Preemption:
    """A context in which SIGINT and SIGTERM are noted instead of acted upon.

    A second one acts at once. Outside the main thread, where signals cannot be caught, nothing is
    changed.

    Attributes:
      signal: the one that has come to this process; 0: none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        for each, handler in self._before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]
