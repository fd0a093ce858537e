"""The work of a run, piece by piece: the engine's own compiled functions on made-up images."""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from abflax import parallel
from abflax.data import Preprocessing, augment, normalise
from abflax.feed import BATCH
from abflax.kept import keep_targets
from abflax.methods import METHODS
from abflax.models import MODELS
from abflax.networks import prepared
from abflax.optim import Span
from abflax.phase import Phase
from abflax.step import Objective, bind, init_variables, make_targets, student_loss, train_step
from abflax.taps import Model, run_model
from experiments.benchmark.timing import Work, compiled, count_flops

SHAPE = (32, 32, 3)
SPAN = Span(0, 10**6, 0, 10, 20, Fraction(10**5))
PREPROCESSING = Preprocessing((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), 4, True)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A teacher and a student with a method, in protocol `paper`, on the devices at hand.

    Attributes:
      teacher, student: names in `MODELS`.
      batch: images a step, over all devices.
      method: a name in `METHODS`.
      precision: see `RunConfig`.
      examples: made-up images.
    """

    teacher: str
    student: str
    batch: int
    method: str = "activation-boundary"
    precision: str = "float32"
    examples: int = 1000

    @functools.cached_property
    def devices(self) -> tuple[jax.Device, ...]:
        return parallel.usable_devices()

    @functools.cached_property
    def networks(self) -> tuple[Model, Model]:
        """(student, teacher), as a run uses them."""
        student, teacher = (
            prepared(MODELS[name](), self.precision, parallel.AXIS)
            for name in (self.student, self.teacher)
        )
        return student, teacher

    @functools.cached_property
    def teacher_variables(self) -> Any:
        model = MODELS[self.teacher]()
        variables = jax.jit(lambda key: init_variables(model, key, SHAPE))(jax.random.key(0))
        return parallel.replicate(variables, self.devices)

    @functools.cached_property
    def data(self) -> dict[str, jax.Array]:
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (self.examples, *SHAPE), dtype=np.uint8)
        labels = draw.integers(0, 10, self.examples, dtype=np.int32)
        return parallel.replicate({"images": images, "labels": labels}, self.devices)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return METHODS[self.method](protocol="paper")

    def program(self, phase: Phase, views: int | None = None) -> parallel.Program:
        student, teacher = self.networks
        return parallel.compile_phase(
            student, teacher, phase, SPAN, _preprocessing(views), SHAPE, self.devices,
            jnp.result_type(float),
        )  # fmt: skip

    def train(self, phase: Phase, kept: bool = False, students: int = 1) -> Work:
        """Steps of a phase, augmentation included: one dispatch of them.

        Args:
          phase: what is optimised.
          kept: whether the teacher's targets are there already.
          students: how many are trained in it.
        """
        steps = parallel.default_steps_per_dispatch(self.devices)
        views = 1 if kept else None
        program, teacher = self.program(phase, views), self.teacher_variables
        state = self._state(program)
        index = np.arange(steps * self.batch, dtype=np.int32).reshape(steps, self.batch)
        examples = parallel.split(index % self.examples, self.devices)
        targets = None
        if views is not None:
            stats = state.batch_stats["teacher"]
            found = keep_targets(
                program, teacher["params"], stats, self.data, views, self.batch, self.devices
            )
            targets = (found,) * students
        fixed = (
            teacher["params"], self.data, jax.random.key(0), examples,
            np.zeros_like(examples), np.int32(steps), targets,
        )  # fmt: skip
        states = tuple(jax.tree.map(jnp.copy, state) for _ in range(students))
        train = parallel.compile_steps(
            (program,) * students, _preprocessing(views), self.devices, steps
        )
        run, seconds, held = compiled(train, states, *fixed)

        def once() -> None:
            nonlocal states
            states, metrics = run(states, *fixed)
            jax.block_until_ready(metrics)

        flops = self.step_flops(phase, kept) if students == 1 else None
        return Work(once, steps * self.batch, steps, flops, held, seconds, len(self.devices))

    def vmapped(self, phase: Phase, students: int) -> Work:
        """Steps of several students as `train` makes them on one device, but batched by `jax.vmap`
        instead of written out one after the other."""
        steps = parallel.default_steps_per_dispatch(self.devices)
        objective, optimiser, state = self._on_one_device(phase)
        states = jax.tree.map(lambda leaf: jnp.stack([leaf] * students), state)
        index = jnp.arange(self.batch, dtype=jnp.int32)
        fixed = (
            self.teacher_variables, self.data, jax.random.key(0), index % self.examples,
            jnp.zeros_like(index),
        )  # fmt: skip

        def one(states: Any, teacher: Any, data: Any, key: Any, chosen: Any, epochs: Any) -> Any:
            images = augment(data["images"][chosen], chosen, epochs, key, PREPROCESSING)
            images, labels = normalise(images, PREPROCESSING), data["labels"][chosen]
            params, stats = teacher["params"], teacher["batch_stats"]
            asked = make_targets(objective, params, stats, images)
            return jax.vmap(
                lambda state: train_step(
                    objective, optimiser, state, params, images, labels, asked=asked
                )[0]
            )(states)

        def many(states: Any, *fixed: Any) -> Any:
            if steps == 1:  # no loop: see `parallel.default_steps_per_dispatch`
                return one(states, *fixed)
            return jax.lax.fori_loop(0, steps, lambda _, states: one(states, *fixed), states)

        run, seconds, held = compiled(jax.jit(many, donate_argnums=0), states, *fixed)

        def once() -> None:
            nonlocal states
            states = jax.block_until_ready(run(states, *fixed))

        return Work(once, steps * self.batch, steps, None, held, seconds)

    def ask(self) -> Work:
        """The teacher's pass alone: taps and logits of a batch."""
        model = prepared(MODELS[self.teacher](), self.precision, None)
        function = lambda variables, images: _seen(run_model(model, variables, images, train=False))  # noqa: E731
        arguments = (self.teacher_variables, self._images())
        return self._jitted(function, *arguments)

    def evaluate(self) -> Work:
        """Error of the student on all the made-up images, in one dispatch, without a teacher."""
        (phase,) = METHODS["cross-entropy"]()
        program = dataclasses.replace(self, method="cross-entropy")._without_teacher(phase)
        state = self._state(program)
        batch = BATCH * len(self.devices)
        batches = max(1, self.examples // batch)
        index = np.arange(batches * batch, dtype=np.int32).reshape(batches, batch)
        examples = parallel.split(index % self.examples, self.devices)
        student = (state.params, state.batch_stats)
        arguments: tuple[Any, ...] = (
            (student,), {}, self.data, examples, np.ones_like(examples, bool)
        )  # fmt: skip
        evaluation = parallel.compile_evaluation((program,), PREPROCESSING, self.devices)
        run, seconds, held = compiled(evaluation, *arguments)
        return Work(
            lambda: jax.block_until_ready(run(*arguments)), index.size, 1, None, held, seconds,
            len(self.devices),
        )  # fmt: skip

    def parts(self) -> dict[str, Work]:
        """Where a step of the first phase goes."""
        objective, _, state = self._on_one_device(self.phases[0])
        variables, images = self.teacher_variables, self._images()
        labels = jnp.zeros(self.batch, jnp.int32)
        targets = jax.jit(
            lambda v, x: make_targets(objective, v["params"], v["batch_stats"], x)[0]
        )(variables, images)

        def loss(params: Any, stats: Any, targets: Any, images: jax.Array) -> jax.Array:
            return student_loss(objective, params, stats, targets, images, labels)[0]

        def of_taps(params: Any, stats: Any, images: jax.Array) -> jax.Array:
            variables = {"params": params, "batch_stats": stats}
            taps = run_model(objective.student, variables, images, train=True).taps
            return sum((jnp.vdot(tap, tap) for tap in taps.values()), start=jnp.zeros(()))

        student = {"params": state.params["student"], "batch_stats": state.batch_stats["student"]}
        given = (state.params, state.batch_stats, targets, images)
        return {
            "teacher": self._jitted(
                lambda v, x: make_targets(objective, v["params"], v["batch_stats"], x)[0],
                variables, images,
            ),
            "student forward": self._jitted(
                lambda v, x: _seen(run_model(objective.student, v, x, train=True)),
                student, images,
            ),
            "forward and backward, of the taps' squares": self._jitted(
                jax.grad(of_taps), student["params"], student["batch_stats"], images
            ),
            "forward, connectors, loss": self._jitted(loss, *given),
            "forward and backward, of the loss": self._jitted(jax.grad(loss), *given),
        }  # fmt: skip

    def step_flops(self, phase: Phase, kept: bool = False) -> float:
        """Of one step, counted without devices; kept: without the teacher's."""
        objective, optimiser, state = self._on_one_device(phase)
        teacher, images = self.teacher_variables, self._images()
        labels = jnp.zeros(self.batch, jnp.int32)
        ask = lambda x: make_targets(objective, teacher["params"], teacher["batch_stats"], x)  # noqa: E731

        def step(state: Any, images: jax.Array, asked: Any) -> Any:
            return train_step(
                objective, optimiser, state, teacher["params"], images, labels, asked=asked
            )

        asked = jax.eval_shape(ask, images) if kept else None
        return count_flops(step, state, images, asked)

    def _images(self) -> jax.Array:
        return jax.random.normal(jax.random.key(1), (self.batch, *SHAPE))

    def _jitted(self, function: Any, *arguments: Any) -> Work:
        run, seconds, held = compiled(jax.jit(function), *arguments)
        flops = count_flops(function, *arguments)
        return Work(
            lambda: jax.block_until_ready(run(*arguments)), self.batch, 1, flops, held, seconds
        )

    def _state(self, program: parallel.Program) -> Any:
        student = program.init(jax.random.key(2))
        stats = self.teacher_variables["batch_stats"]
        state = program.begin(student, stats, jax.random.key(3))
        return parallel.replicate(jax.tree.map(np.array, state), self.devices)

    def _without_teacher(self, phase: Phase) -> parallel.Program:
        return parallel.compile_phase(
            self.networks[0], None, phase, Span(0, 1, 0, 1, 1, Fraction(1)), PREPROCESSING, SHAPE,
            self.devices, jnp.result_type(float),
        )  # fmt: skip

    def _on_one_device(self, phase: Phase) -> tuple[Objective, optax.GradientTransformation, Any]:
        """What a step is made of, and the state before it."""
        student, teacher = (
            prepared(MODELS[name](), self.precision, None) for name in (self.student, self.teacher)
        )
        objective = bind(student, teacher, phase, SHAPE)
        state = self._state(self.program(phase))
        optimiser = phase.optimiser.transformation(SPAN, jax.tree.map(lambda _: True, state.params))
        return objective, optimiser, state.replace(opt_state=optimiser.init(state.params))


def _preprocessing(views: int | None) -> Preprocessing:
    return dataclasses.replace(PREPROCESSING, views=views)


def _seen(forward: Any) -> tuple[Any, Any, Any]:
    """What a compiler must not leave out."""
    return forward.logits, forward.taps, forward.batch_stats
