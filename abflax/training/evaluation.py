"""Held-out error and agreement, each example counted once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from abflax.data import Dataset, ImageFiles
from abflax.errors import NonFiniteError, require_instances
from abflax.methods import METHODS, PhaseSchedule
from abflax.metrics import Metric
from abflax.models.checks import require_usable
from abflax.models.network import Network, configure_model, require_network
from abflax.models.variables import not_finite
from abflax.runtime.distributed import detect_lost_process
from abflax.runtime.jax_checks import jax_defaults, require_devices
from abflax.taps import Model
from abflax.training.compatibility import require_metrics
from abflax.training.devices import AXIS, replicate, usable_devices
from abflax.training.fingerprint import code_digest
from abflax.training.inputs import EvaluationInputs
from abflax.training.parallel import InputSpec, PhaseProgram, compile_evaluation, compile_phase


@jax_defaults()
def evaluate(
    network: Network | Model,
    test: Dataset | ImageFiles,
    devices: int | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> dict[str, Any]:
    """Measures a network's error on held-out data, each example counted once.

    Args:
      network: the model and its weights; an NNX module brings its own.
      test: the held-out data.
      devices: how many of each process's devices; None: all.
      metrics: what else to measure, as `abflax.distill` takes it.

    Returns:
      {"test_error": share, "errors": count, "examples": count, "test_cross_entropy": nats,
      "agreement": {}, "silent": layer -> share of neurons that fire on no example}, and "metrics":
      name -> mean, where some were given.

    Raises:
      ValueError: if the network does not fit the data.
      NonFiniteError: if its weights or logits are NaN or infinite.
    """
    network = require_network("the network", network)
    require_instances({"test": (test, Dataset | ImageFiles)})
    require_devices()
    used = usable_devices(devices)
    require_usable("the network", network, test.image_shape, classes=test.num_classes)
    metrics = require_metrics(metrics, test.num_classes)
    if names := not_finite(network.variables):
        raise NonFiniteError(f"the network's {names[0]} holds NaN or infinity")
    model = configure_model(network.model, "float32", AXIS)
    (phase,) = METHODS["cross-entropy"]()
    own = {name: tree for name, tree in network.variables.items() if name != "params"}
    params = {"student": network.variables["params"], "connectors": {}}
    stats = {"student": own, "connectors": {}, "teacher": {}}
    student = replicate((params, stats), used)
    with (
        detect_lost_process(),
        contextlib.closing(Evaluation(test, used, metrics=metrics)) as evaluation,
    ):
        spec = dataclasses.replace(evaluation.spec, code=code_digest(model, test.image_shape))
        program = compile_phase(model, None, phase, PhaseSchedule.single_step(), spec)
        (measured,) = evaluation((program,), (student,), {})
    if not np.isfinite(measured["test_cross_entropy"]):
        raise NonFiniteError("the network's logits, or its cross-entropy, are not finite numbers")
    for name, mean in measured.get("metrics", {}).items():
        if not np.isfinite(mean):
            raise NonFiniteError(f"the metric {name} is not a finite number")
    return measured


class Evaluation:
    """Held-out data on some devices, and the program that measures students on them."""

    def __init__(
        self,
        test: Dataset | ImageFiles,
        devices: tuple[jax.Device, ...],
        workers: int | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        streamed = isinstance(test, ImageFiles)
        self.spec = InputSpec(
            test.preprocessing, test.image_shape, devices, streamed,
            metrics=tuple((metrics or {}).items()),
        )  # fmt: skip
        self._inputs = EvaluationInputs(test, devices, workers)
        self.close = self._inputs.close

    def __call__(
        self,
        programs: tuple[PhaseProgram, ...],
        students: tuple[tuple[Any, Any], ...],
        teacher_params: Any,
    ) -> tuple[dict[str, Any], ...]:
        """Measures each student: what `evaluate` returns, and agreement with the teacher.

        Args:
          programs: of each student, compiled for these devices.
          students: (params, batch_stats) of each student's state; they have one teacher.
          teacher_params: the teacher's parameters.
        """
        measure = compile_evaluation(programs, self.spec)
        parts: list[tuple[dict[str, Any], ...]] = []
        pending: list[tuple[dict[str, Any], ...]] = []
        for inputs in self._inputs:
            pending.append(measure(students, teacher_params, inputs))
            if len(pending) == 2:  # so at most two dispatches hold their images
                parts.append(jax.tree.map(np.asarray, pending.pop(0)))
        parts.append(jax.tree.map(np.asarray, pending.pop()))
        return tuple(_summarize(each) for each in zip(*parts, strict=True))


def _summarize(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One student's measures, from the sums of all dispatches."""
    fired = [part.pop("fired") for part in parts]
    neurons = jax.tree.map(lambda *each: np.logical_or.reduce(each), *fired)
    total = jax.tree.map(lambda *each: float(np.concatenate(each, dtype=np.float64).sum()), *parts)
    examples = total["examples"]
    means = {name: value / examples for name, value in total["metrics"].items()}
    measured = {
        "test_error": total["errors"] / examples,
        "errors": int(total["errors"]),
        "examples": int(examples),
        "test_cross_entropy": total["cross_entropy"] / examples,
        "agreement": {k: v / examples for k, v in total["agreement"].items()},
        "silent": {layer: 1 - float(each.mean()) for layer, each in neurons.items()},
        **({"metrics": means} if means else {}),
    }
    if "teacher_errors" in total:
        measured["teacher_test_error"] = total["teacher_errors"] / examples
    return measured
