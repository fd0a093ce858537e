"""The front door: `distill` trains a student, saves it and records it; `distill_group` several."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from abflax.config import NO_TEST, Resources, RunConfig
from abflax.data import Batches, Dataset, DataSets, ImageFiles, TrainData
from abflax.errors import InputError, brief, local_path, require_instances
from abflax.metrics import Metric
from abflax.models.network import Network, as_network, require_network, student_name
from abflax.runtime.distributed import (
    detect_lost_process,
    is_first,
    max_over_processes,
    require_same,
)
from abflax.runtime.jax_checks import jax_defaults, require_devices
from abflax.runtime.preemption import Interrupted, Preemption
from abflax.runtime.reporter import NullReporter, Reporter
from abflax.taps import Model, require_model
from abflax.training.compatibility import (
    require_compatible,
    require_groupable,
    require_metrics,
    require_teachers,
)
from abflax.training.fingerprint import (
    Fingerprint,
    fingerprints,
    program_digests,
    require_same_run,
)
from abflax.training.group import TrainingGroup
from abflax.training.history import anchor_epochs, phases_and_schedules
from abflax.training.loop import train
from abflax.training.run import Run
from abflax.training.run_directory import Result, RunDirectory, finished_record, require_anchors


def distill(  # noqa: PLR0913 - the front door
    student: Model | Network,
    teacher: Network | Model | Sequence[Network | Model] | None,
    data: TrainData,
    *,
    test: Dataset | ImageFiles | None = None,
    target_data: Dataset | None = None,
    config: RunConfig | None = None,
    workdir: str | Path | None = None,
    force: bool = False,
    resources: Resources | None = None,
    reporter: Reporter | None = None,
    metrics: Mapping[str, Metric] | None = None,
    **settings: Any,
) -> Result:
    """Trains a student, with or without a teacher, by one method, for one seed.

    Where `jax.distributed` is initialized, all its processes call this with the same arguments and
    train together: see `abflax.runtime.distributed`.

    Args:
      student: any Linen or NNX module with taps (or without, where the method needs none); one
        that sows none gets them by path, `Tapped(module, {"layer1": "Conv_0"})`. A `Network` starts
        with its weights; modules that these lack (a classifier over other classes) start fresh. An
        NNX module is copied, and starts with the weights it has.
      teacher: a `Network` or an NNX module; None only for methods that need none; given to those,
        agreement with it is measured where both have the same neurons. A list of them is a route
        (RCO, Jin et al., ICCV 2019): checkpoints of one teacher's training, its *anchors*, each of
        which is followed for an equal share of the epochs, with all phases of the method.
      data: the training data, as `abflax.load` or `abflax.data.read_folder` gives it, or
        `Dataset(images, labels)`; or `Batches(loader, num_classes)`.
      test: held-out data for error and agreement; None: neither is measured.
      target_data: unlabelled images of another domain, `Dataset(images)`, for methods that learn
        from both (`progressive-uda`); `test` is then of that domain, as a rule.
      config: settings to start from; None: the defaults of `abflax.RunConfig`. The names of
        networks and data are replaced by those that are given here.
      workdir: where `runs/HASH/` with checkpoints, record and weights goes; None: nothing is
        written. The same call again resumes where it stopped, or returns the finished record.
      force: train a finished run again; one that is not finished is resumed.
      resources: see `abflax.Resources`; None: its defaults.
      reporter: shows progress; None: none is shown, and the logger `abflax` tells of a run that was
        finished before.
      metrics: what is measured at each evaluation besides, by name: functions (logits
        `[batch, classes]`, labels `[batch]`) -> a number or boolean for each example, `[batch]`.
        Their means over the held-out data are in history and record.
      **settings: what changes the run's numbers: fields of `abflax.RunConfig` (`method`, `epochs`,
        `seeds`, `learning_rate`, `optimizer`, `ema`, `augment`, …; a method is a name or a list of
        `abflax.methods.Phase`, an optimizer an `optax.GradientTransformation`), and
        fields of the method's terms (`margin`, `layers`, …); see `RunConfig.create`.

    Returns:
      The record, the trained variables, and where they are saved.

    Raises:
      ValueError: if something that was given cannot be right. Nothing is written then, except
        where targets that are to be cached do not fit, which is seen when a phase begins.
      BusyError: if another process is training this run; a `ValueError` too.
      NonFiniteError: if a loss or gradient is NaN or infinite.
      LostError: if another process of the run is gone.
      DiskError: if checkpoint, weights or record cannot be written; the same call resumes from the
        checkpoint before.
      Interrupted: after SIGINT, SIGTERM or SIGALRM, when the checkpoint is written.

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
    (result,) = distill_group(
        [settings], student, teacher, data, test=test, target_data=target_data, config=config,
        workdir=workdir, force=force, resources=resources, reporter=reporter, metrics=metrics,
    )  # fmt: skip
    return result


@jax_defaults()
def distill_group(  # noqa: PLR0913 - the front door
    runs: Sequence[Mapping[str, Any]],
    student: Model | Network,
    teacher: Network | Model | Sequence[Network | Model] | None,
    data: TrainData,
    *,
    test: Dataset | ImageFiles | None = None,
    target_data: Dataset | None = None,
    config: RunConfig | None = None,
    workdir: str | Path | None = None,
    force: bool = False,
    resources: Resources | None = None,
    reporter: Reporter | None = None,
    metrics: Mapping[str, Metric] | None = None,
    **settings: Any,
) -> list[Result]:
    """Trains several runs in one program, which share batches and the teacher's forward pass.

    Each is a run of its own, with the numbers of a run alone, its own directory, checkpoints and
    record (which says how many were trained together); it may be resumed alone. A run that fails
    leaves the others running, and its error is raised at the end; without a workdir at once.

    Args:
      runs: of each the settings in which it differs: `{"margin": 2.0}`, `{"student": other}`,
        `{"seeds": dataclasses.replace(seeds, weights=4)}`.
      student: as `distill` takes it, of the runs that do not name another.
      teacher: as `distill` takes it and all that follows; the same for all runs.
      data: the training data.
      test: held-out data.
      target_data: unlabelled images of another domain.
      config: settings to start from.
      workdir: where runs are saved.
      force: train finished runs again.
      resources: see `abflax.Resources`.
      reporter: shows progress, that of the longest run.
      metrics: as `distill` takes them.
      **settings: of all runs.

    Returns:
      The results, in the order of `runs`.

    Raises:
      ValueError: if two runs are the same, or cannot be trained together: of these the batches, the
        teacher and the epochs in which its statistics drift must be the same. And as `distill`.

    Example:
      `distill_group([{"margin": 1.0}, {"margin": 2.0}], student, teacher, data, epochs=(1, 1))`
    """
    teachers = _networks(teacher)
    require_devices()
    if isinstance(test, Batches):
        raise InputError("test is a Dataset: Batches(…).read() reads one pass into memory")
    require_instances({
        "data": (data, TrainData),
        "test": (test, Dataset | ImageFiles | None),
        "target_data": (target_data, Dataset | None),
        "config": (config, RunConfig | None),
        "workdir": (workdir, str | Path | None),
        "force": (force, bool),
        "reporter": (reporter, Reporter | None),
        "resources": (resources, Resources | None),
    })  # fmt: skip
    data_sets = DataSets(data, test, target_data)
    members = [
        _configure(run, student, teachers, data_sets, config, settings)
        for run in _checked_runs(runs)
    ]
    configs = [run_config for run_config, _ in members]
    require_groupable(configs)
    if metrics and test is None:
        raise InputError("metrics are measured on held-out data: give test")
    metrics = require_metrics(metrics, data.num_classes)
    resources = resources or Resources()
    paths: dict[str, Path | None] = dict.fromkeys((each.hash for each in configs), None)
    if workdir is not None:
        paths = {name: local_path(workdir) / "runs" / name for name in paths}
    float64 = configs[0].precision == "float64"
    with detect_lost_process(), jax.enable_x64(float64), Preemption() as preemption:
        # The processes of a distributed run were started with the same arguments.
        require_same("its arguments", repr((configs, resources, force, workdir is None)))
        for run_config, run_student in members:
            for network in teachers or (None,):
                require_compatible(run_config, run_student, network, data_sets)
            require_teachers(run_config, teachers, data.image_shape)
        programs = program_digests(members, teachers, data, metrics)
        own = {}
        if workdir is not None:
            own = fingerprints(members, teachers, data_sets, programs)
        require_same("the data, the networks or the versions", repr(own))
        results = {} if force else _finished(paths, own, reporter, resources.keep_anchors, data)
        left = [member for member in members if member[0].hash not in results]
        if left:
            group = TrainingGroup(
                configs[0], teachers, data_sets, resources, size=len(left), metrics=metrics,
                keep_going=workdir is not None, reporter=reporter or NullReporter(),
                preemption=preemption, code=programs,
            )  # fmt: skip
            with contextlib.closing(group):
                directories = [
                    RunDirectory(paths[each.hash], each, force, own.get(each.hash))
                    for each, _ in left
                ]
                results |= _train_group(left, group, directories)
        late = max_over_processes(preemption.signal)
    if left and late:  # the signal came too late to stop this run
        raise Interrupted(f"{', '.join(each.hash for each, _ in left)}: finished", late)
    return [
        dataclasses.replace(results[each.hash], model=_model_of(student))
        for each, student in members
    ]


def _networks(teacher: Any) -> tuple[Network, ...]:
    """The teachers, in the order in which they are followed."""
    if teacher is None:
        return ()
    if not isinstance(teacher, Sequence):
        return (require_network("teacher", teacher),)
    if not teacher:
        raise InputError("a list of teachers needs at least one; without a teacher give None")
    return tuple(require_network("teacher", each) for each in teacher)


def _model_of(student: Model | Network) -> Model:
    return student.model if isinstance(student, Network) else student


def _train_group(
    members: Sequence[tuple[RunConfig, Model | Network]],
    group: TrainingGroup,
    directories: Sequence[RunDirectory],
) -> dict[str, Result]:
    """Trains what is left of a group. Progress is that of its longest run."""
    examples = len(group.data)
    lengths = [phases_and_schedules(config, examples)[1][-1].end for config, _ in members]
    longest = lengths.index(max(lengths))
    with contextlib.ExitStack() as open_directories:
        runs = []
        for index, ((config, student), directory) in enumerate(
            zip(members, directories, strict=True)
        ):
            open_directories.callback(directory.close)
            reporter = group.reporter if index == longest else NullReporter()
            runs.append(Run(config, student, group, directory, reporter))
        train(runs, group)
    errors = [run.error for run in runs if run.error is not None]
    if errors:
        raise next((each for each in errors if isinstance(each, Interrupted)), errors[0])
    return {run.config.hash: run.result for run in runs if run.result is not None}


def _configure(
    run: Mapping[str, Any],
    student: Model | Network,
    teachers: Sequence[Network],
    data_sets: DataSets,
    config: RunConfig | None,
    settings: Mapping[str, Any],
) -> tuple[RunConfig, Model | Network]:
    """The configuration and the student of one run of a group."""
    student = as_network(run.get("student", student))
    if not isinstance(student, Network):
        require_model("student", student)
    own = {name: value for name, value in run.items() if name != "student"}
    data, test, target = data_sets.train, data_sets.test, data_sets.target
    name = student.name if isinstance(student, Network) else student_name(student, data.image_shape)
    names: dict[str, Any] = {
        "dataset": data.name,
        "student": str(name),
        "teacher": teachers[-1].name if teachers else None,
        "anchors": tuple(str(each.name) for each in teachers[:-1]) or None,
        "test": NO_TEST if test is None else test.name if test.name != data.name else None,
        "target_data": None if target is None else target.name,
    }
    for fixed in {*settings, *own} & {"dataset", "teacher", "test", "anchors", "target_data"}:
        raise InputError(f"{fixed} is the same for all runs, and follows from the arguments")
    if isinstance(data, Batches):
        names = {"batch_size": data.batch_size, **names}
        names |= {k: v for k, v in {**settings, **own}.items() if k == "batch_size"}
    if config is None:
        config = RunConfig(dataset=names["dataset"], student=names["student"])
    return config.replace(**{**settings, **own, **names}), student


def _checked_runs(runs: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(runs, Mapping) or not isinstance(runs, Sequence) or not runs:
        raise InputError("runs must be a list of settings by name, one for each run")
    for run in runs:
        if not isinstance(run, Mapping) or not all(isinstance(name, str) for name in run):
            raise InputError(f"runs must be a list of settings by name, not of {brief(run)}")
    return runs


def _finished(
    paths: Mapping[str, Path | None],
    own: Mapping[str, Fingerprint],
    reporter: Reporter | None,
    anchors: int,
    data: TrainData,
) -> dict[str, Result]:
    """The results of the runs that were finished before.

    Raises if they are other experiments', or lack some of so many anchors.
    """
    results = {}
    for name, path in paths.items():
        if path is not None and (record := finished_record(path)):
            note = require_same_run(path, own[name])
            if anchors:
                epochs = anchor_epochs((each["epoch"] for each in record["history"]), anchors)
                require_anchors(path, epochs, record.get("anchors", {}))
            notes = [f"{name} is finished already: {path}", *([note] if note else [])]
            if isinstance(data, Batches):
                notes.append(f"its loader is known by {data.known_by}")
            said = "; ".join(notes)
            if reporter is not None:
                reporter.finished(said)
            elif is_first():
                logging.getLogger("abflax").warning("%s", said)
            results[name] = Result(record, None, path)
    return results
