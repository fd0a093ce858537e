"""What students that are taught together share: the teacher, the batches, the held-out data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abflax import parallel
from abflax.abreast import Dispatch, Made
from abflax.config import Resources, RunConfig
from abflax.data import Dataset, Photographs, Stream, shots, subset
from abflax.evaluation import Evaluation
from abflax.feed import Feed
from abflax.networks import Network, prepared
from abflax.record import environment
from abflax.step import TrainState
from abflax.taps import Model


class Classroom:
    """A teacher with its training and held-out data on some devices.

    Args:
      config: of any of the students: they have its `lesson` in common.
      teacher: None where there is none.
      data, test: the training data, of which the configuration's share is used, and the held-out.
      resources: see `abflax.Resources`.
      students: how many there are.
    """

    def __init__(
        self,
        config: RunConfig,
        teacher: Network | None,
        data: Dataset | Photographs,
        test: Dataset | Photographs | None,
        resources: Resources,
        students: int = 1,
    ) -> None:
        self.resources = resources
        self.devices = parallel.usable_devices(resources.devices)
        self.environment, self.students = environment(self.devices), students
        self.preprocessing = dataclasses.replace(data.preprocessing, views=config.views)
        self.data = subset(data, config.fraction, config.seeds.subset)
        if config.per_class is not None:
            self.data = shots(self.data, config.per_class, config.seeds.subset)
        self.sent = isinstance(data, Photographs)
        self.per_dispatch = resources.steps_per_dispatch or parallel.default_steps_per_dispatch(
            self.devices, self.sent
        )
        self.teacher: Model | None = None
        self.teacher_params: Any = {}
        self.teacher_stats: Any = {}
        if teacher is not None:
            self.teacher = prepared(teacher.model, config.precision, parallel.AXIS)
            dtype = jnp.result_type(float)
            # Copies: the statistics are donated with the state.
            variables = jax.tree.map(lambda leaf: np.array(leaf, dtype), dict(teacher.variables))
            self.teacher_stats = variables.get("batch_stats", {})
            self.teacher_params = parallel.replicate(variables["params"], self.devices)
        self.key = jax.random.key(config.seeds.augmentation)
        parallel.split(np.zeros((1, config.batch_size)), self.devices)
        stream = Stream(len(self.data), config.batch_size, config.seeds.order)
        self.feed = Feed(
            self.data, stream, self.per_dispatch, self.devices, config.seeds.augmentation,
            resources.workers,
        )  # fmt: skip
        self.evaluation = None
        if test is not None:
            self.evaluation = Evaluation(test, self.devices, resources.workers)

    def close(self) -> None:
        """Ends what feeds the students."""
        for each in (self.feed, self.evaluation):
            if each is not None:
                each.close()

    def make(self, dispatches: Sequence[Dispatch]) -> tuple[Made, ...]:
        """The same steps of several students, or their evaluation: all dispatches have one `step`
        and one `count`."""
        step, count = dispatches[0].step, dispatches[0].count
        programs = tuple(each.program for each in dispatches)
        states = tuple(each.state for each in dispatches)
        if not count:
            return self._evaluate(programs, states)
        train = parallel.compile_steps(
            programs, self.preprocessing, self.devices, self.per_dispatch, self.sent
        )
        data, *order = self.feed(step, count)
        kept = tuple(each.kept for each in dispatches) if self.resources.keep_targets else None
        made = train(states, self.teacher_params, data, self.key, *order, count, kept)
        return tuple(zip(*made, strict=True))

    def _evaluate(
        self, programs: tuple[parallel.Program, ...], states: tuple[TrainState, ...]
    ) -> tuple[Made, ...]:
        measured: Sequence[dict[str, Any]] = [{}] * len(states)
        if self.evaluation is not None:
            students = tuple((state.params, state.batch_stats) for state in states)
            measured = self.evaluation(programs, students, self.teacher_params)
        return tuple(zip(states, measured, strict=True))

    def look(self, program: parallel.Program, state: TrainState, step: int) -> dict[str, Any]:
        """What is not finite in a student's next step; see `abflax.diagnosis.look`."""
        data, *order = self.feed(step, 1)
        return program.look(state, self.teacher_params, data, self.key, *order)
