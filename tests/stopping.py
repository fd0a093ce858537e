"""A reporter that stops a run."""

import signal

from abflax.runtime.reporter import NullReporter


class StopAt(NullReporter):
    """Sends a signal to this process when a run has made so many steps."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.left, self.number = step, number

    def steps(self, count: int, images: int, epoch: float, loss: float | None) -> None:
        """Counts, and sends the signal."""
        self.left -= count
        if self.left == 0:
            signal.raise_signal(self.number)
