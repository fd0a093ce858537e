"""The folder of a run: its lock, its checkpoints, and at the end its record and weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from abflax.config import RunConfig
from abflax.errors import DiskError, InputError, local_path, require_instances
from abflax.models.network import Network, digest
from abflax.runtime.distributed import is_first, on_process_zero
from abflax.storage.checkpoint import Checkpoints
from abflax.storage.files import read_json
from abflax.storage.lock import Lock
from abflax.storage.tensorboard import EventLog
from abflax.taps import side_of
from abflax.training.fingerprint import (
    Fingerprint,
    is_same_run,
    require_same_run,
    write_fingerprint,
)
from abflax.training.record import read_record, require_writable, write_record
from abflax.weights import read_state_dict, read_variables, save_variables

ANCHORS = "anchors"
"""The folder of a run for the students that were kept along it."""

END = "end"
"""The folder of a finished run for its last checkpoint, where more epochs may come."""

CONNECTORS = "connectors"
"""The name of a run's file for its connectors."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
      record: see `abflax.training.record`.
      trained: the student's variables; None: they are read from the directory when asked for.
      directory: where record and weights are; None without a workdir.
      model: the student without its weights.
      last_average: the averaged weights of a run that was trained just now.
      last_connectors: those of a run without a directory.
    """

    record: dict[str, Any]
    trained: Any | None = dataclasses.field(repr=False)
    directory: Path | None
    model: Any = dataclasses.field(default=None, repr=False)
    last_average: Any | None = dataclasses.field(default=None, repr=False)
    last_connectors: Any | None = dataclasses.field(default=None, repr=False)

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        """The student's `params`, `batch_stats` and other collections.

        Raises:
          ValueError: if they are to be read from the directory, and cannot be.
        """
        if self.trained is not None:
            return dict(self.trained)
        if self.directory is None:
            raise InputError("the result has neither weights nor a directory to read them from")
        return read_variables(self.directory / "student.safetensors")

    @functools.cached_property
    def average(self) -> dict[str, Any] | None:
        """As `variables`, with the averaged weights. None: there was no `ema`.

        Raises:
          ValueError: if they are to be read from the directory, and cannot be.
        """
        if self.last_average is not None or "ema_weights" not in self.record:
            return self.last_average
        if self.directory is None:
            raise InputError("the result has neither averaged weights nor a directory")
        return read_variables(self.directory / "student-ema.safetensors")

    @functools.cached_property
    def connectors(self) -> dict[str, Any] | None:
        """`params` and `batch_stats` of the connectors, as the last phase that had some left them.

        They map the taps of a student to the teacher's widths, for `abflax.analysis.examine`. None:
        no phase had connectors.

        Raises:
          ValueError: if they are to be read from the directory, and cannot be.
        """
        if self.directory is None or "connectors" not in self.record:
            return self.last_connectors
        return read_variables(self.directory / f"{CONNECTORS}.safetensors")

    @property
    def student(self) -> Any:
        """The trained student: a new NNX module where one was given, else a `Network`."""
        network = Network(self.model, self.variables)
        return network if side_of(self.model).digest is None else network.module

    def save(self, path: str | Path) -> None:
        """Writes the student's weights as `.safetensors`; `abflax.weights.read_variables` reads it.

        The names are paths such as `params/Conv_0/kernel`, which other programs read as well.

        Raises:
          ValueError: if the path does not end in `.safetensors`.
          DiskError: if the file cannot be written.
        """
        require_instances({"path": (path, str | Path)})
        target = local_path(path)
        if target.suffix != ".safetensors":
            raise InputError(f"weights are saved as .safetensors, not as {target.name}")
        save_variables(target, self.variables)


@on_process_zero
def finished_record(directory: Path) -> dict[str, Any] | None:
    """Reads the record of a finished run; None if something is left to do, or to tidy up.

    Raises:
      ValueError: if record or weights are damaged, or of another run.
    """
    untidy = os.path.exists(directory / "checkpoints")  # False where the folder is not readable
    return None if untidy else _read_finished(directory)


def _read_finished(directory: Path) -> dict[str, Any] | None:
    record = read_record(directory / "record.json", directory.name)
    files = {"weights": "student", "ema_weights": "student-ema", "connectors": CONNECTORS}
    for key, name in files.items():
        if record is not None and key in record:
            weights = directory / f"{name}.safetensors"
            if digest(unflatten_dict(read_state_dict(weights), sep="/")) != record[key]:
                raise InputError(f"{weights} is damaged: its weights are not those of the record")
    return record


def anchor_path(directory: Path, epoch: int) -> Path:
    """Where a run keeps its student after an epoch."""
    return directory / ANCHORS / f"{epoch:06}.safetensors"


def lost_anchors(directory: Path, epochs: Collection[int], digests: Mapping[str, str]) -> list[int]:
    """Finds the epochs whose students are not kept in a run's folder, or not whole.

    Args:
      directory: the run's folder.
      epochs: those that are asked for.
      digests: epoch -> digest of the student, as history and record have them; runs that older
        versions made have none.
    """
    lost = []
    for epoch in sorted(epochs):
        try:
            found = digest(unflatten_dict(read_state_dict(anchor_path(directory, epoch)), sep="/"))
        except InputError:
            lost.append(epoch)
        else:
            if found != digests.get(str(epoch), found):
                lost.append(epoch)
    return lost


@on_process_zero
def require_anchors(directory: Path, epochs: Collection[int], digests: Mapping[str, str]) -> None:
    """Raises `InputError` if a finished run does not hold all anchors that are asked for."""
    if lost := lost_anchors(directory, epochs, digests):
        raise InputError(
            f"the run in {directory} is finished, but did not keep {_students(lost)}, as "
            "keep_anchors asks; --force (force=True) trains it anew"
        )


def _students(epochs: Sequence[int]) -> str:
    listed = ", ".join(map(str, epochs[:5])) + ", …" * (len(epochs) > 5)
    return f"its student after epoch{'s' * (len(epochs) > 1)} {listed}"


class RunDirectory:
    """The folder of one run, or nothing at all for a run without a workdir.

    Only the run that holds the folder's lock works in it. Of several processes the first writes and
    reads, for all.

    Args:
      path: None: nothing is written.
      config: the run's configuration.
      force: whether a finished run is trained again.
      fingerprint: of the run, see `abflax.training.fingerprint`; not needed without a path.

    Attributes:
      note: a sentence for the user, where `open` has found something to say.
    """

    def __init__(
        self,
        path: Path | None,
        config: RunConfig,
        force: bool = False,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        self.path, self._config, self._force = path, config, force
        self._fingerprint = fingerprint or {}
        self._lock, self._writers = contextlib.ExitStack(), contextlib.ExitStack()
        self._checkpoints: Checkpoints | None = None
        self._events: EventLog | None = None
        self._connectors: Any | None = None
        self.note = ""

    def open(
        self,
        begins: Callable[[tuple[int, ...]], bool] | None = None,
        anchors: Collection[int] = (),
    ) -> Result | None:
        """Locks and tidies the folder. Returns the result if the run was finished meanwhile.

        A folder without a checkpoint gets the last one of a finished run beside it that differs in
        nothing but its epochs, where that makes the first steps of this one.

        Args:
          begins: epochs of another run -> whether its steps are the first of this one.
          anchors: the epochs whose students are to be kept.

        Raises:
          BusyError: if another process is training the run.
          DiskError: if the lock cannot be written.
          ValueError: if the folder holds another experiment's run, or a finished one without the
            anchors, and it is not forced.
        """
        if self.path is None:
            return None
        on_process_zero(require_writable)(self.path)
        self._lock.enter_context(Lock(self.path / "lock", f"run {self._config.hash}"))
        note = ""
        if self._fingerprint and not self._force:
            note = require_same_run(self.path, self._fingerprint)
        elif self._fingerprint and not is_same_run(self.path, self._fingerprint):
            on_process_zero(shutil.rmtree)(self.path / "checkpoints", ignore_errors=True)
        record = _tidy(self.path, self._config, self._force)
        if self._fingerprint:
            write_fingerprint(self.path, self._fingerprint)
        if record is not None:
            self.close()
            require_anchors(self.path, anchors, record.get("anchors", {}))
            return Result(record, None, self.path)
        if note and on_process_zero(self._has_checkpoint)():
            self.note = f"it goes on from a checkpoint, though {note}"
        elif begins is not None and not self._force:
            self.note = self._adopt(begins, anchors)
        checkpoints = Checkpoints(self.path / "checkpoints")
        self._checkpoints = self._writers.enter_context(checkpoints)
        return None

    def log_to_tensorboard(self, entries: Sequence[dict[str, Any]]) -> None:
        """Writes TensorBoard events from now on, beginning with the history so far."""
        if self.path is not None and is_first():
            events = EventLog(self.path / "events", entries)
            self._events = self._writers.enter_context(events)

    def log(self, entry: dict[str, Any]) -> None:
        """Writes an entry of the history as TensorBoard events, if they are wanted."""
        if self._events is not None:
            self._events.write(entry)

    def latest(self) -> dict[str, Any] | None:
        """The description of the newest checkpoint that can be read; None: there is none."""
        return None if self._checkpoints is None else self._checkpoints.latest()

    def restore(self, target: Callable[[dict[str, Any]], Any]) -> tuple[dict[str, Any], Any]:
        """Description and state of the newest checkpoint; see `Checkpoints.restore`."""
        assert self._checkpoints is not None
        return self._checkpoints.restore(target)

    def save(self, step: int, state: Any, description: dict[str, Any]) -> None:
        """Saves a checkpoint in the background."""
        if self._checkpoints is not None:
            self._checkpoints.save(step, state, description)

    def wait(self) -> int | None:
        """Waits until all checkpoints are on the disk. Returns the newest one's step, if any."""
        if self._checkpoints is None:
            return None
        self._checkpoints.wait()
        return self._checkpoints.latest_step()

    def _has_checkpoint(self) -> bool:
        """Whether there is one to go on from."""
        assert self.path is not None
        return any(path.name.isdigit() for path in (self.path / "checkpoints").glob("*"))

    @on_process_zero
    def _adopt(self, begins: Callable[[tuple[int, ...]], bool], anchors: Collection[int]) -> str:
        """Copies the last checkpoint of the longest run that begins this one, and what it keeps.

        Returns a sentence where only a learning rate, a weight or an anchor keeps a shorter run
        from beginning this one; else "".
        """
        assert self.path is not None
        checkpoints, shorter = self.path / "checkpoints", self._shorter()
        if self._has_checkpoint():
            return ""
        first = {
            sum(epochs): other
            for epochs, other in shorter.items()
            if begins(epochs) and (other / END).exists() and is_same_run(other, self._fingerprint)
        }
        whole = [end for end, other in first.items() if not _lacks(other, end, anchors)]
        if first and not whole:
            return (
                f"{first[max(first)].name} has the same settings and fewer epochs, but did not "
                "keep the anchors that are asked for, so this run begins anew"
            )
        if first:
            other = first[max(whole)]
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(other / f"{CONNECTORS}.safetensors", self.path)
            if (other / ANCHORS).exists():
                _copy_whole(other / ANCHORS, self.path / ANCHORS)
            (end,) = (other / END).iterdir()
            _copy_whole(end, checkpoints / end.name)
            return ""
        for epochs, other in shorter.items():
            if epochs[:-1] == self._config.epochs[:-1] and not begins(epochs):
                fell = (
                    "but its learning rate, or a weight, followed its own length, so this run "
                    "begins anew"
                )
                return f"{other.name} has the same settings and fewer epochs, {fell}"
        return ""

    def _shorter(self) -> dict[tuple[int, ...], Path]:
        """The finished runs beside this one that differ in nothing but fewer epochs."""
        assert self.path is not None
        own, found = self._config.as_json(), {}
        for record in sorted(self.path.parent.glob("*/record.json")):
            with contextlib.suppress(FileNotFoundError, ValueError):
                config = read_json(record.parent / "config.json")
                alike = config | {"epochs": None} == own | {"epochs": None}
                if alike and sum(config["epochs"]) < sum(own["epochs"]):
                    found[tuple(config["epochs"])] = record.parent
        return found

    def finish(
        self,
        record: dict[str, Any],
        variables: Any,
        average: Any | None = None,
        may_grow: bool = False,
    ) -> Result:
        """Replaces the checkpoints by the record and the student's weights, averaged ones too.

        Where the run may be the beginning of a longer one, its last checkpoint stays as `end`.
        """
        last = self.wait()
        self._writers.close()
        if self.path is not None:
            if may_grow:
                end = self.path / END / str(last)
                on_process_zero(_copy_whole)(self.path / "checkpoints" / str(last), end)
            _finish(self.path, record, variables, average)
            if self._fingerprint:
                write_fingerprint(self.path, self._fingerprint)
            on_process_zero(shutil.rmtree)(self.path / "checkpoints", ignore_errors=True)
        self.close()
        return Result(
            record, variables, self.path, last_average=average, last_connectors=self._connectors
        )

    def keep_connectors(self, variables: Any) -> None:
        """Keeps the connectors of a phase that is over, for the analysis."""
        self._connectors = variables
        if self.path is not None:
            on_process_zero(_keep)(self.path / f"{CONNECTORS}.safetensors", variables)

    def keep_anchor(self, epoch: int, variables: Any) -> None:
        """Writes the student after an epoch, which stays beside that of the end."""
        if self.path is not None:
            on_process_zero(_keep)(anchor_path(self.path, epoch), variables)

    @on_process_zero
    def require_anchors(self, epochs: Collection[int], digests: Mapping[str, str]) -> None:
        """Raises `InputError` if a run that goes on lacks anchors of epochs that it has passed."""
        if self.path is not None and (lost := lost_anchors(self.path, epochs, digests)):
            raise InputError(
                f"the run in {self.path} goes on from a checkpoint, but did not keep "
                f"{_students(lost)}, as keep_anchors asks: remove {self.path / 'checkpoints'} to "
                "begin anew, or leave keep_anchors out"
            )

    def diverge(self, record: dict[str, Any]) -> None:
        """Writes how a run ended whose numbers went wrong, so that tables count it."""
        if self.path is not None:
            on_process_zero(write_record)(self.path / "diverged.json", record)

    def close(self) -> None:
        """Waits for what is written in the background, and releases the lock."""
        with self._lock, self._writers:
            pass


def _lacks(directory: Path, epochs: int, anchors: Collection[int]) -> bool:
    """Whether a finished run of so many epochs lacks anchors of a longer one."""
    digests = read_json(directory / "record.json").get("anchors", {})
    return bool(lost_anchors(directory, {each for each in anchors if each <= epochs}, digests))


def _copy_whole(source: Path, target: Path) -> None:
    """Copies a checkpoint whole or not at all."""
    half = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    try:
        shutil.copytree(source, half)
        half.replace(target)
    except OSError as error:
        raise DiskError(f"cannot write {target}: {error.strerror or 'the copy failed'}") from error


def _keep(path: Path, variables: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    save_variables(path, variables)


@on_process_zero
def _tidy(directory: Path, config: RunConfig, force: bool) -> dict[str, Any] | None:
    """Tidies a run's folder. Returns its record if the run was finished meanwhile."""
    path = directory / "record.json"
    if path.exists():  # forced, finished by another process just now, or not tidied up
        record = None if force else _read_finished(directory)
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        if record is not None:
            return record
        path.unlink()
    shutil.rmtree(directory / END, ignore_errors=True)  # of another training, or half written
    if not (directory / "checkpoints").exists():  # so these are of another training too
        (directory / f"{CONNECTORS}.safetensors").unlink(missing_ok=True)
        shutil.rmtree(directory / ANCHORS, ignore_errors=True)
    # What a killed process wrote half, and how the run ended before.
    for old in (*directory.glob("*.tmp"), directory / "diverged.json"):
        old.unlink(missing_ok=True)
    write_record(directory / "config.json", config.as_json())
    return None


@on_process_zero
def _finish(directory: Path, record: dict[str, Any], variables: Any, average: Any) -> None:
    if average is not None:
        save_variables(directory / "student-ema.safetensors", average)
    save_variables(directory / "student.safetensors", variables)
    write_record(directory / "record.json", record)
