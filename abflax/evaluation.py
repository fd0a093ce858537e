"""Held-out error and agreement, each example counted once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abflax import parallel
from abflax.compatibility import require_classes, require_fits, require_runs
from abflax.data import Dataset, Photographs
from abflax.feed import HeldOut
from abflax.methods import METHODS
from abflax.networks import Network, prepared
from abflax.optim import Span
from abflax.processes import together


def evaluate(
    network: Network, test: Dataset | Photographs, devices: int | None = None
) -> dict[str, Any]:
    """A network's error on held-out data, each example counted once.

    Returns:
      {"test_error": share, "errors": count, "examples": count, "test_cross_entropy": nats,
      "agreement": {}, "silent": layer -> share of neurons that fire on no example}.
    """
    used = parallel.usable_devices(devices)
    require_runs("the network", network.model, test.image_shape, train=False, dropout=False)
    require_classes("the network", network.model, test.image_shape, test.num_classes)
    require_fits("the weights", network.model, network.variables, test.image_shape)
    model = prepared(network.model, "float32", parallel.AXIS)
    (phase,) = METHODS["cross-entropy"]()
    program = parallel.compile_phase(
        model, None, phase, Span(0, 1, 0, 1, 1, Fraction(1)), test.preprocessing,
        test.image_shape, used, jnp.result_type(float),
    )  # fmt: skip
    params = {"student": network.variables["params"], "connectors": {}}
    stats = {
        "student": network.variables.get("batch_stats", {}),
        "connectors": {},
        "teacher": {},
    }
    student = parallel.replicate((params, stats), used)
    with together(), contextlib.closing(Evaluation(test, used)) as evaluation:
        (found,) = evaluation((program,), (student,), {})
    return found


class Evaluation:
    """Held-out data, and the dispatches that measure students on it: one, if it is all there."""

    def __init__(
        self,
        test: Dataset | Photographs,
        devices: tuple[jax.Device, ...],
        workers: int | None = None,
    ) -> None:
        self._held_out = HeldOut(test, devices, workers)
        self.close = self._held_out.close
        self._compile = functools.partial(
            parallel.compile_evaluation, preprocessing=test.preprocessing, devices=devices,
            sent=isinstance(test, Photographs),
        )  # fmt: skip

    def __call__(
        self,
        programs: tuple[parallel.Program, ...],
        students: tuple[tuple[Any, Any], ...],
        teacher_params: Any,
    ) -> tuple[dict[str, Any], ...]:
        """What `evaluate` returns, and agreement with the teacher, of each student.

        Args:
          programs: of each, compiled for these devices.
          students: (params, batch_stats) of each one's state; they have one teacher.
        """
        measure = self._compile(programs)
        parts: list[tuple[dict[str, Any], ...]] = []
        waiting: list[tuple[dict[str, Any], ...]] = []
        for given in self._held_out:
            waiting.append(measure(students, teacher_params, *given))
            if len(waiting) == 2:  # no more dispatches, with their images, are under way
                parts.append(jax.tree.map(np.asarray, waiting.pop(0)))
        parts.append(jax.tree.map(np.asarray, waiting.pop()))
        return tuple(_summed(each) for each in zip(*parts, strict=True))


def _summed(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One student's, over all dispatches."""
    fired = [part.pop("fired") for part in parts]
    neurons = jax.tree.map(lambda *each: np.logical_or.reduce(each), *fired)
    total = jax.tree.map(lambda *each: float(np.concatenate(each, dtype=np.float64).sum()), *parts)
    examples = total["examples"]
    return {
        "test_error": total["errors"] / examples,
        "errors": int(total["errors"]),
        "examples": int(examples),
        "test_cross_entropy": total["cross_entropy"] / examples,
        "agreement": {k: v / examples for k, v in total["agreement"].items()},
        "silent": {layer: 1 - float(each.mean()) for layer, each in neurons.items()},
    }
