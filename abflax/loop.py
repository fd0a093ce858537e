"""The front door: `distill` runs a method's phases, and `evaluate` measures a network."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from abflax import parallel
from abflax.checkpoint import Checkpoints
from abflax.config import RunConfig, Seeds
from abflax.data import Dataset, Preprocessing, Stream, subset
from abflax.errors import InputError, NonFiniteError
from abflax.interrupt import Interrupted, StopRequest
from abflax.methods import METHODS, Phase
from abflax.models import model_name
from abflax.networks import Network, prepared
from abflax.optim import Span
from abflax.progress import Reporter, Silent
from abflax.record import make_record, read_record, write_record
from abflax.step import TrainState, bind, init_variables
from abflax.weights import save_variables

_EVAL_BATCH = 250  # for each device


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
      force: do a finished run again.
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
        seeds=Seeds.all(seeds) if isinstance(seeds, int) else seeds,
        precision=precision,
    )
    directory = None if workdir is None else Path(workdir) / "runs" / config.hash
    reporter = reporter or Silent()
    if directory is not None and not force and (done := read_record(directory / "record.json")):
        reporter.finished(f"{config.hash} is finished already: {directory}")
        return Result(done, None, directory)
    with jax.enable_x64(precision == "float64"), StopRequest() as stop:
        run = _Run(config, student, teacher, data, test, resources, reporter, stop)
        if directory is None:
            return run.train(None)
        _make_writable(directory)
        if force:
            for old in (directory / "checkpoints", directory / "record.json"):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        write_record(directory / "config.json", config.as_json())
        return run.train(directory)


def evaluate(network: Network, test: Dataset, devices: int | None = None) -> dict[str, Any]:
    """A network's error on held-out data, each example counted once.

    Returns:
      {"test_error": share, "errors": count, "examples": count, "test_cross_entropy": nats}.
    """
    used = parallel.local_devices(devices)
    model = prepared(network.model, "float32", parallel.AXIS)
    phase = METHODS["cross-entropy"]()[0]
    objective = bind(model, None, phase, test.image_shape, axis_name=parallel.AXIS)
    program = parallel.compile_phase(
        objective, phase.optimiser, Span(0, 1, 0, 1, 1, Fraction(1)), test.preprocessing,
        test.image_shape, used, 1, jnp.result_type(float),
    )  # fmt: skip
    params = {"student": network.variables["params"], "connectors": {}}
    stats = {
        "student": network.variables.get("batch_stats", {}),
        "connectors": {},
        "teacher": {},
    }
    params, stats = parallel.replicate((params, stats), used)
    return _Evaluation(test, used)(program, params, stats, {})


class _Evaluation:
    """Held-out data on the devices, and the one dispatch that measures a student on it."""

    def __init__(self, test: Dataset, devices: tuple[jax.Device, ...]) -> None:
        batch = _EVAL_BATCH * len(devices)
        batches = -(-len(test) // batch)
        index = np.arange(batches * batch, dtype=np.int32).reshape(batches, batch)
        # The last, partial batch is padded with example 0 and masked.
        self._mask = parallel.split(index < len(test), devices)
        self._examples = parallel.split(np.where(index < len(test), index, 0), devices)
        self._data = parallel.replicate(_arrays(test), devices)

    def __call__(
        self, program: parallel.Program, params: Any, batch_stats: Any, teacher_params: Any
    ) -> dict[str, Any]:
        sums = program.evaluate(
            params, batch_stats, teacher_params, self._data, self._examples, self._mask
        )
        total = jax.tree.map(lambda leaf: float(np.asarray(leaf, np.float64).sum()), sums)
        examples = total["examples"]
        return {
            "test_error": total["errors"] / examples,
            "errors": int(total["errors"]),
            "examples": int(examples),
            "test_cross_entropy": total["cross_entropy"] / examples,
            "agreement": {k: v / examples for k, v in total["agreement"].items()},
        }


@dataclasses.dataclass
class _Journal:
    """How far a run has come, and what it has to tell: the JSON part of its checkpoints."""

    step: int = 0
    phase: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    counted: int = 0  # steps since the last evaluation, and the sums of their metrics
    sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, metrics: dict[str, np.ndarray], count: int) -> None:
        for index in range(count):
            for name, values in metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + float(values[index])
        self.counted += count

    def means(self) -> dict[str, Any]:
        means = {name: value / self.counted for name, value in self.sums.items()}
        self.counted, self.sums = 0, {}
        nested = unflatten_dict(means, sep="/")
        loss, norm = nested.pop("loss"), nested.pop("gradient_norm")
        return {"loss": loss, "gradient_norm": norm, "training": nested}


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
        self.per_dispatch = resources.steps_per_dispatch or parallel.default_steps_per_dispatch(
            self.devices
        )
        data = subset(data, config.fraction, config.seeds.subset)
        _require_compatible(config, teacher, data, test)
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
        self.phases, self.spans = _spans(config, len(data))
        self.stops = _evaluation_steps(config, self.phases, self.spans, len(data))
        parallel.split(np.zeros((1, config.batch_size)), self.devices)
        self.programs = [
            self._program(phase, span) for phase, span in zip(self.phases, self.spans, strict=True)
        ]
        self._require_synchronised()
        self.data = parallel.replicate(_arrays(data), self.devices)
        self.evaluation = _Evaluation(test, self.devices) if test is not None else None

    def train(self, directory: Path | None) -> Result:
        """Runs what is left of the phases, and writes record and weights."""
        journal, state = _Journal(), None
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
            }
            for phase, span in zip(self.phases, self.spans, strict=True)
        ]
        record = make_record(
            self.config, phases, journal.history, sum(journal.seconds.values()), self.devices
        )
        if directory is not None:
            save_variables(directory / "student.safetensors", variables)
            write_record(directory / "record.json", record)
            shutil.rmtree(directory / "checkpoints")
        return Result(record, variables, directory)

    def _train_phase(self, journal: _Journal, state: TrainState) -> TrainState:
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
                began = _clock(journal, phase, began)
                saved = time.perf_counter()
                self._save(journal, state)
                self._stop_if_asked(journal, phase)
        self.reporter.finished()
        return state

    def _collect(
        self, journal: _Journal, waiting: list[tuple[int, dict[str, Any], int]], keep: int
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

    def _not_finite(self, journal: _Journal, name: str, step: int) -> None:
        phase, span = self.phases[journal.phase], self.spans[journal.phase]
        where = "there is no checkpoint, since the run has no workdir"
        if self.checkpoints is not None:
            self.checkpoints.wait()
            latest = self.checkpoints.latest()
            where = (
                f"the last good checkpoint is step {latest[0]}, in {self.checkpoints.directory}"
                if latest
                else "it came before the first checkpoint"
            )
        raise NonFiniteError(
            f"the {name.replace('_', ' ')} is not finite at step {step - span.start} of phase "
            f"{phase.name} (step {step} of the run); {where}"
        )

    def _evaluate(self, journal: _Journal, state: TrainState) -> None:
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
            student = jax.jit(lambda key: init_variables(self.student, key, self.shape))(
                jax.random.fold_in(key, 0)
            )
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

    def _resume(self, journal: _Journal) -> tuple[_Journal, TrainState | None]:
        """Journal and state of the newest checkpoint, if there is one."""
        assert self.checkpoints is not None
        if (latest := self.checkpoints.latest()) is None:
            return journal, None
        step, meta = latest
        if meta["config"] != self.config.as_json():
            other, own = meta["config"], self.config.as_json()
            differing = sorted(k for k in {*other, *own} if other.get(k) != own.get(k))
            raise InputError(
                f"the checkpoint in {self.checkpoints.directory} is of another configuration: "
                f"{', '.join(f'{k} is {other.get(k)!r}, not {own.get(k)!r}' for k in differing)}"
            )
        journal = _Journal(**meta["journal"])
        target = jax.eval_shape(lambda: self._abstract_state(journal.phase))
        state = self.checkpoints.restore(step, target)
        return journal, parallel.replicate(state, self.devices)

    def _abstract_state(self, index: int) -> TrainState:
        key = jax.random.key(0)
        student = init_variables(self.student, key, self.shape)
        return self.programs[index].begin(student, self.teacher_stats, key)

    def _save(self, journal: _Journal, state: TrainState) -> None:
        if self.checkpoints is not None:
            meta = {"config": self.config.as_json(), "journal": dataclasses.asdict(journal)}
            self.checkpoints.save(journal.step, state, meta)

    def _stop_if_asked(self, journal: _Journal, phase: Phase) -> None:
        if self.stop.signal is None:
            return
        kept = "nothing is kept, since the run has no workdir"
        if self.checkpoints is not None:
            self.checkpoints.wait()
            kept = f"the same command goes on from step {journal.step}"
        message = f"stopped in phase {phase.name} of {self.config.hash}; {kept}"
        raise Interrupted(message, self.stop.signal)

    def _program(self, phase: Phase, span: Span) -> parallel.Program:
        fields = {
            "dtype": jnp.bfloat16 if self.config.precision == "bfloat16" else None,
            "param_dtype": jnp.result_type(float),
        }
        objective = bind(
            self.student, self.teacher, phase, self.shape, axis_name=parallel.AXIS, **fields
        )
        return parallel.compile_phase(
            objective, phase.optimiser, span, self.preprocessing, self.shape, self.devices,
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


def _spans(config: RunConfig, examples: int) -> tuple[list[Phase], list[Span]]:
    """The phases that have steps, and where each lies in the run."""
    per_epoch = Fraction(examples, config.batch_size)
    lengths = {"initialise": config.epochs[0], "classify": config.epochs[1]}
    lengths["joint"] = sum(config.epochs)
    phases, spans, before = [], [], 0
    for phase in config.phases():
        after = before + lengths[phase.name]
        start, end = int(before * per_epoch), int(after * per_epoch)
        if end > start:
            phases.append(phase)
            spans.append(
                Span(start, end - start, before, after - before, sum(config.epochs), per_epoch)
            )
        before = after
    if not phases:
        raise InputError(
            f"{sum(config.epochs)} epochs of {examples} examples are less than one batch of "
            f"{config.batch_size}"
        )
    return phases, spans


def _evaluation_steps(
    config: RunConfig, phases: list[Phase], spans: list[Span], examples: int
) -> dict[int, int]:
    """step of the run -> epoch, for each evaluation; ends of phases included."""
    del phases
    ends = {span.epochs_before + span.epochs for span in spans}
    steps = {}
    for epoch in range(1, sum(config.epochs) + 1):
        if epoch in ends or epoch % config.evaluate_every == 0:
            steps[int(epoch * Fraction(examples, config.batch_size))] = epoch
    return {step: epoch for step, epoch in steps.items() if step > 0}


def _require_compatible(
    config: RunConfig, teacher: Network | None, data: Dataset, test: Dataset | None
) -> None:
    """Raises where method, teacher and data cannot go together."""
    needs = any(term.needs_teacher for phase in config.phases() for _, term in phase.terms)
    if needs and teacher is None:
        raise InputError(f"method {config.method} needs a teacher")
    if test is not None and test.image_shape != data.image_shape:
        raise InputError(
            f"the test images have shape {test.image_shape}, the training images "
            f"{data.image_shape}"
        )


def _arrays(data: Dataset) -> dict[str, Any]:
    return {"images": data.images, "labels": data.labels}


def _clock(journal: _Journal, phase: Phase, began: float) -> float:
    """Adds the time since `began` to the phase's seconds, and returns now."""
    now = time.perf_counter()
    journal.seconds[phase.name] = journal.seconds.get(phase.name, 0.0) + now - began
    return now


def _make_writable(directory: Path) -> None:
    """Makes the directory, and raises where nothing can be written into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror}") from error
