"""Notes Ctrl-C, SIGTERM and SIGALRM, so that the training loop can stop between two dispatches."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run, after its checkpoint was written.

    Attributes:
      signal: the number of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


class Preemption:
    """A context manager that notes the first SIGINT, SIGTERM or SIGALRM (a time limit).

    A second signal has its usual effect. Outside the main thread, where Python cannot handle
    signals, this does nothing.

    Attributes:
      signal: the number of the signal that this process got; 0: none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
