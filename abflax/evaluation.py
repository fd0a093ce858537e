"""Held-out error and agreement, each example counted once."""

from __future__ import annotations

import contextlib
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
        test.image_shape, used, jnp.result_type(float), False, isinstance(test, Photographs),
    )  # fmt: skip
    params = {"student": network.variables["params"], "connectors": {}}
    stats = {
        "student": network.variables.get("batch_stats", {}),
        "connectors": {},
        "teacher": {},
    }
    params, stats = parallel.replicate((params, stats), used)
    with together(), contextlib.closing(Evaluation(test, used)) as evaluation:
        return evaluation(program, params, stats, {})


class Evaluation:
    """Held-out data, and the dispatches that measure a student on it: one, if it is all there."""

    def __init__(
        self,
        test: Dataset | Photographs,
        devices: tuple[jax.Device, ...],
        workers: int | None = None,
    ) -> None:
        self._held_out = HeldOut(test, devices, workers)
        self.close = self._held_out.close

    def __call__(
        self, program: parallel.Program, params: Any, batch_stats: Any, teacher_params: Any
    ) -> dict[str, Any]:
        sums: list[dict[str, Any]] = []
        fired: dict[str, np.ndarray] = {}

        def fetch(part: dict[str, Any]) -> None:
            for layer, neurons in part.pop("fired").items():
                fired[layer] = fired.get(layer, False) | np.asarray(neurons)
            sums.append(jax.tree.map(np.asarray, part))

        waiting: list[dict[str, Any]] = []
        for given in self._held_out:
            waiting.append(program.evaluate(params, batch_stats, teacher_params, *given))
            if len(waiting) == 2:  # no more dispatches, with their images, are under way
                fetch(waiting.pop(0))
        fetch(waiting.pop())
        total = jax.tree.map(
            lambda *parts: float(np.concatenate(parts, dtype=np.float64).sum()), *sums
        )
        examples = total["examples"]
        return {
            "test_error": total["errors"] / examples,
            "errors": int(total["errors"]),
            "examples": int(examples),
            "test_cross_entropy": total["cross_entropy"] / examples,
            "agreement": {k: v / examples for k, v in total["agreement"].items()},
            "silent": {layer: 1 - float(neurons.mean()) for layer, neurons in fired.items()},
        }
