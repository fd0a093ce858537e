"""One student trained once: its phases, and the loop over its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax import parallel, processes
from abflax.abreast import Dispatch, Steps
from abflax.checkpoint import Checkpoints
from abflax.classroom import Classroom
from abflax.compatibility import uses_dropout
from abflax.config import RunConfig
from abflax.diagnosis import Trend, first_not_finite, norm_of
from abflax.errors import InputError, NonFiniteError
from abflax.events import EventLog
from abflax.interrupt import Interrupted
from abflax.journal import Journal, evaluation_steps, phases_and_spans
from abflax.kept import keep_targets, require_keepable
from abflax.networks import Network, prepared
from abflax.optim import Span
from abflax.phase import Phase
from abflax.progress import Reporter
from abflax.record import make_record
from abflax.step import TrainState, abstract_variables
from abflax.taps import Model, module_of


class Run:
    """One student in a classroom, and the loop over its steps."""

    def __init__(
        self,
        config: RunConfig,
        student: Model | Network,
        classroom: Classroom,
        reporter: Reporter,
    ) -> None:
        self.config, self.classroom, self.reporter = config, classroom, reporter
        self.given: Any = {}
        if isinstance(student, Network):
            self.given = student.variables
            student = student.model
        self.student = prepared(student, config.precision, parallel.AXIS)
        examples = len(classroom.data)
        self.phases, self.spans = phases_and_spans(config, examples)
        self.stops = evaluation_steps(config, self.spans, examples)
        self.programs = [
            self._program(phase, span) for phase, span in zip(self.phases, self.spans, strict=True)
        ]
        self._require_synchronised()
        if classroom.resources.keep_targets:
            require_keepable(self.phases, config.views)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return sum(span.steps for span in self.spans)

    def train(
        self, checkpoints: Checkpoints | None, events: Path | None = None
    ) -> Steps[tuple[dict[str, Any], Any]]:
        """Runs what is left of the phases. Returns the record and the student's variables.

        Args:
          events: where TensorBoard's files go; None: there are none.
        """
        self.checkpoints = checkpoints
        journal, state = self._resume(Journal())
        journal.abreast = max(journal.abreast, self.classroom.students)
        log = EventLog(events, journal.history) if events is not None else contextlib.nullcontext()
        with log as self.log:
            for index in range(journal.phase, len(self.phases)):
                if state is None or journal.phase != index:
                    state = self._begin(index, state)
                    journal.phase = index
                    self._keep(journal.step, state)
                state = yield from self._train_phase(journal, state)
        if checkpoints is not None:
            checkpoints.wait()
        _, last = self.kept
        variables = {
            "params": last.params["student"],
            "batch_stats": last.batch_stats["student"],
        }
        return self._record(journal), variables

    def _record(self, journal: Journal) -> dict[str, Any]:
        phases = [
            {
                "name": phase.name,
                "steps": span.steps,
                "epochs": span.epochs,
                "seconds": round(journal.seconds.get(phase.name, 0.0), 3),
                "objective": phase.described(),
            }
            for phase, span in zip(self.phases, self.spans, strict=True)
        ]
        seconds = sum(journal.seconds.values())
        made_by = dict(self.classroom.environment)
        if journal.abreast > 1:
            made_by["abreast"] = journal.abreast
        return make_record(self.config, phases, journal.history, seconds, made_by)

    def _train_phase(self, journal: Journal, state: TrainState) -> Steps[TrainState]:
        """Dispatches the steps of one phase, evaluating and saving between them."""
        span, phase = self.spans[journal.phase], self.phases[journal.phase]
        program = self.programs[journal.phase]
        saved = began = time.perf_counter()
        self.kept_targets = None  # those of the phase before need not stay
        if self.classroom.resources.keep_targets:
            self.kept_targets = self._ask_once(program, state)
        done = journal.step - span.start
        self.trend = Trend(norm_of(self.kept[1].params["student"]))
        self.reporter.phase(self._label(), phase.name, span.steps, done, span.epochs)
        waiting: list[tuple[int, dict[str, Any], int]] = []
        while journal.step < span.start + span.steps:
            target = min(stop for stop in self.stops if stop > journal.step)
            count = min(self.classroom.per_dispatch, target - journal.step)
            try:
                state, metrics = yield Dispatch(
                    journal.step, count, program, state, self.kept_targets
                )
            except Interrupted as stop:
                self._collect(journal, waiting, keep=0)
                journal.clock(phase.name, began)
                self._save(journal, state)
                raise self._stopped(journal, stop.signal) from None
            waiting.append((journal.step, metrics, count))
            journal.step += count
            loss = self._collect(journal, waiting, keep=1)  # never wait for what just started
            epoch = float((journal.step - span.start) / span.steps_per_epoch)
            self.reporter.steps(count, count * self.config.batch_size, epoch, loss)
            late = time.perf_counter() - saved > self.classroom.resources.checkpoint_seconds
            if processes.highest(late) or journal.step == target:
                self._collect(journal, waiting, keep=0)
                if journal.step == target:
                    _, measured = yield Dispatch(journal.step, 0, program, state)
                    self._evaluated(journal, state, measured)
                began = journal.clock(phase.name, began)
                saved = time.perf_counter()
                self._save(journal, state)
        self.reporter.finished()
        return state

    def _ask_once(self, program: parallel.Program, state: TrainState) -> Any:
        """The phase's targets, from the teacher or from a run before."""
        room, views = self.classroom, self.config.views
        assert views is not None
        return keep_targets(
            program, room.teacher_params, state.batch_stats["teacher"], room.feed(0, 0)[0], views,
            self.config.batch_size, parallel.own(room.devices),
        )  # fmt: skip

    def _collect(
        self, journal: Journal, waiting: list[tuple[int, dict[str, Any], int]], keep: int
    ) -> float | None:
        """Fetches the metrics of all but the last `keep` dispatches, and checks that they are
        finite. Returns the newest loss among them."""
        loss = None
        while len(waiting) > keep:
            start, metrics, count = waiting.pop(0)
            flat = {k: np.asarray(v) for k, v in flatten_dict(metrics, sep="/").items()}
            finite = np.isfinite([flat["loss"][:count], flat["gradient_norm"][:count]])
            good = int(np.argmin(np.append(finite.all(axis=0), False)))
            self.trend.add(flat["loss"][:good])
            if good < count:
                name = "gradient norm" if finite[0, good] else "loss"
                self._not_finite(journal, name, start + good)
            journal.add(flat, count)
            loss = float(flat["loss"][count - 1])
        return loss

    def _not_finite(self, journal: Journal, name: str, step: int) -> None:
        """Raises, and says what was not finite first."""
        phase, span = self.phases[journal.phase], self.spans[journal.phase]
        raise NonFiniteError(
            f"the {name} is not finite at step {step - span.start} of phase {phase.name} (step "
            f"{step} of the run); {self._diagnosis(journal.phase, step)}; {self._last_good()}"
        )

    def _diagnosis(self, index: int, step: int) -> str:
        """Makes the steps since the newest kept state again, which have the same bits (but for
        rounding where there were runs abreast), and looks into the one that went wrong."""
        program, span = self.programs[index], self.spans[index]
        room = self.classroom
        made, state = self.kept
        state = parallel.replicate(state, room.devices)
        while made < step:
            count = min(room.per_dispatch, step - made)
            again = Dispatch(made, count, program, state, self.kept_targets)
            ((state, _),) = room.make([again])
            made += count
        found = room.look(program, state, step)
        norm = norm_of(jax.tree.map(np.asarray, state.params["student"]))
        rate = float(program.schedule(step - span.start))
        parts = [first_not_finite(found), self.trend.divergence(norm, rate)]
        return "; ".join(part for part in parts if part)

    def _last_good(self) -> str:
        where = "there is no checkpoint, since the run has no workdir"
        if self.checkpoints is not None:
            self.checkpoints.wait()
            latest = self.checkpoints.latest_step()
            where = (
                f"the last good checkpoint is step {latest}, in {self.checkpoints.directory}"
                if latest is not None
                else "it came before the first checkpoint"
            )
        return where

    def _evaluated(self, journal: Journal, state: TrainState, measured: dict[str, Any]) -> None:
        """Appends an entry to the history.

        Args:
          measured: on held-out data; empty without any.
        """
        span, phase = self.spans[journal.phase], self.phases[journal.phase]
        program = self.programs[journal.phase]
        in_phase = self.stops[journal.step] - span.epochs_before
        entry = {
            "epoch": self.stops[journal.step],
            "epoch_of_phase": in_phase,
            "step": journal.step,
            "phase": phase.name,
            "learning_rate": float(program.schedule(journal.step - span.start - 1)),
            **journal.means(),
        }
        if measured:
            told = ("test_error", "test_cross_entropy", "agreement", "silent")
            entry |= {name: measured[name] for name in told}
            if not np.isfinite(measured["test_cross_entropy"]):
                norm = norm_of(jax.tree.map(np.asarray, state.params["student"]))
                diverged = self.trend.divergence(norm, entry["learning_rate"])
                raise NonFiniteError(
                    f"the cross-entropy on held-out data is not finite after step {journal.step} "
                    f"of the run; {diverged + '; ' if diverged else ''}{self._last_good()}"
                )
        journal.history.append(entry)
        if self.log is not None:
            self.log.write(entry)
        self.reporter.evaluated(entry)

    def _begin(self, index: int, before: TrainState | None) -> TrainState:
        """The state at the start of a phase: the student of the phase before, or a fresh one, with
        the weights that it was given."""
        key = jax.random.key(self.config.seeds.weights)
        if before is None:
            student = self.programs[index].init(jax.random.fold_in(key, 0))
            if self.given:
                fresh, given = flatten_dict(student), flatten_dict(dict(self.given))
                cast = {path: np.asarray(leaf, fresh[path].dtype) for path, leaf in given.items()}
                student = {"batch_stats": {}, **unflatten_dict(fresh | cast)}
            teacher_stats = self.classroom.teacher_stats
        else:
            student = {
                "params": before.params["student"],
                "batch_stats": before.batch_stats["student"],
            }
            teacher_stats = before.batch_stats["teacher"]
        connectors_key = jax.random.fold_in(key, 1 + index)
        state = self.programs[index].begin(student, teacher_stats, connectors_key)
        return parallel.replicate(jax.tree.map(np.array, state), self.classroom.devices)

    def _resume(self, journal: Journal) -> tuple[Journal, TrainState | None]:
        """Journal and state of the newest checkpoint, if there is one."""
        if self.checkpoints is None or (meta := self.checkpoints.latest()) is None:
            return journal, None
        other, own = meta["config"], self.config.as_json()  # what is off may be missing from it
        differing = sorted(k for k in {*other, *own} if other.get(k) != own.get(k))
        if differing:
            raise InputError(
                f"the checkpoint in {self.checkpoints.directory} is of another configuration: "
                f"{', '.join(f'{k} is {other.get(k)!r}, not {own.get(k)!r}' for k in differing)}"
            )
        meta, state = self.checkpoints.restore(
            lambda meta: jax.eval_shape(lambda: self._abstract_state(meta["journal"]["phase"]))
        )
        journal = Journal(**meta["journal"])
        self._keep(journal.step, state)
        return journal, parallel.replicate(state, self.classroom.devices)

    def _abstract_state(self, index: int) -> TrainState:
        key = jax.random.key(0)
        student = self.programs[index].init(key)
        return self.programs[index].begin(student, self.classroom.teacher_stats, key)

    def _save(self, journal: Journal, state: TrainState) -> None:
        self._keep(journal.step, state)
        if self.checkpoints is not None:
            meta = {"config": self.config.as_json(), "journal": dataclasses.asdict(journal)}
            self.checkpoints.save(journal.step, self.kept[1], meta)

    def _keep(self, step: int, state: TrainState) -> None:
        """Copies the state to the host: plain arrays, whatever the devices, safe from donation."""
        self.kept = step, jax.tree.map(np.array, state)

    def _stopped(self, journal: Journal, signal: int) -> Interrupted:
        kept = "nothing is kept, since the run has no workdir"
        if self.checkpoints is not None:
            self.checkpoints.wait()
            kept = f"the same command goes on from step {journal.step}"
        name = self.phases[journal.phase].name
        return Interrupted(f"stopped in phase {name} of {self.config.hash}; {kept}", signal)

    def _program(self, phase: Phase, span: Span) -> parallel.Program:
        room = self.classroom
        return parallel.compile_phase(
            self.student, room.teacher, phase, span, room.preprocessing, room.data.image_shape,
            room.devices, jnp.result_type(float), room.sent,
        )  # fmt: skip

    def _require_synchronised(self) -> None:
        """On several devices the numbers must be those of one."""
        devices, shape = self.classroom.devices, self.classroom.data.image_shape
        for model in (self.student, self.classroom.teacher):
            if model is None or len(devices) == 1:
                continue
            module, many = module_of(model), f"{len(devices)} devices: use one device"
            normed = abstract_variables(model, shape)["batch_stats"]
            if normed and not hasattr(module, "axis_name"):
                raise InputError(
                    f"{type(module).__name__} has no field axis_name, so its batch norms cannot "
                    f"be averaged over {many}"
                )
            alone = prepared(model, self.config.precision, None)
            if model is self.student and uses_dropout(alone, shape):
                raise InputError(
                    f"{type(module).__name__} has dropout, which would drop other neurons on {many}"
                )

    def _label(self) -> str:
        beside = self.classroom.students - 1
        name = f"{self.config.method} seed {self.config.seeds.weights}"
        return f"{name}, and {beside} beside it" if beside else name
