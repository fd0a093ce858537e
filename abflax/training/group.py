"""What runs that are trained together share: the teacher, the batches, the held-out data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from abflax.config import Resources, RunConfig
from abflax.data import (
    Augment,
    Batches,
    Dataset,
    DataSets,
    Stream,
    TrainData,
    few_shot_subset,
    subset,
)
from abflax.metrics import Metric
from abflax.models.network import Network, configure_model
from abflax.models.variables import floats_in, not_finite
from abflax.runtime.preemption import Preemption
from abflax.runtime.reporter import NullReporter, Reporter
from abflax.taps import Model
from abflax.training.devices import (
    AXIS,
    default_steps_per_dispatch,
    replicate,
    shard_batch,
    usable_devices,
)
from abflax.training.evaluation import Evaluation
from abflax.training.fingerprint import as_it_is_now
from abflax.training.inputs import LoaderInputs, OrderedInputs, TrainInputs
from abflax.training.parallel import InputSpec, compile_steps
from abflax.training.record import environment
from abflax.training.step import TrainState

if TYPE_CHECKING:
    from abflax.training.run import Run


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher on the devices, or the place of none.

    Attributes:
      model: as it computes; None: there is none.
      params: its weights.
      stats: its other variables.
      is_finite: whether all of them are.
    """

    model: Model | None = None
    params: Any = dataclasses.field(default_factory=dict)
    stats: Any = dataclasses.field(default_factory=dict)
    is_finite: bool = True


class TrainingGroup:
    """The teacher, data, devices and compiled programs that runs share.

    Args:
      config: of any of the runs: they have its `group_key` in common.
      teachers: the anchors in their order, and the teacher; empty where there is none.
      data_sets: the training data, of which the configuration's share is used; and others.
      resources: see `abflax.Resources`.
      size: how many runs there are.
      keep_going: whether a run that fails leaves the others running.
      reporter: told when a run fails.
      preemption: notes a signal, which stops the runs.
      metrics: measured besides, by name.
      code: the digests of what each run's code computes, by its hash; see `InputSpec`.
    """

    def __init__(  # noqa: PLR0913 - all that runs share
        self,
        config: RunConfig,
        teachers: Sequence[Network],
        data_sets: DataSets,
        resources: Resources,
        *,
        size: int = 1,
        keep_going: bool = False,
        reporter: Reporter | None = None,
        preemption: Preemption | None = None,
        metrics: Mapping[str, Metric] | None = None,
        code: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.resources, self.size, self.keep_going = resources, size, keep_going
        self._code = code or {}
        self.reporter = reporter or NullReporter()
        self.preemption = preemption or Preemption()
        devices = usable_devices(resources.devices)
        shard_batch(np.zeros((1, config.batch_size)), devices)  # raises if it does not divide
        self.environment = environment(devices)
        data, test, target = data_sets.train, data_sets.test, data_sets.target
        self.data = _selected(data, config)
        streamed = not isinstance(data, Dataset)
        default = default_steps_per_dispatch(devices, streamed)
        self.steps_per_dispatch = resources.steps_per_dispatch or default
        self.spec = InputSpec(
            dataclasses.replace(data.preprocessing, views=config.views), data.image_shape, devices,
            streamed, self.steps_per_dispatch, target.preprocessing if target is not None else None,
            augment=_augment_of(config, data.image_shape),
        )  # fmt: skip
        self.teachers = [_placed(each, config.precision, devices) for each in teachers]
        self.teachers = self.teachers or [Teacher()]
        self.key = jax.random.key(config.seeds.augmentation)
        self.inputs: TrainInputs
        if isinstance(self.data, Batches):
            self.inputs = LoaderInputs(self.data, self.spec)
        else:
            stream = Stream(len(self.data), config.batch_size, config.seeds.order)
            self.inputs = OrderedInputs(
                self.data, stream, self.spec, config.seeds.augmentation, resources.workers, target
            )
        self.evaluation = None
        if test is not None:
            self.evaluation = Evaluation(test, devices, resources.workers, metrics)

    def close(self) -> None:
        """Ends the processes that decode images."""
        for each in (self.inputs, self.evaluation):
            if each is not None:
                each.close()

    def spec_of(self, config: RunConfig) -> InputSpec:
        """The form of the inputs, with the digests of what a run's own code computes."""
        return dataclasses.replace(self.spec, code=repr(self._code.get(config.hash)))

    def train_steps(
        self, runs: Sequence[Run], count: int
    ) -> Sequence[tuple[TrainState, dict[str, Any]]]:
        """Makes the next `count` steps of runs that are at the same step.

        Returns:
          (state, metrics) of each run. The states before are consumed.
        """
        programs, states, cached = zip(
            *((run.program, run.state, run.cached_targets) for run in runs), strict=True
        )
        steps = compile_steps(programs, self.spec)
        inputs = self.inputs(runs[0].step, count, runs[0].history.position)
        targets = cached if self.resources.cache_targets else None
        trained = steps(states, runs[0].teacher.params, inputs, self.key, count, targets)
        return tuple(zip(*trained, strict=True))

    def evaluate(self, runs: Sequence[Run]) -> Sequence[dict[str, Any]]:
        """Measures runs on the held-out data; nothing is measured without any.

        Returns:
          What `Evaluation` measures of each run; "ema" likewise, of averaged weights.
        """
        if self.evaluation is None or not runs:
            return [{} for _ in runs]
        averaged = [run for run in runs if run.state.average is not None]
        programs = tuple(run.program for run in (*runs, *averaged))
        students = [(run.state.params, run.state.batch_stats) for run in runs]
        for run in averaged:
            params = run.state.params | {"student": run.state.average["params"]}
            students.append((params, run.state.batch_stats))
        measured = self.evaluation(programs, tuple(students), runs[0].teacher.params)
        for run, of_average in zip(averaged, measured[len(runs) :], strict=True):
            measured[runs.index(run)]["ema"] = of_average
        return measured[: len(runs)]


def _augment_of(config: RunConfig, image_shape: tuple[int, ...]) -> Augment | None:
    """The user's augmentation, as it is now."""
    if config.augment is None or config.augment.made is None:
        return None
    images = jax.ShapeDtypeStruct((config.batch_size, *image_shape), jnp.result_type(float))
    return as_it_is_now(config.augment.made, jax.random.key(0), images)


def _selected(data: TrainData, config: RunConfig) -> TrainData:
    """The share of the training data that a run uses."""
    if isinstance(data, Batches):
        return data
    data = subset(data, config.fraction, config.seeds.subset)
    if config.per_class is None:
        return data
    return few_shot_subset(data, config.per_class, config.seeds.subset)


def _placed(network: Network, precision: str, devices: Sequence[jax.Device]) -> Teacher:
    # Copies: what is not trained is donated with the state.
    variables = jax.tree.map(np.array, dict(network.variables))
    variables = {"batch_stats": {}, **floats_in(jnp.result_type(float), variables)}
    finite = not not_finite(variables)
    params = replicate(variables.pop("params"), devices)
    return Teacher(configure_model(network.model, precision, AXIS), params, variables, finite)
