"""The front door: `distill` trains a student, saves it and records it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from abflax.abreast import Steps, drive
from abflax.checkpoint import Checkpoints
from abflax.classroom import Classroom
from abflax.compatibility import require_compatible
from abflax.config import NO_TEST, Resources, RunConfig, Seeds
from abflax.data import Dataset, Photographs
from abflax.errors import InputError, NonFiniteError
from abflax.interrupt import Interrupted, StopRequest
from abflax.lock import Lock
from abflax.models import model_name
from abflax.networks import Network
from abflax.processes import highest, is_first, once, require_same, together
from abflax.progress import Reporter, Silent
from abflax.record import make_diverged, read_record, require_writable, write_record
from abflax.run import Run
from abflax.settings import described, is_of
from abflax.taps import Model
from abflax.weights import save_variables

_Member = tuple[RunConfig, Model | Network]
"""A run's configuration, and its student."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
      record: see `abflax.record`.
      variables: the student's `params` and `batch_stats`; None where the run was finished before
        and its directory was read instead (`directory / "student.safetensors"` has them).
      directory: where record and weights lie; None without a workdir.
      abreast: the results of the students trained beside this one, in the order asked for.
    """

    record: dict[str, Any]
    variables: Any | None
    directory: Path | None
    abreast: tuple[Result, ...] = ()


def distill(
    student: Model | Network,
    teacher: Network | None,
    data: Dataset | Photographs,
    *,
    test: Dataset | Photographs | None = None,
    method: str = "activation-boundary",
    protocol: str = "paper",
    setting: str = "cifar",
    epochs: tuple[int, int] = (20, 100),
    batch_size: int = 128,
    fraction: float = 1.0,
    evaluate_every: int = 1,
    seeds: Seeds | int = 0,
    abreast: tuple[Mapping[str, Any], ...] = (),
    precision: str = "float32",
    views: int | None = None,
    per_class: int | None = None,
    workdir: str | Path | None = None,
    force: bool = False,
    resources: Resources | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Result:
    """Trains a student, with or without a teacher, by one method, for one seed.

    Where `jax.distributed` is initialised, all its processes call this with the same arguments, and
    train together: see `abflax.processes`.

    Args:
      student: any Linen module with taps (or without, where the method needs none); one that
        sows none gets them by path, `Tapped(module, {"layer1": "Conv_0"})`. A `Network` begins with
        its weights; modules that these lack (a classifier over other classes) begin fresh.
      teacher: None only for methods that need none; given to those, agreement with it is measured
        where both have the same neurons.
      data: the training data, as `abflax.load` or `abflax.data.read_folder` gives it, or
        `Dataset(images, labels)`.
      test: held-out data for error and agreement; None: neither is measured.
      method: a name in `abflax.methods.METHODS`, or several joined by "+"; `**options` are its
        options.
      protocol, setting: see `abflax.methods`.
      epochs: of initialise and classify; a joint phase has their sum.
      batch_size, fraction, evaluate_every, seeds, precision, views, per_class: see
        `abflax.RunConfig`; an integer seed stands for all four.
      abreast: further runs in the same program: all see the same batches, and the teacher is asked
        once for all of them. Each is told by the keywords that it changes (`{"margin": 2.0}`,
        `{"student": other}`, `{"seeds": dataclasses.replace(seeds, weights=4)}`; one that names a
        method has its own options alone), and is a run of its own, with its own directory,
        checkpoints and record (which says how many were trained together); it may be gone on with
        alone. Where one fails, the others go on to their ends, and its error is raised then;
        without a workdir at once.
      workdir: where `runs/HASH/` with checkpoints, record and weights goes; None: nothing is
        written. The same call again goes on where it stopped, or returns the finished record.
      force: do a finished run again; one that is not finished goes on.
      resources: see `abflax.Resources`; None: its defaults.
      reporter: told of progress.

    Raises:
      ValueError: if something that was given cannot be right; nothing is written then, but where
        targets that are to be kept do not fit, which is seen when a phase begins.
      BusyError: if another process is at this run; a `ValueError` too.
      NonFiniteError: if a loss or gradient is NaN or infinite.
      LostError: if another process of the run is gone.
      DiskError: if checkpoint, weights or record cannot be written; the same call goes on from the
        checkpoint before.
      Interrupted: after SIGINT or SIGTERM, when the checkpoint is written.

    Examples:
      Any two Linen modules, a tap each, and one epoch of either phase on 64 digits:

      >>> from flax import linen as nn
      >>> from abflax import Dataset, Network, Tapped, distill, load
      >>> class Net(nn.Module):
      ...     width: int
      ...     @nn.compact
      ...     def __call__(self, images):
      ...         x = nn.relu(nn.Conv(self.width, (3, 3), strides=2)(images))
      ...         return nn.Dense(10)(x.mean(axis=(1, 2)))
      >>> student, teacher = (Tapped(Net(width), {"layer1": "Conv_0"}) for width in (4, 8))
      >>> data = load("digits", "train").take(range(64))
      >>> variables = teacher.model.init(jax.random.key(0), data.images)
      >>> result = distill(student, Network(teacher, variables), data, epochs=(1, 1), batch_size=64)
      >>> [entry["phase"] for entry in result.record["history"]]
      ['initialise', 'classify']
      >>> jax.tree.map(jax.numpy.shape, result.variables["params"]["Dense_0"])
      {'bias': (10,), 'kernel': (4, 10)}
    """
    for name, value, kind in (
        ("teacher", teacher, Network | None),
        ("data", data, Dataset | Photographs),
        ("test", test, Dataset | Photographs | None),
        ("abreast", abreast, tuple[Mapping[str, Any], ...]),
        ("workdir", workdir, str | Path | None),
    ):
        _require(name, value, kind)
    own: dict[str, Any] = {
        "student": student, "method": method, "protocol": protocol, "setting": setting,
        "epochs": epochs, "batch_size": batch_size, "fraction": fraction, "seeds": seeds,
        "evaluate_every": evaluate_every, "precision": precision, "views": views,
        "per_class": per_class,
    }  # fmt: skip
    common = {
        "dataset": data.name,
        "teacher": teacher.name if teacher is not None else None,
        "test": NO_TEST if test is None else test.name if test.name != data.name else None,
    }
    changed = (each if "method" in each else options | dict(each) for each in abreast)
    members = [_member(common, own, each) for each in (options, *changed)]
    _require_together([config for config, _ in members])
    for config, _ in members:
        if workdir is not None and re.search(r"<lambda>| at 0x", config.student):
            raise InputError(
                f"the student {config.student} has a field without a name, so its run could not "
                "be found again: use named functions, or no workdir"
            )
    reporter, resources = reporter or Silent(), resources or Resources()
    directories = {
        config.hash: None if workdir is None else Path(workdir) / "runs" / config.hash
        for config, _ in members
    }
    asked = [config for config, _ in members]
    with together(), jax.enable_x64(precision == "float64"), StopRequest() as stop:
        require_same("what it was asked for", repr((asked, resources, force, workdir is None)))
        results: dict[str, Result] = {}
        for name, directory in directories.items():
            if directory is not None and not force and (done := _finished(directory)):
                reporter.finished(f"{name} is finished already: {directory}")
                results[name] = Result(done, None, directory)
        left = [(config, its) for config, its in members if config.hash not in results]
        for config, its in left:
            require_compatible(config, its, teacher, data, test)
        if left:
            classroom = Classroom(asked[0], teacher, data, test, resources, len(left))
            results |= _teach(classroom, left, directories, force, reporter, stop)
        late = highest(stop.signal)
    if left and late:  # it came too late to stop this run
        raise Interrupted(f"{', '.join(config.hash for config, _ in left)}: finished", late)
    first, *others = (results[name] for name in directories)
    return dataclasses.replace(first, abreast=tuple(others))


def _teach(
    classroom: Classroom,
    members: Sequence[_Member],
    directories: Mapping[str, Path | None],
    force: bool,
    reporter: Reporter,
    stop: StopRequest,
) -> dict[str, Result]:
    """Takes runs of one classroom to their ends, and closes it."""
    with contextlib.closing(classroom):
        runs = [Run(config, student, classroom, Silent()) for config, student in members]
        max(runs, key=lambda run: run.steps).reporter = reporter
        steps = {
            run.config.hash: _to_its_end(run, directories[run.config.hash], force, reporter)
            for run in runs
        }
        goes_on = None not in directories.values()  # else what the others make would be lost
        return drive(steps, classroom.make, stop, goes_on)


def _member(
    common: Mapping[str, Any], own: Mapping[str, Any], changed: Mapping[str, Any]
) -> _Member:
    """A run's configuration and student, of `distill`'s own keywords and those that it changes."""
    settings = {**own, **changed}
    student, seeds = settings.pop("student"), settings.pop("seeds")
    for name, value, kind in (("student", student, Model | Network), ("seeds", seeds, Seeds | int)):
        _require(name, value, kind)
    options = {name: settings.pop(name) for name in changed.keys() - own.keys()}
    kept = {name for name, each in inspect.signature(distill).parameters.items()
            if each.kind is not each.VAR_KEYWORD}  # fmt: skip
    for name in options.keys() & kept:
        raise InputError(f"{name} is the same for all runs abreast")
    config = RunConfig(
        student=str(student.name) if isinstance(student, Network) else model_name(student),
        seeds=seeds if isinstance(seeds, Seeds) else Seeds.all(seeds),
        options=tuple(sorted(options.items())),
        **common,
        **settings,
    )
    return config, student


def _require(name: str, value: Any, kind: Any) -> None:
    if not is_of(value, kind):
        raise InputError(f"{name} must be {described(kind)}, not {value!r}")


def _require_together(configs: Sequence[RunConfig]) -> None:
    """Raises `InputError` for runs that are the same, or cannot be taught together."""
    first, *others = configs
    for other in others:
        for name, value in first.lesson.items():
            if other.lesson[name] != value:
                raise InputError(
                    "runs abreast see the same batches of the same teacher, but of two of them "
                    f"{name}: {value}, and {other.lesson[name]}"
                )
    hashes = [config.hash for config in configs]
    for config in configs:
        if hashes.count(config.hash) > 1:
            seed = config.seeds.weights
            raise InputError(f"{config.method}, seed {seed}, is asked for twice abreast")


def _to_its_end(run: Run, directory: Path | None, force: bool, reporter: Reporter) -> Steps[Result]:
    """A run from where it stands to its end."""
    try:
        if directory is None:
            return Result(*(yield from run.train(None)), None)
        once(require_writable)(directory)
        with Lock(directory / "lock", f"run {run.config.hash}"):
            return (yield from _train_in(directory, run, force))
    except Exception as error:
        if run.classroom.students > 1:  # the others may go on for hours
            reporter.finished(f"{run.config.hash} has failed: {error}")
        raise


@once
def _finished(directory: Path) -> dict[str, Any] | None:
    """The record of a finished run whose directory is tidy; None: something is left to do."""
    untidy = os.path.exists(directory / "checkpoints")  # False where it may not be looked at
    return None if untidy else read_record(directory / "record.json")


def _train_in(directory: Path, run: Run, force: bool) -> Steps[Result]:
    """Trains with checkpoints in `directory`, which record and weights replace at the end.

    Only for who holds the directory's lock.
    """
    if done := _begin(directory, run.config, force):
        return Result(done, None, directory)
    with Checkpoints(directory / "checkpoints") as kept:
        events = (
            directory / "events" if run.classroom.resources.tensorboard and is_first() else None
        )
        try:
            record, variables = yield from run.train(kept, events)
        except NonFiniteError as error:
            _diverge(directory, run, error)
            raise
    _finish(directory, record, variables)
    return Result(record, variables, directory)


@once
def _begin(directory: Path, config: RunConfig, force: bool) -> dict[str, Any] | None:
    """Tidies a run's directory up. Returns its record if it has been finished meanwhile."""
    path = directory / "record.json"
    if path.exists():  # to be done again, finished by another process just now, or not tidied up
        done = None if force else read_record(path)
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        if done is not None:
            return done
        path.unlink()
    # What a process wrote half that was killed, and how the run ended before.
    for old in (*directory.glob("*.tmp"), directory / "diverged.json"):
        old.unlink(missing_ok=True)
    write_record(directory / "config.json", config.as_json())
    return None


@once
def _diverge(directory: Path, run: Run, error: NonFiniteError) -> None:
    """Writes how a run has ended whose numbers went wrong, so that no mean forgets it."""
    ended = make_diverged(run.config, str(error), dict(run.classroom.environment))
    write_record(directory / "diverged.json", ended)


@once
def _finish(directory: Path, record: dict[str, Any], variables: Any) -> None:
    """Writes what a run has made in place of its checkpoints."""
    save_variables(directory / "student.safetensors", variables)
    write_record(directory / "record.json", record)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
