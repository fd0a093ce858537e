"""Held-out error and agreement, each example counted once."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abflax import parallel
from abflax.compatibility import require_classes, require_fits, require_runs
from abflax.data import Dataset
from abflax.methods import METHODS
from abflax.networks import Network, prepared
from abflax.optim import Span
from abflax.processes import together

BATCH = 250
"""Images that a device looks at at once."""


def evaluate(network: Network, test: Dataset, devices: int | None = None) -> dict[str, Any]:
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
        test.image_shape, used, 1, jnp.result_type(float),
    )  # fmt: skip
    params = {"student": network.variables["params"], "connectors": {}}
    stats = {
        "student": network.variables.get("batch_stats", {}),
        "connectors": {},
        "teacher": {},
    }
    params, stats = parallel.replicate((params, stats), used)
    with together():
        return Evaluation(test, used)(program, params, stats, {})


class Evaluation:
    """Held-out data on the devices, and the one dispatch that measures a student on it."""

    def __init__(self, test: Dataset, devices: tuple[jax.Device, ...]) -> None:
        batch = BATCH * len(devices)
        batches = -(-len(test) // batch)
        index = np.arange(batches * batch, dtype=np.int32).reshape(batches, batch)
        # The last, partial batch is padded with example 0 and masked.
        self._mask = parallel.split(index < len(test), devices)
        self._examples = parallel.split(np.where(index < len(test), index, 0), devices)
        self._data = parallel.replicate(test.arrays(), devices)

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
            "silent": total["silent"],
        }
