"""The work of a run, piece by piece: the engine's own compiled functions on made-up images."""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from abflax.data import Preprocessing, augment, normalize
from abflax.methods import METHODS
from abflax.methods.objective import Objective, bind, make_targets
from abflax.methods.optimizer import PhaseSchedule
from abflax.methods.phase import Phase
from abflax.models import MODELS
from abflax.models.network import configure_model
from abflax.models.variables import init_variables
from abflax.taps import Model, run_model
from abflax.training import devices, parallel
from abflax.training.devices import AXIS, replicate
from abflax.training.inputs import EVALUATION_BATCH
from abflax.training.step import train_step
from abflax.training.target_cache import cached_targets
from experiments.benchmark.timing import Work, compiled, compiled_work
from experiments.common.flops import count_flops

SHAPE = (32, 32, 3)
SPAN = PhaseSchedule(0, 10**6, 0, 10, 20, Fraction(10**5))
PREPROCESSING = Preprocessing((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), 4, True)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A teacher and a student with a method, in protocol `paper`, on the devices at hand.

    Attributes:
      batch: images a step, over all devices.
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
        """All devices."""
        return devices.usable_devices()

    def networks(self, axis: str | None = AXIS) -> tuple[Model, Model]:
        """(student, teacher), as a run uses them; axis None: on one device."""
        student, teacher = (
            configure_model(MODELS[name](), self.precision, axis)
            for name in (self.student, self.teacher)
        )
        return student, teacher

    @functools.cached_property
    def teacher_variables(self) -> Any:
        """Random weights of the teacher, on the devices."""
        model = MODELS[self.teacher]()
        variables = jax.jit(lambda key: init_variables(model, key, SHAPE))(jax.random.key(0))
        return replicate(variables, self.devices)

    @property
    def teacher_parts(self) -> tuple[Any, Any]:
        """The teacher's parameters, and its other variables by collection."""
        variables = dict(self.teacher_variables)
        return variables.pop("params"), variables

    @functools.cached_property
    def data(self) -> dict[str, jax.Array]:
        """The made-up images and labels, on the devices."""
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (self.examples, math.prod(SHAPE)), dtype=np.uint8)
        labels = draw.integers(0, 10, self.examples, dtype=np.int32)
        return replicate({"images": images, "labels": labels}, self.devices)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The method's phases."""
        return METHODS[self.method](protocol="paper")

    def spec(self, views: int | None = None) -> parallel.InputSpec:
        """How the images reach the networks."""
        steps = devices.default_steps_per_dispatch(self.devices)
        preprocessing = dataclasses.replace(PREPROCESSING, views=views)
        return parallel.InputSpec(preprocessing, SHAPE, self.devices, False, steps)

    def program(self, phase: Phase, views: int | None = None) -> parallel.PhaseProgram:
        """The compiled functions of a phase."""
        return parallel.compile_phase(*self.networks(), phase, SPAN, self.spec(views))

    def cached_targets(self, phase: Phase, views: int) -> Any:
        """The targets of a phase for all views of all images."""
        params, stats = self.teacher_parts
        program, spec = self.program(phase, views), self.spec(views)
        return cached_targets(program, spec, params, stats, self.data["images"], self.batch)

    def train(self, phase: Phase, cached: bool = False, students: int = 1) -> Work:
        """One dispatch of a phase's steps, augmentation included; cached: the teacher's targets."""
        views = 1 if cached else None
        program, spec = self.program(phase, views), self.spec(views)
        state, steps = self._begin(self.program(phase)), spec.steps_per_dispatch
        examples = self._examples(steps, self.batch)
        inputs = parallel.StepInputs(**self.data, examples=examples, epochs=np.zeros_like(examples))
        targets = (self.cached_targets(phase, views),) * students if views is not None else None
        fixed = (self.teacher_parts[0], inputs, jax.random.key(0), np.int32(steps), targets)
        states = tuple(jax.tree.map(jnp.copy, state) for _ in range(students))
        train = parallel.compile_steps((program,) * students, spec)
        run, seconds, held = compiled(train, states, *fixed)

        def once() -> None:
            nonlocal states
            states, metrics = run(states, *fixed)
            jax.block_until_ready(metrics)

        flops = self.step_flops(phase, cached) if students == 1 else None
        return Work(once, steps * self.batch, steps, flops, held, seconds, len(self.devices))

    def vmapped(self, phase: Phase, students: int) -> Work:
        """Steps of several students, as `train` makes them, but batched by `jax.vmap`.

        On one device. `train` writes them out one after the other.
        """
        steps = devices.default_steps_per_dispatch(self.devices)
        objective, optimizer, state = self._on_one_device(phase)
        states = jax.tree.map(lambda leaf: jnp.stack([leaf] * students), state)
        key, chosen = jax.random.key(0), jnp.arange(self.batch, dtype=jnp.int32) % self.examples
        fixed = (self.teacher_parts, self.data, key, chosen, jnp.zeros_like(chosen))

        def one(states: Any, teacher: Any, data: Any, key: Any, chosen: Any, epochs: Any) -> Any:
            images = data["images"][chosen].reshape(-1, *SHAPE)
            images = augment(images, chosen, epochs, key, PREPROCESSING)
            images, labels = normalize(images, PREPROCESSING), data["labels"][chosen]
            params, stats = teacher
            targets = make_targets(objective, params, stats, images)
            return jax.vmap(
                lambda state: train_step(
                    objective, optimizer, state, params, images, labels, precomputed_targets=targets
                )[0]
            )(states)

        def many(states: Any, *fixed: Any) -> Any:
            if steps == 1:  # no loop: see `default_steps_per_dispatch`
                return one(states, *fixed)
            return jax.lax.fori_loop(0, steps, lambda _, states: one(states, *fixed), states)

        run, seconds, held = compiled(jax.jit(many, donate_argnums=0), states, *fixed)

        def once() -> None:
            nonlocal states
            states = jax.block_until_ready(run(states, *fixed))

        return Work(once, steps * self.batch, steps, None, held, seconds)

    def teacher_forward(self) -> Work:
        """The teacher's forward pass alone: taps and logits of a batch."""
        return self._forward(self.networks(axis=None)[1], self.teacher_variables, train=False)

    def evaluate(self) -> Work:
        """Error of the student on all the made-up images, in one dispatch, without a teacher."""
        (phase,) = METHODS["cross-entropy"]()
        program = parallel.compile_phase(
            self.networks()[0], None, phase, PhaseSchedule.single_step(), self.spec()
        )
        state = self._begin(program)
        batch = EVALUATION_BATCH * len(self.devices)
        examples = self._examples(max(1, self.examples // batch), batch)
        inputs = parallel.StepInputs(
            **self.data, examples=examples, mask=np.ones_like(examples, bool)
        )
        evaluation = parallel.compile_evaluation((program,), self.spec())
        student = (state.params, state.batch_stats)
        return compiled_work(
            evaluation, (student,), {}, inputs, images=examples.size, devices=len(self.devices)
        )

    def parts(self) -> dict[str, Work]:
        """Where a step of the first phase goes."""
        objective, _, state = self._on_one_device(self.phases[0])
        teacher, images = self.teacher_parts, self._images
        labels = jnp.zeros(self.batch, jnp.int32)

        def targets_of(teacher: tuple[Any, Any], images: jax.Array) -> Any:
            return make_targets(objective, *teacher, images)[0]

        def loss(params: Any, stats: Any, targets: Any, images: jax.Array) -> jax.Array:
            return objective.loss(params, stats, targets, images, labels)[0]

        def of_taps(params: Any, stats: Any, images: jax.Array) -> jax.Array:
            variables = {"params": params, "batch_stats": stats}
            taps = run_model(objective.student, variables, images, train=True).taps
            return sum((jnp.vdot(tap, tap) for tap in taps.values()), start=jnp.zeros(()))

        student = state.student
        targets = jax.jit(targets_of)(teacher, images)
        arguments = (state.params, state.batch_stats, targets, images)
        return {
            "teacher": self._jitted(targets_of, teacher, images),
            "student forward": self._forward(objective.student, student, train=True),
            "forward and backward, of the taps' squares": self._jitted(
                jax.grad(of_taps), student["params"], student["batch_stats"], images
            ),
            "forward, connectors, loss": self._jitted(loss, *arguments),
            "forward and backward, of the loss": self._jitted(jax.grad(loss), *arguments),
        }

    def step_flops(self, phase: Phase, cached: bool = False) -> float:
        """FLOP of one step, counted without devices; without the teacher's if they are cached."""
        objective, optimizer, state = self._on_one_device(phase)
        params, stats = self.teacher_parts
        labels = jnp.zeros(self.batch, jnp.int32)
        keys = jax.random.split(jax.random.key(0), self.batch)
        make = functools.partial(make_targets, objective, params, stats, labels=labels, keys=keys)

        def step(state: Any, images: jax.Array, targets: Any) -> Any:
            targets = make(images) if targets is None else targets
            return train_step(
                objective, optimizer, state, params, images, labels, precomputed_targets=targets
            )

        targets = jax.eval_shape(make, self._images) if cached else None
        return count_flops(step, state, self._images, targets)

    @property
    def _images(self) -> jax.Array:
        return jax.random.normal(jax.random.key(1), (self.batch, *SHAPE))

    def _examples(self, batches: int, batch: int) -> Any:
        index = np.arange(batches * batch, dtype=np.int32).reshape(batches, batch)
        return devices.shard_batch(index % self.examples, self.devices)

    def _forward(self, model: Model, variables: Any, train: bool) -> Work:
        def outputs(variables: Any, images: jax.Array) -> Any:
            forward = run_model(model, variables, images, train=train)
            return forward.logits, forward.taps, forward.state

        return self._jitted(outputs, variables, self._images)

    def _jitted(self, function: Any, *arguments: Any) -> Work:
        flops = count_flops(function, *arguments)
        return compiled_work(jax.jit(function), *arguments, images=self.batch, flops=flops)

    def _begin(self, program: parallel.PhaseProgram) -> Any:
        student = program.init(jax.random.key(2))
        state = program.begin(student, self.teacher_parts[1], jax.random.key(3))
        return replicate(jax.tree.map(np.array, state), self.devices)

    def _on_one_device(self, phase: Phase) -> tuple[Objective, optax.GradientTransformation, Any]:
        """What a step is made of, and the state before it."""
        objective = bind(*self.networks(axis=None), phase, SHAPE)
        state = self._begin(self.program(phase))
        optimizer = phase.optimizer.transformation(SPAN, jax.tree.map(lambda _: True, state.params))
        return objective, optimizer, state.replace(opt_state=optimizer.init(state.params))
