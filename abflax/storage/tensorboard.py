"""Writes a run's history as TensorBoard events, in a background thread, without TensorFlow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from abflax.errors import import_extra

_NOT_SCALARS = ("epoch", "epoch_of_phase", "step", "phase")  # the position of an entry


class EventLog:
    """Writes the scalars of a history over the steps of the run; a context manager.

    Args:
      directory: of the event files. Existing files are replaced by `history`, so that events after
        the last checkpoint do not occur twice.
      history: the entries so far; see `abflax.training.record`.
    """

    def __init__(self, directory: Path, history: Sequence[Mapping[str, Any]]) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        self._writer = import_extra("tensorboardX", "tensorboard").SummaryWriter(str(directory))
        for entry in history:
            self.write(entry)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Queues the scalars of an entry, such as "loss" and "agreement/layer1"."""
        scalars = {name: value for name, value in entry.items() if name not in _NOT_SCALARS}
        for name, value in flatten_dict(scalars, sep="/").items():
            self._writer.add_scalar(name, value, entry["step"])
