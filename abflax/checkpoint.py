"""Atomic checkpoints of a run, by Orbax."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from abflax.errors import InputError

_KEPT = 2  # the newest, and the one before it in case the newest cannot be read


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for writes in the background.

    Each holds a state (a pytree of arrays) and a description (JSON): the configuration, phase,
    step and record so far.

    Args:
      directory: made if it does not exist.
    """

    def __init__(self, directory: str | Path) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every save otherwise
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=LatestN(_KEPT), cleanup_tmp_directories=True
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies the state now and writes it in the background."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
        )

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None: there is none."""
        return self._manager.latest_step()

    def latest(self) -> dict[str, Any] | None:
        """The description of the newest checkpoint whose description can be read.

        None where there is no checkpoint.

        Raises:
          ValueError: if there are checkpoints, but none whose description can be read.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._meta(step)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                _warn_unreadable(self.directory / str(step), error)
        if self._manager.all_steps():
            raise self._none_fits()
        return None

    def restore(self, target: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], Any]:
        """Description and state of the newest checkpoint that can be read whole.

        One that cannot be read is named in a warning, and the one before it is taken; once that is
        read, the damaged one is deleted, so that its step can be saved again.

        Args:
          target: description -> a pytree of `jax.ShapeDtypeStruct`s, of the state's structure.

        Raises:
          ValueError: if there are checkpoints, but none that fits and can be read.
        """
        damaged: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._meta(step)
                state = self._state(step, target(meta))
            except Exception as error:
                _warn_unreadable(self.directory / str(step), error)
                damaged.append(step)
                continue
            for each in damaged:
                self._manager.delete(each)
            return meta, state
        raise self._none_fits()

    def _none_fits(self) -> InputError:
        return InputError(
            f"no checkpoint in {self.directory} fits and can be read; remove that folder to begin "
            "anew"
        )

    def _meta(self, step: int) -> dict[str, Any]:
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=arguments)["meta"]

    def _state(self, step: int, target: Any) -> Any:
        found = self._manager.item_metadata(step)["state"]
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        state = self._manager.restore(step, args=arguments)["state"]
        # Orbax casts silently, so the dtypes on disk are compared here.
        on_disk, wanted = (sorted(str(leaf.dtype) for leaf in jax.tree.leaves(tree))
                           for tree in (found, target))  # fmt: skip
        if on_disk != wanted:
            raise InputError(f"its dtypes are {sorted({*on_disk})}, not {sorted({*wanted})}")
        return jax.tree.map(np.asarray, state)


def _warn_unreadable(path: Path, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    message = f"checkpoint {path} cannot be read ({reason}); trying the one before"
    warnings.warn(message, stacklevel=3)
