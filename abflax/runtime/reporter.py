"""What the training loop reports of its progress."""

from __future__ import annotations

from typing import Any


class Reporter:
    """Is called by the training loop; shows nothing. Subclasses show or log what they want."""

    def phase(self, label: str, name: str, steps: int, done: int, epochs: int) -> None:
        """A phase begins, or is resumed.

        Args:
          label: of the run.
          name: of the phase.
          steps: of the whole phase.
          done: steps that were made before.
          epochs: of the whole phase.
        """

    def steps(self, count: int, images: int, epoch: float, loss: float | None) -> None:
        """More steps were made.

        Args:
          count: how many.
          images: that they saw.
          epoch: of the phase, reached so far.
          loss: of a recent step, if known.
        """

    def evaluated(self, entry: dict[str, Any]) -> None:
        """An evaluation was added to the history (see `abflax.training.record`)."""

    def finished(self, note: str = "") -> None:
        """The phase is over; or, with a note, the run needs no training, or has failed."""


class NullReporter(Reporter):
    """Shows nothing."""
