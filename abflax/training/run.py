"""One student trained once: its state, its history, and what happens to it between dispatches."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax.config import RunConfig
from abflax.data import Batches
from abflax.errors import DiskError, InputError, NonFiniteError
from abflax.methods.objective import connectors_in
from abflax.models.network import Network, configure_model, digest
from abflax.models.variables import not_finite
from abflax.runtime.distributed import max_over_processes
from abflax.runtime.preemption import Interrupted
from abflax.runtime.reporter import NullReporter, Reporter
from abflax.taps import Model
from abflax.training.compatibility import require_cacheable, require_synchronized
from abflax.training.devices import AXIS, replicate
from abflax.training.diagnosis import Trend, describe_nonfinite, norm_of
from abflax.training.group import Teacher, TrainingGroup
from abflax.training.history import (
    TrainHistory,
    anchor_epochs,
    begins,
    evaluation_steps,
    phases_and_schedules,
)
from abflax.training.parallel import compile_phase
from abflax.training.record import describe_images, make_diverged, make_record
from abflax.training.run_directory import Result, RunDirectory
from abflax.training.step import TrainState
from abflax.training.target_cache import cached_targets


class Run:
    """A student in training.

    `abflax.training.loop.train` calls `restore`, then `update` after each dispatch and `record`
    after each evaluation, and `stop` or `fail` where a run ends early.

    Args:
      config: the run's configuration.
      student: the model, with the weights that it starts with if it is a `Network`.
      group: what the run shares with others.
      directory: where it is saved.
      reporter: shows its progress.

    Attributes:
      program: the compiled functions of the current phase.
      state: the state of the current phase.
      cached_targets: of the current phase, if they are cached.
      snapshot: (step, state) of the newest copy on the host: plain arrays, safe from donation.
      snapshot_position: that of a loader then.
      result: once the run is finished.
      error: what ended it early.
    """

    def __init__(
        self,
        config: RunConfig,
        student: Model | Network,
        group: TrainingGroup,
        directory: RunDirectory,
        reporter: Reporter,
    ) -> None:
        self.config, self.group, self.directory, self.reporter = config, group, directory, reporter
        self._given_variables: Any = {}
        if isinstance(student, Network):
            self._given_variables = student.variables
            student = student.model
        self._examples = examples = len(group.data)
        self.phases, self.schedules = phases_and_schedules(config, examples)
        if group.resources.cache_targets:
            require_cacheable(self.phases, group.spec.streamed, config.augment)
        self.evaluations = evaluation_steps(config, self.schedules, examples)
        self._anchor_epochs: set[int] = set()
        if keep := group.resources.keep_anchors:
            if directory.path is None:
                raise InputError("anchors are kept in a run's folder: give a workdir")
            self._anchor_epochs = anchor_epochs(self.evaluations.values(), keep)
        model, spec = configure_model(student, config.precision, AXIS), group.spec_of(config)
        self._programs = [
            compile_phase(model, group.teachers[phase.teacher].model, phase, schedule, spec)
            for phase, schedule in zip(self.phases, self.schedules, strict=True)
        ]
        for teacher in group.teachers:
            require_synchronized(student, teacher.model, group.spec)
        self.history = TrainHistory()
        self.program = self._programs[0]
        self.state: Any = None
        self.cached_targets: Any = None
        self.snapshot: tuple[int, Any] = (0, None)
        self.snapshot_position: str | None = None
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._trend = Trend(0.0)
        self._pending: list[tuple[int, dict[str, Any], int]] = []  # (first step, metrics, count)
        self._clock = self._saved = time.perf_counter()

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result is not None or self.error is not None

    @property
    def step(self) -> int:
        """Steps that have been made."""
        return self.history.step

    @property
    def teacher(self) -> Teacher:
        """The teacher of the current phase."""
        return self.group.teachers[self.phases[self.history.phase].teacher]

    @property
    def next_evaluation(self) -> int:
        """The step after which the student is evaluated next."""
        return min(step for step in self.evaluations if step > self.step)

    @property
    def at_evaluation(self) -> bool:
        """Whether the student is to be evaluated now."""
        return self.step in self.evaluations

    def restore(self) -> None:
        """Opens the run's folder, and starts from its newest checkpoint or from the beginning.

        Raises:
          BusyError: if another process is training the run.
          ValueError: if no checkpoint can be read, or it is of another configuration.
        """
        self.result = self.directory.open(self._begins_with, self._anchor_epochs)
        if self.result is not None:
            return
        if self.directory.note:
            self._say(self.directory.note)
        description = self.directory.latest()
        if description is None:
            self._begin_phase(0, None)
        else:
            self._restore_checkpoint(description)
            if isinstance(self.group.data, Batches):
                self._say(f"it goes on with a loader that is known by {self.group.data.known_by}")
        self.history.group_size = max(self.history.group_size, self.group.size)
        if self.group.resources.tensorboard:
            self.directory.log_to_tensorboard(self.history.entries)
        self._enter_phase()

    def update(self, state: TrainState, metrics: dict[str, Any], count: int) -> None:
        """Takes the state and metrics of the next `count` steps, and saves if a checkpoint is due.

        The metrics are read one dispatch late, so that nobody waits for what has just started.

        Raises:
          NonFiniteError: if a loss or a gradient is NaN or infinite.
          DiskError: if the checkpoint cannot be written.
        """
        self.state = state
        self._pending.append((self.step, metrics, count))
        self.history.step += count
        self.history.position = self.group.inputs.position
        loss = self._read_metrics(leave=0 if self.at_evaluation else 1)
        schedule = self.schedules[self.history.phase]
        epoch = float((self.step - schedule.start) / schedule.steps_per_epoch)
        self.reporter.steps(count, count * self.config.batch_size, epoch, loss)
        due = time.perf_counter() - self._saved > self.group.resources.checkpoint_seconds
        if max_over_processes(due) and not self.at_evaluation:
            self.save()

    def record(self, measured: dict[str, Any]) -> None:
        """Adds an evaluation to the history, saves, and at the end of a phase begins the next.

        At the end of the last phase the run is finished.

        Args:
          measured: on held-out data; empty without any.

        Raises:
          NonFiniteError: if the held-out loss is NaN or infinite.
          DiskError: if a file cannot be written.
        """
        entry = self._entry(measured)
        self.history.entries.append(entry)
        self.directory.log(entry)
        self.reporter.evaluated(entry)
        self.save()
        if self.step == self.schedules[self.history.phase].end:
            self.reporter.finished()
            self._next_phase()

    def save(self) -> None:
        """Saves a checkpoint in the background; before it the anchor, if the student is one.

        Raises:
          NonFiniteError: if a weight of the student is NaN or infinite.
          DiskError: if it cannot be written.
        """
        self._read_metrics(leave=0)
        self._clock = self.history.add_time(self.phases[self.history.phase].name, self._clock)
        self._take_snapshot()
        if names := not_finite(self.snapshot[1].student):
            raise NonFiniteError(
                f"the student's {names[0]} is not finite after step {self.step} of the run; "
                f"{self._last_checkpoint()}"
            )
        epoch = self.evaluations.get(self.step)
        if epoch in self._anchor_epochs:
            self.history.anchors[str(epoch)] = digest(self.snapshot[1].student)
            self.directory.keep_anchor(epoch, self.snapshot[1].student)
        history = dataclasses.asdict(self.history)
        description = {"config": self.config.as_json(), "history": history}
        self.directory.save(self.step, self.snapshot[1], description)
        self._saved = time.perf_counter()

    def stop(self, signal: int) -> None:
        """Saves and ends the run because of a signal: its error is `Interrupted` then."""
        self.save()
        self.directory.wait()
        where = "nothing is kept, since the run has no workdir"
        if self.directory.path is not None:
            where = f"the same command goes on from step {self.step}"
        phase = self.phases[self.history.phase].name
        message = f"stopped in phase {phase} of {self.config.hash}; {where}"
        self.error = Interrupted(message, signal)
        self.directory.close()

    def fail(self, error: Exception) -> None:
        """Ends the run because of an error."""
        self.error = error
        if self.group.size > 1:
            self.group.reporter.finished(f"{self.config.hash} has failed: {error}")
        try:
            if isinstance(error, NonFiniteError):
                made_by = dict(self.group.environment)
                self.directory.diverge(make_diverged(self.config, str(error), made_by))
            self.directory.close()
        except DiskError as full:
            self.error = full

    def _begin_phase(self, index: int, before: TrainState | None) -> None:
        """Sets the state at the start of a phase, with new connectors and a new optimizer.

        The student is that of the phase before, or a new one with the weights that were given.
        """
        key, program = jax.random.key(self.config.seeds.weights), self._programs[index]
        if before is None:
            student = program.init(jax.random.fold_in(key, 0))
            student = _with_given_variables(student, self._given_variables)
        else:
            student, teacher_stats = before.student, before.batch_stats["teacher"]
        teacher = self.phases[index].teacher
        last = self.phases[index - 1]
        connectors = {} if before is None else before.params["connectors"]
        if before is None or teacher != last.teacher or last.trains_teacher:
            teacher_stats = self.group.teachers[teacher].stats
        params = jax.tree.map(np.asarray, self.group.teachers[teacher].params)
        key = jax.random.fold_in(key, 1 + index)
        state = program.begin(student, teacher_stats, key, params, connectors)
        self.state = replicate(jax.tree.map(np.array, state), self.group.spec.devices)
        self.history.phase = index
        self._take_snapshot()

    def _enter_phase(self) -> None:
        """Prepares for training the current phase, from its start or from a checkpoint in it."""
        phase, schedule = self.phases[self.history.phase], self.schedules[self.history.phase]
        if self.step == schedule.end:  # the checkpoint of the end of a phase
            self._next_phase()
            return
        self.program = self._programs[self.history.phase]
        self._clock = self._saved = time.perf_counter()
        self.cached_targets = None  # frees those of the phase before
        if self.group.resources.cache_targets:
            self.cached_targets = cached_targets(
                self.program, self.group.spec, self.teacher.params,
                self.state.batch_stats["teacher"], self.group.inputs.resident["images"],
                self.config.batch_size, self._report_targets,
            )  # fmt: skip
        self._trend = Trend(norm_of(self.snapshot[1].params["student"]))
        done = self.step - schedule.start
        self.reporter.phase(self._label(), phase.name, schedule.steps, done, schedule.epochs)

    def _report_targets(self, done: int, batches: int) -> None:
        """Shows how far the teacher's targets are computed. Raises `Interrupted` on a signal."""
        if signal := max_over_processes(self.group.preemption.signal):
            raise Interrupted(
                f"stopped while the targets of {self.config.hash} were computed; the same command "
                "computes them anew",
                signal,
            )
        if not done:
            self.reporter.phase(self._label(), "targets", batches, 0, 1)
            return
        self.reporter.steps(1, self.config.batch_size, done / batches, None)
        if done == batches:
            self.reporter.finished()

    def _next_phase(self) -> None:
        """Begins the next phase, or finishes the run after the last. Keeps the connectors."""
        objective, end = self._programs[self.history.phase].objective, self.snapshot[1]
        if connectors := connectors_in(objective, end.params, end.batch_stats):
            self.history.connectors = digest(connectors)
            self.directory.keep_connectors(connectors)
        if self.history.phase + 1 < len(self.phases):
            self._begin_phase(self.history.phase + 1, self.state)
            self._enter_phase()
        else:
            variables, average = self.snapshot[1].student, self.snapshot[1].average
            record = self._make_record(digest(variables))
            if warning := self.history.describe_growth():
                record["warning"] = warning
                self.group.reporter.finished(f"{self.config.hash}: {warning}")
                if isinstance(self.group.reporter, NullReporter):
                    warnings.warn(f"{self.config.hash}: {warning}", RuntimeWarning, stacklevel=1)
            if average is not None:
                record["ema_weights"] = digest(average)
            if self.history.connectors is not None:
                record["connectors"] = self.history.connectors
            if self.history.anchors:
                record["anchors"] = self.history.anchors
            if self.history.grown_from is not None:
                record["grown_from"] = self.history.grown_from
            self.result = self.directory.finish(
                record, variables, average, self.phases[-1].optimizer.endless
            )

    def _restore_checkpoint(self, description: dict[str, Any]) -> None:
        """Sets history and state to those of the newest checkpoint."""
        if "history" not in description:
            raise InputError(
                f"the checkpoints in {self.directory.path} are of an older version of abflax: "
                "remove that folder to begin anew"
            )
        saved, own = description["config"], self.config.as_json()
        differing = sorted(k for k in {*saved, *own} if saved.get(k) != own.get(k))
        grown = differing == ["epochs"] and self._begins_with(tuple(saved["epochs"]))
        if differing and not grown:
            raise InputError(
                f"the checkpoint in {self.directory.path} is of another configuration: "
                f"{', '.join(f'{k} is {saved.get(k)!r}, not {own.get(k)!r}' for k in differing)}"
            )
        description, state = self.directory.restore(
            lambda found: jax.eval_shape(lambda: self._abstract_state(found["history"]["phase"]))
        )
        self.history = TrainHistory(**description["history"])
        passed = {epoch for step, epoch in self.evaluations.items() if step <= self.step}
        self.directory.require_anchors(self._anchor_epochs & passed, self.history.anchors)
        if grown:
            self.history.grown_from = RunConfig.from_json(saved).hash
        self.snapshot, self.snapshot_position = (self.step, state), self.history.position
        if isinstance(self.group.data, Batches) and self.history.position is None:
            self.history.restarts.append(self.step)
        self.state = replicate(state, self.group.spec.devices)

    def _begins_with(self, epochs: tuple[int, ...]) -> bool:
        """Whether the same run of so many epochs makes the first steps of this one."""
        return begins(dataclasses.replace(self.config, epochs=epochs), self.config, self._examples)

    def _abstract_state(self, index: int) -> TrainState:
        key, program = jax.random.key(0), self._programs[index]
        teacher = self.group.teachers[self.phases[index].teacher]
        return program.begin(program.init(key), teacher.stats, key, self._trained_teacher(index))

    def _trained_teacher(self, index: int) -> Any:
        """The weights that the teacher starts a phase with; None: it is not trained there."""
        phase = self.phases[index]
        return self.group.teachers[phase.teacher].params if phase.trains_teacher else None

    def _take_snapshot(self) -> None:
        """Copies the state to the host."""
        self.snapshot = (self.step, jax.tree.map(np.array, self.state))
        self.snapshot_position = self.history.position

    def _read_metrics(self, leave: int) -> float | None:
        """Fetches the metrics of all dispatches but the last `leave`, and checks them.

        Returns the newest loss among them. Raises `NonFiniteError`.
        """
        loss, teacher_is_finite = None, self.teacher.is_finite
        while len(self._pending) > leave:
            start, metrics, count = self._pending.pop(0)
            flat = {k: np.asarray(v) for k, v in flatten_dict(metrics, sep="/").items()}
            numbers = [flat["loss"][:count], flat["gradient_norm"][:count]]
            finite = np.isfinite([*numbers, np.full(count, 0 if teacher_is_finite else np.nan)])
            good = int(np.argmin(np.append(finite.all(axis=0), False)))
            self._trend.add(flat["loss"][:good])
            phase = self.phases[self.history.phase].name
            self.history.add_losses(phase, flat["loss"][:good])
            if good < count:
                name = ("loss", "gradient norm", "teacher")[int(np.argmin(finite[:, good]))]
                self._raise_nonfinite(name, start + good)
            self.history.add(flat, count)
            loss = float(flat["loss"][count - 1])
        return loss

    def _raise_nonfinite(self, name: str, step: int) -> None:
        """Raises, and says which array was not finite first."""
        phase, schedule = self.phases[self.history.phase], self.schedules[self.history.phase]
        raise NonFiniteError(
            f"the {name} is not finite at step {step - schedule.start} of phase {phase.name} (step "
            f"{step} of the run); {self._diagnose(step)}; {self._last_checkpoint()}"
        )

    def _diagnose(self, step: int) -> str:
        """Returns to the snapshot, repeats the steps up to the one that failed, and examines it.

        They have the same bits again; in a group, to rounding.
        """
        group, program = self.group, self.program
        if isinstance(group.data, Batches) and not group.data.resumes:
            return "the loader cannot give that batch again, so the first such array is not known"
        (self.history.step, state), self.history.position = self.snapshot, self.snapshot_position
        self.state = replicate(state, group.spec.devices)
        while self.step < step:
            count = min(group.steps_per_dispatch, step - self.step)
            ((self.state, _),) = group.train_steps([self], count)
            self.history.step += count
        inputs = group.inputs(step, 1, self.history.position)
        nonfinite = program.find_nonfinite(self.state, self.teacher.params, inputs, group.key)
        norm = norm_of(jax.tree.map(np.asarray, self.state.params["student"]))
        rate = float(program.schedule(step - self.schedules[self.history.phase].start))
        diverged = self._trend.divergence(norm, rate) or self.history.describe_growth()
        parts = [describe_nonfinite(nonfinite), diverged]
        return "; ".join(part for part in parts if part)

    def _last_checkpoint(self) -> str:
        """Where the last good checkpoint is, in half a sentence."""
        if self.directory.path is None:
            return "there is no checkpoint, since the run has no workdir"
        step = self.directory.wait()
        if step is None:
            return "it came before the first checkpoint"
        return f"the last good checkpoint is step {step}, in {self.directory.path / 'checkpoints'}"

    def _entry(self, measured: dict[str, Any]) -> dict[str, Any]:
        """The entry of the history for the evaluation at the current step."""
        schedule, phase = self.schedules[self.history.phase], self.phases[self.history.phase]
        rate = float(self.program.schedule(self.step - schedule.start - 1))
        epoch = self.evaluations[self.step]
        entry = {
            "epoch": epoch,
            "epoch_of_phase": epoch - schedule.epochs_before,
            "step": self.step,
            "phase": phase.name,
            **({} if np.isnan(rate) else {"learning_rate": rate}),
            **self.history.take_means(),
        }
        if not measured:
            return entry
        numbers = {"cross-entropy": measured["test_cross_entropy"]}
        numbers |= {f"agreement of {name}": each for name, each in measured["agreement"].items()}
        numbers |= {f"metric {name}": each for name, each in measured.get("metrics", {}).items()}
        if none := [name for name, number in numbers.items() if not np.isfinite(number)]:
            norm = norm_of(jax.tree.map(np.asarray, self.state.params["student"]))
            diverged = self._trend.divergence(norm, rate)
            raise NonFiniteError(
                f"the {none[0]} on held-out data is not finite after step {self.step} of the "
                f"run; {diverged + '; ' if diverged else ''}{self._last_checkpoint()}"
            )
        names = ["test_error", "test_cross_entropy", "agreement", "silent"]
        names += ["metrics"] * ("metrics" in measured)
        entry |= {name: measured[name] for name in names}
        if "teacher_test_error" in measured:
            entry["teacher_test_error"] = measured["teacher_test_error"]
        if "ema" in measured:
            finite = np.isfinite(measured["ema"]["test_cross_entropy"])
            entry["ema"] = {name: measured["ema"][name] for name in names} if finite else {}
        return entry

    def _make_record(self, weights: str) -> dict[str, Any]:
        """The record of the finished run, whose weights have that digest."""
        history = self.history
        phases = [
            {
                "name": phase.name,
                "steps": schedule.steps,
                "epochs": schedule.epochs,
                "seconds": round(history.seconds.get(phase.name, 0.0), 3),
                "objective": phase.as_json(),
            }
            for phase, schedule in zip(self.phases, self.schedules, strict=True)
        ]
        made_by = dict(self.group.environment)
        if history.group_size > 1:
            made_by["abreast"] = history.group_size
        seconds = sum(history.seconds.values())
        images = describe_images(self.group.data)
        record = make_record(
            self.config, phases, history.entries, images, weights, seconds, made_by
        )
        if isinstance(self.group.data, Batches):
            resumes = self.group.data.resumes
            record["loader"] = {"resumes_exactly": resumes, "restarted_at": history.restarts}
        return record

    def _say(self, note: str) -> None:
        """Tells the reporter, or the log where there is none."""
        said = f"{self.config.hash}: {note}"
        self.group.reporter.finished(said)
        if isinstance(self.group.reporter, NullReporter):
            logging.getLogger("abflax").info("%s", said)

    def _label(self) -> str:
        name = f"{self.config.method} seed {self.config.seeds.weights}"
        others = self.group.size - 1
        return f"{name}, and {others} beside it" if others else name


def _with_given_variables(fresh: Any, given: Any) -> Any:
    """A new student's variables, those that are given in place of its own."""
    if not given:
        return fresh
    flat, replaced = flatten_dict(fresh), flatten_dict(dict(given))
    cast = {path: np.asarray(leaf, flat[path].dtype) for path, leaf in replaced.items()}
    return {"batch_stats": {}, **unflatten_dict(flat | cast)}
