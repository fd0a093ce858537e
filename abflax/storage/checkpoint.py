"""Atomic checkpoints of a run, by Orbax."""

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
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from abflax.errors import DiskError, InputError
from abflax.models.network import digest
from abflax.runtime.distributed import is_first, on_process_zero, require_same

_KEPT = 2  # the newest, and the one before it in case the newest cannot be read


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for writes in the background.

    Each holds a state (a pytree of arrays) and a description (JSON): the configuration, phase,
    step and record so far. Both carry a digest, since Orbax does not notice a bit of an array that
    has changed on the disk. Of several processes the first alone writes and reads, for all.

    Args:
      directory: made if it does not exist; nobody else may be at work in it. What a killed process
        had begun to write there is removed.
    """

    def __init__(self, directory: str | Path) -> None:
        # Orbax tells of every save otherwise, and of what it raises anyway.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
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
                preservation_policy=LatestN(_KEPT),
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        if is_first():
            with self._writing():
                self._manager.close()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies the state now and writes it in the background.

        Raises:
          DiskError: if this checkpoint, or the one before it in the background, cannot be written.
          ValueError: if the state has other bits in another process.
        """
        described = {**meta, "state": digest(state)}
        require_same("the bits of its state: all need the same devices", described["state"])
        described["digest"] = _text_digest(described)
        self._write(step, state, described)

    @on_process_zero
    def _write(self, step: int, state: Any, described: dict[str, Any]) -> None:
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(described)
                ),
            )

    @on_process_zero
    def wait(self) -> None:
        """Returns when all that was saved is on disk. Raises `DiskError` as `save` does."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in a sentence what Orbax raises where a file cannot be written."""
        try:
            yield
        except (OSError, ValueError) as error:
            latest = self._manager.latest_step()
            kept = f"that of step {latest} stays" if latest is not None else "there is none before"
            raise DiskError(
                f"cannot write a checkpoint in {self.directory}: {_reason(error)}; {kept}"
            ) from error

    @on_process_zero
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None: there is none."""
        return self._manager.latest_step()

    @on_process_zero
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

    @on_process_zero
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
                state = self._state(step, target(meta), meta.pop("state", None))
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
        meta = self._manager.restore(step, args=arguments)["meta"]
        # Neither: from before there were digests. One flipped bit cannot hide both names.
        digests = {"digest", "state"} & meta.keys()
        if digests and meta.pop("digest", None) != _text_digest(meta):
            raise InputError("its description is not the one that was written")
        return meta

    def _state(self, step: int, target: Any, written: str | None) -> Any:
        found = self._manager.item_metadata(step)["state"]
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        state = self._manager.restore(step, args=arguments)["state"]
        # Orbax casts silently, so the dtypes on disk are compared here.
        on_disk, wanted = (sorted(str(leaf.dtype) for leaf in jax.tree.leaves(tree))
                           for tree in (found, target))  # fmt: skip
        if on_disk != wanted:
            raise InputError(f"its dtypes are {sorted({*on_disk})}, not {sorted({*wanted})}")
        state = jax.tree.map(np.asarray, state)
        if written is not None and written != digest(state):
            raise InputError("its arrays are not the ones that were written")
        return state


def _warn_unreadable(path: Path, error: Exception) -> None:
    message = f"checkpoint {path} cannot be read ({_reason(error)}); trying the one before"
    warnings.warn(message, stacklevel=3)


def _reason(error: Exception) -> str:
    """What the operating system said, where TensorStore passes that on; else the first line."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    return next(iter(str(error).strip().splitlines()), repr(error))


def _text_digest(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]
