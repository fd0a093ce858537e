"""The interface through which the training loop reports its progress."""

from __future__ import annotations

from typing import Any


class Reporter:
    """The training loop calls these methods, which do nothing: the place for your own logging.

    Subclasses override some of them, and are given to `abflax.distill(…, reporter=…)`. They are
    called between dispatches, so what they do takes time from training.

    Example:
      >>> class Printed(Reporter):
      ...     def evaluated(self, entry):
      ...         print(entry["phase"], entry["epoch"], entry["loss"])
    """

    def phase(self, label: str, name: str, steps: int, done: int, epochs: int) -> None:
        """Reports that a phase begins or is resumed.

        Args:
          label: of the run.
          name: of the phase.
          steps: the steps of the whole phase.
          done: the steps that are already done.
          epochs: the epochs of the whole phase.
        """

    def steps(self, count: int, images: int, epoch: float, loss: float | None) -> None:
        """Reports more steps.

        Args:
          count: the number of new steps.
          images: the number of images in these steps.
          epoch: the epoch of the phase that is reached.
          loss: of a recent step, if known.
        """

    def evaluated(self, entry: dict[str, Any]) -> None:
        """Reports a new entry of the history (see `abflax.training.record`)."""

    def finished(self, note: str = "") -> None:
        """Reports the end of a phase; or, with a note, that a run is already done or has failed."""


class NullReporter(Reporter):
    """Shows nothing."""
