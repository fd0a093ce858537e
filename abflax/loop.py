"""The front door: `distill` runs the phases of a method, evaluates, saves and records."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from abflax import parallel
from abflax.checkpoint import Checkpoints
from abflax.compatibility import require_compatible
from abflax.config import RunConfig, Seeds
from abflax.data import Dataset, Stream, subset
from abflax.errors import InputError, NonFiniteError
from abflax.evaluation import Evaluation
from abflax.interrupt import Interrupted, StopRequest
from abflax.journal import Journal, evaluation_steps, phases_and_spans
from abflax.methods import Phase
from abflax.models import model_name
from abflax.networks import Network, prepared
from abflax.optim import Span
from abflax.progress import Reporter, Silent
from abflax.record import environment, make_record, read_record, require_writable, write_record
from abflax.step import TrainState
from abflax.weights import save_variables


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
      record: see `abflax.record`.
      variables: the student's `params` and `batch_stats`; None where the run was finished before
        and its directory was read instead (`directory / "student.safetensors"` has them).
      directory: where record and weights lie; None without a workdir.
    """

    record: dict[str, Any]
    variables: Any | None
    directory: Path | None


@dataclasses.dataclass(frozen=True)
class Resources:
    """What changes a run's speed and safety, but none of its numbers.

    Attributes:
      devices: how many of this process's devices; None: all.
      steps_per_dispatch: None: 1 on CPUs, 100 on accelerators.
      checkpoint_seconds: the longest time between two checkpoints; every evaluation makes one
        too.
    """

    devices: int | None = None
    steps_per_dispatch: int | None = None
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.steps_per_dispatch is not None and self.steps_per_dispatch < 1:
            raise InputError(
                f"steps_per_dispatch must be at least 1, not {self.steps_per_dispatch}"
            )


def distill(
    student: nn.Module,
    teacher: Network | None,
    data: Dataset,
    *,
    test: Dataset | None = None,
    method: str = "activation-boundary",
    protocol: str = "paper",
    setting: str = "cifar",
    epochs: tuple[int, int] = (20, 100),
    batch_size: int = 128,
    fraction: float = 1.0,
    evaluate_every: int = 1,
    seeds: Seeds | int = 0,
    precision: str = "float32",
    workdir: str | Path | None = None,
    force: bool = False,
    resources: Resources = Resources(),
    reporter: Reporter | None = None,
    **options: Any,
) -> Result:
    """Trains a student, with or without a teacher, by one method, for one seed.

    Args:
      student: any Linen module with taps (or without, where the method needs none).
      teacher: None only for methods that need none; given to those, agreement with it is measured
        where both have the same neurons.
      data: the training data, as `load` gives it or `Dataset(images, labels)`.
      test: held-out data for error and agreement; None: neither is measured.
      method: a name in `METHODS`, or several joined by "+"; `**options` are its options.
      protocol, setting: see `abflax.methods`.
      epochs: of initialise and classify; a joint phase has their sum.
      batch_size, fraction, evaluate_every, seeds, precision: see `RunConfig`; an integer seed
        stands for all four.
      workdir: where `runs/HASH/` with checkpoints, record and weights goes; None: nothing is
        written. The same call again goes on where it stopped, or returns the finished record.
      force: do a finished run again; one that is not finished goes on.
      resources: see `Resources`.
      reporter: told of progress.

    Raises:
      ValueError: if something that was given cannot be right; nothing is written then.
      NonFiniteError: if a loss or gradient is NaN or infinite.
      Interrupted: after SIGINT or SIGTERM, when the checkpoint is written.
    """
    config = RunConfig(
        dataset=data.name,
        student=model_name(student),
        teacher=teacher.name if teacher is not None else None,
        method=method,
        protocol=protocol,
        setting=setting,
        options=tuple(sorted(options.items())),
        epochs=epochs,
        batch_size=batch_size,
        fraction=fraction,
        evaluate_every=evaluate_every,
        seeds=seeds if isinstance(seeds, Seeds) else Seeds.all(int(seeds)),
        precision=precision,
        test=test.name if test is not None and test.name != data.name else None,
    )
    directory = None if workdir is None else Path(workdir) / "runs" / config.hash
    if directory is not None and re.search(r"<lambda>| at 0x", config.student):
        raise InputError(
            f"the student {config.student} has a field without a name, so its run could not be "
            "found again: use named functions, or no workdir"
        )
    reporter = reporter or Silent()
    if directory is not None and not force and (done := read_record(directory / "record.json")):
        reporter.finished(f"{config.hash} is finished already: {directory}")
        return Result(done, None, directory)
    with jax.enable_x64(precision == "float64"), StopRequest() as stop:
        run = _Run(config, student, teacher, data, test, resources, reporter, stop)
        if directory is not None:
            require_writable(directory)
            (directory / "record.json").unlink(missing_ok=True)  # only `force` comes here with one
            write_record(directory / "config.json", config.as_json())
        result = run.train(directory)
    if stop.signal is not None:  # it came too late to stop this run
        raise Interrupted(f"{config.hash} is finished", stop.signal)
    return result


class _Run:
    """One run: everything that is fixed before the first step, and the loop over the steps."""

    def __init__(
        self,
        config: RunConfig,
        student: nn.Module,
        teacher: Network | None,
        data: Dataset,
        test: Dataset | None,
        resources: Resources,
        reporter: Reporter,
        stop: StopRequest,
    ) -> None:
        self.config, self.reporter, self.stop, self.resources = config, reporter, stop, resources
        self.devices = parallel.local_devices(resources.devices)
        self.environment = environment(self.devices)
        self.per_dispatch = resources.steps_per_dispatch or parallel.default_steps_per_dispatch(
            self.devices
        )
        data = subset(data, config.fraction, config.seeds.subset)
        require_compatible(config, student, teacher, data, test)
        self.shape, self.preprocessing = data.image_shape, data.preprocessing
        self.student = prepared(student, config.precision, parallel.AXIS)
        self.teacher = None
        self.teacher_params, self.teacher_stats = {}, {}
        if teacher is not None:
            self.teacher = prepared(teacher.model, config.precision, parallel.AXIS)
            dtype = jnp.result_type(float)
            # Copies: the statistics are donated with the state.
            variables = jax.tree.map(lambda leaf: np.array(leaf, dtype), dict(teacher.variables))
            self.teacher_stats = variables.get("batch_stats", {})
            self.teacher_params = parallel.replicate(variables["params"], self.devices)
        self.stream = Stream(len(data), config.batch_size, config.seeds.order)
        self.phases, self.spans = phases_and_spans(config, len(data))
        self.stops = evaluation_steps(config, self.spans, len(data))
        parallel.split(np.zeros((1, config.batch_size)), self.devices)
        self.programs = [
            self._program(phase, span) for phase, span in zip(self.phases, self.spans, strict=True)
        ]
        self._require_synchronised()
        self.data = parallel.replicate(data.arrays(), self.devices)
        self.evaluation = Evaluation(test, self.devices) if test is not None else None

    def train(self, directory: Path | None) -> Result:
        """Runs what is left of the phases, and writes record and weights."""
        journal, state = Journal(), None
        with contextlib.ExitStack() as stack:
            self.checkpoints = None
            if directory is not None:
                self.checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints"))
                journal, state = self._resume(journal)
            for index in range(journal.phase, len(self.phases)):
                if state is None or journal.phase != index:
                    state = self._begin(index, state)
                    journal.phase = index
                state = self._train_phase(journal, state)
        variables = jax.tree.map(
            np.asarray,
            {"params": state.params["student"], "batch_stats": state.batch_stats["student"]},
        )
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
        record = make_record(self.config, phases, journal.history, seconds, self.environment)
        if directory is not None:
            save_variables(directory / "student.safetensors", variables)
            write_record(directory / "record.json", record)
            shutil.rmtree(directory / "checkpoints")
        return Result(record, variables, directory)

    def _train_phase(self, journal: Journal, state: TrainState) -> TrainState:
        """Dispatches the steps of one phase, evaluating and saving between them."""
        span, phase = self.spans[journal.phase], self.phases[journal.phase]
        program = self.programs[journal.phase]
        key = jax.random.key(self.config.seeds.augmentation)
        done = journal.step - span.start
        self.reporter.phase(self._label(), phase.name, span.steps, done, span.epochs)
        saved = began = time.perf_counter()
        waiting: list[tuple[int, dict[str, Any], int]] = []
        while journal.step < span.start + span.steps:
            target = min(stop for stop in self.stops if stop > journal.step)
            count = min(self.per_dispatch, target - journal.step)
            examples, epochs = self.stream.batches(journal.step, self.per_dispatch)
            state, metrics = program.train(
                state, self.teacher_params, self.data, key,
                parallel.split(examples, self.devices), parallel.split(epochs, self.devices), count,
            )  # fmt: skip
            waiting.append((journal.step, metrics, count))
            journal.step += count
            loss = self._collect(journal, waiting, keep=1)  # never wait for what just started
            epoch = float((journal.step - span.start) / span.steps_per_epoch)
            self.reporter.steps(count, count * self.config.batch_size, epoch, loss)
            late = time.perf_counter() - saved > self.resources.checkpoint_seconds
            if journal.step == target or late or self.stop.signal:
                self._collect(journal, waiting, keep=0)
                if journal.step == target:
                    self._evaluate(journal, state)
                began = journal.clock(phase.name, began)
                saved = time.perf_counter()
                self._save(journal, state)
                self._stop_if_asked(journal, phase)
        self.reporter.finished()
        return state

    def _collect(
        self, journal: Journal, waiting: list[tuple[int, dict[str, Any], int]], keep: int
    ) -> float | None:
        """Fetches the metrics of all but the last `keep` dispatches, and checks that they are
        finite. Returns the newest loss among them."""
        loss = None
        while len(waiting) > keep:
            start, metrics, count = waiting.pop(0)
            flat = {k: np.asarray(v) for k, v in flatten_dict(metrics, sep="/").items()}
            for name in ("loss", "gradient_norm"):
                finite = np.isfinite(flat[name][:count])
                if not finite.all():
                    self._not_finite(journal, name, start + int(np.argmin(finite)))
            journal.add(flat, count)
            loss = float(flat["loss"][count - 1])
        return loss

    def _not_finite(self, journal: Journal, name: str, step: int) -> None:
        phase, span = self.phases[journal.phase], self.spans[journal.phase]
        where = "there is no checkpoint, since the run has no workdir"
        if self.checkpoints is not None:
            self.checkpoints.wait()
            latest = self.checkpoints.latest()
            where = (
                f"the last good checkpoint is step {latest['journal']['step']}, in "
                f"{self.checkpoints.directory}"
                if latest
                else "it came before the first checkpoint"
            )
        raise NonFiniteError(
            f"the {name.replace('_', ' ')} is not finite at step {step - span.start} of phase "
            f"{phase.name} (step {step} of the run); {where}"
        )

    def _evaluate(self, journal: Journal, state: TrainState) -> None:
        """Appends an entry to the history."""
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
        if self.evaluation is not None:
            measured = self.evaluation(
                program, state.params, state.batch_stats, self.teacher_params
            )
            entry |= {k: measured[k] for k in ("test_error", "test_cross_entropy", "agreement")}
        journal.history.append(entry)
        self.reporter.evaluated(entry)

    def _begin(self, index: int, before: TrainState | None) -> TrainState:
        """The state at the start of a phase: the student of the phase before, or a fresh one."""
        key = jax.random.key(self.config.seeds.weights)
        if before is None:
            student = self.programs[index].init(jax.random.fold_in(key, 0))
            teacher_stats = self.teacher_stats
        else:
            student = {
                "params": before.params["student"],
                "batch_stats": before.batch_stats["student"],
            }
            teacher_stats = before.batch_stats["teacher"]
        connectors_key = jax.random.fold_in(key, 1 + index)
        state = self.programs[index].begin(student, teacher_stats, connectors_key)
        return parallel.replicate(jax.tree.map(np.array, state), self.devices)

    def _resume(self, journal: Journal) -> tuple[Journal, TrainState | None]:
        """Journal and state of the newest checkpoint, if there is one."""
        assert self.checkpoints is not None
        if (meta := self.checkpoints.latest()) is None:
            return journal, None
        if meta["config"] != self.config.as_json():
            other, own = meta["config"], self.config.as_json()
            differing = sorted(k for k in {*other, *own} if other.get(k) != own.get(k))
            raise InputError(
                f"the checkpoint in {self.checkpoints.directory} is of another configuration: "
                f"{', '.join(f'{k} is {other.get(k)!r}, not {own.get(k)!r}' for k in differing)}"
            )
        meta, state = self.checkpoints.restore(
            lambda meta: jax.eval_shape(lambda: self._abstract_state(meta["journal"]["phase"]))
        )
        return Journal(**meta["journal"]), parallel.replicate(state, self.devices)

    def _abstract_state(self, index: int) -> TrainState:
        key = jax.random.key(0)
        student = self.programs[index].init(key)
        return self.programs[index].begin(student, self.teacher_stats, key)

    def _save(self, journal: Journal, state: TrainState) -> None:
        if self.checkpoints is not None:
            meta = {"config": self.config.as_json(), "journal": dataclasses.asdict(journal)}
            # Copies on the host: plain arrays, whatever the devices, and safe from donation.
            self.checkpoints.save(journal.step, jax.tree.map(np.array, state), meta)

    def _stop_if_asked(self, journal: Journal, phase: Phase) -> None:
        if self.stop.signal is None:
            return
        kept = "nothing is kept, since the run has no workdir"
        if self.checkpoints is not None:
            self.checkpoints.wait()
            kept = f"the same command goes on from step {journal.step}"
        message = f"stopped in phase {phase.name} of {self.config.hash}; {kept}"
        raise Interrupted(message, self.stop.signal)

    def _program(self, phase: Phase, span: Span) -> parallel.Program:
        return parallel.compile_phase(
            self.student, self.teacher, phase, span, self.preprocessing, self.shape, self.devices,
            self.per_dispatch, jnp.result_type(float),
        )  # fmt: skip

    def _require_synchronised(self) -> None:
        """On several devices a batch norm must be able to average over them."""
        for model in (self.student, self.teacher):
            if model is None or len(self.devices) == 1 or hasattr(model, "axis_name"):
                continue
            raise InputError(
                f"{type(model).__name__} has no field axis_name, so its batch norms cannot be "
                f"averaged over {len(self.devices)} devices: use one device"
            )

    def _label(self) -> str:
        return f"{self.config.method} seed {self.config.seeds.weights}"
