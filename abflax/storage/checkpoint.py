"""Writes and reads atomic checkpoints of a run, by Orbax."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from abflax.errors import DiskError, InputError
from abflax.models.network import digest
from abflax.runtime.distributed import is_first, on_process_zero, require_same

_T = TypeVar("_T")
_MAX_TO_KEEP = 2  # the newest, and the one before it in case the newest cannot be read


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for background writes at its end.

    Each checkpoint holds a state (a pytree of arrays) and a description (JSON): the configuration,
    phase, step and history. Both have a digest, since Orbax does not detect changed bits on disk.
    With several processes, only process 0 reads and writes.

    Args:
      directory: created if it does not exist; no other process may use it. Incomplete checkpoints
        of a killed process are removed.
    """

    def __init__(self, directory: str | Path) -> None:
        # Orbax logs every save, and errors that it raises anyway.
        logging.getLogger("absl").addFilter(self._not_orbax)
        self.directory = Path(directory).absolute()
        self._open()

    @on_process_zero
    def _open(self) -> None:
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                if not path.name.isdigit():
                    shutil.rmtree(path, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=LatestN(_MAX_TO_KEEP),
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if is_first():
                with self._writing():
                    self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(self._not_orbax)

    def _not_orbax(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies the state, a pytree of arrays, and writes it with its description `meta`.

        It is written in the background.

        Raises:
          DiskError: if this checkpoint, or the background write before it, fails.
          ValueError: if the state differs between processes.
        """
        meta = {**meta, "state": digest(state)}
        require_same("the bits of its state: all need the same devices", meta["state"])
        meta["digest"] = _text_digest(meta)
        self._write(step, state, meta)

    @on_process_zero
    def _write(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        arguments = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**arguments))

    @on_process_zero
    def wait(self) -> None:
        """Waits until everything that was saved is on disk. Raises `DiskError` as `save` does."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Converts Orbax's errors of a failed write to `DiskError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            latest = self._manager.latest_step()
            rest = f"that of step {latest} stays" if latest is not None else "there is none before"
            raise DiskError(
                f"cannot write a checkpoint in {self.directory}: {_reason(error)}; {rest}"
            ) from error

    @on_process_zero
    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    @on_process_zero
    def latest(self) -> dict[str, Any] | None:
        """Returns the newest description that can be read; None if there is no checkpoint.

        Raises:
          ValueError: if there are checkpoints, but no description can be read.
        """
        return self._newest(self._meta)[0] if self._manager.all_steps() else None

    @on_process_zero
    def restore(self, target: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], Any]:
        """Reads (description, state) of the newest checkpoint that is intact.

        A warning names each damaged checkpoint, and the one before it is read instead. The damaged
        ones are then deleted, so that their steps can be saved again.

        Args:
          target: description -> a pytree of `jax.ShapeDtypeStruct`s, of the state's structure.

        Raises:
          ValueError: if no checkpoint fits and can be read.
        """

        def read(step: int) -> tuple[dict[str, Any], Any]:
            meta = self._meta(step)
            return meta, self._state(step, target(meta), meta.pop("state", None))

        checkpoint, damaged = self._newest(read)
        for step in damaged:
            self._manager.delete(step)
        return checkpoint

    def _newest(self, read: Callable[[int], _T]) -> tuple[_T, list[int]]:
        """Reads the newest step that is intact; also returns the steps of the damaged ones."""
        damaged: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return read(step), damaged
            except Exception as error:  # whatever a damaged file makes Orbax raise
                warnings.warn(
                    f"checkpoint {self.directory / str(step)} cannot be read ({_reason(error)}); "
                    "trying the one before",
                    stacklevel=3,
                )
                damaged.append(step)
        raise InputError(
            f"no checkpoint in {self.directory} fits and can be read; remove that folder to begin "
            "anew"
        )

    def _meta(self, step: int) -> dict[str, Any]:
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=arguments)["meta"]
        # Old checkpoints have neither digest. One flipped bit cannot hide both.
        digests = {"digest", "state"} & meta.keys()
        if digests and meta.pop("digest", None) != _text_digest(meta):
            raise InputError("its description is not the one that was written")
        return meta

    def _state(self, step: int, target: Any, written: str | None) -> Any:
        stored = self._manager.item_metadata(step)["state"]
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        state = self._manager.restore(step, args=arguments)["state"]
        # Orbax casts silently, so the dtypes on disk are compared here.
        on_disk, expected = (
            sorted(str(leaf.dtype) for leaf in jax.tree.leaves(tree)) for tree in (stored, target)
        )
        if on_disk != expected:
            raise InputError(f"its dtypes are {sorted({*on_disk})}, not {sorted({*expected})}")
        state = jax.tree.map(np.asarray, state)
        if written is not None and written != digest(state):
            raise InputError("its arrays are not the ones that were written")
        return state


def _reason(error: Exception) -> str:
    """Returns the operating system's message if TensorStore passes it on, else the first line."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    return next(iter(str(error).strip().splitlines()), repr(error))


def _text_digest(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]
