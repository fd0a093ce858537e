"""Atomic checkpoints of a run, by Orbax."""

from __future__ import annotations

import logging
import warnings
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

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and description of the newest checkpoint that can be read; None: there is none.

        One that cannot be read is named in a warning, and the one before it is taken.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(
                    step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
                )["meta"]
                return step, meta
            except Exception as error:  # whatever a damaged file makes Orbax raise
                _warn_unreadable(self.directory / str(step), error)
        return None

    def restore(self, step: int, target: Any) -> Any:
        """The state of that step.

        Args:
          step: as `latest` gives it.
          target: a pytree of arrays or `jax.ShapeDtypeStruct`s, of the state's structure.

        Raises:
          ValueError: if the checkpoint's structure, shapes or dtypes are others.
        """
        try:
            found = self._manager.item_metadata(step)["state"]
            state = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )["state"]
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(
                f"checkpoint {self.directory / str(step)} does not fit or cannot be read: {reason}"
            ) from error
        # Orbax casts silently, so the dtypes on disk are compared here.
        on_disk = [leaf.dtype for leaf in jax.tree.leaves(found)]
        wanted = [leaf.dtype for leaf in jax.tree.leaves(target)]
        if sorted(map(str, on_disk)) != sorted(map(str, wanted)):
            raise InputError(
                f"checkpoint {self.directory / str(step)} holds other dtypes than this run: "
                f"{sorted(set(map(str, on_disk)))}, not {sorted(set(map(str, wanted)))}"
            )
        return jax.tree.map(np.asarray, state)


def _warn_unreadable(path: Path, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    message = f"checkpoint {path} cannot be read ({reason}); trying the one before"
    warnings.warn(message, stacklevel=3)
