"""What is not finite first in a step that went wrong. Nothing of it runs while all goes well."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from abflax.methods.objective import (
    Objective,
    apply_connectors,
    connected_taps,
)
from abflax.taps import run_model
from abflax.training.step import TrainState

_GREW = 10.0  # times


def find_nonfinite(
    objective: Objective,
    state: TrainState,
    teacher_params: Any,
    images: jax.Array,
    labels: jax.Array,
    targets: tuple[Any, ...],
    dropout_key: jax.Array | None = None,
) -> dict[str, list[dict[str, jax.Array]]]:
    """Finds the arrays of a step that are not finite, on any device.

    Args:
      objective: the phase, bound to student and teacher.
      state: before the step.
      teacher_params: the teacher's weights.
      images: this device's share, normalized.
      labels: of the images.
      targets: as `make_targets` computes them for these images.
      dropout_key: as `train_step` takes it.

    Returns:
      "sources" (images and weights), "taps" (pre-activations and logits; the teacher's, the
      student's, those behind connectors) and "results" (loss and gradients): each a list of
      {name: whether it is not finite} in the order in which a step computes them. And "sown": the
      sum of the losses that the student sows, its largest over devices; empty where there are none.
    """

    def bad(name: str, array: jax.Array) -> dict[str, jax.Array]:
        found = jnp.logical_not(jnp.isfinite(array).all()).astype(jnp.int32)
        return {name: jax.lax.pmax(found, objective.axis_name) if objective.axis_name else found}

    def weights(what: str, tree: Any) -> list[dict[str, jax.Array]]:
        return [bad(f"{what} {name}", leaf) for name, leaf in flatten_dict(tree, sep="/").items()]

    def passed(what: str, taps: Mapping[str, jax.Array]) -> list[dict[str, jax.Array]]:
        return [bad(f"{what} {name}", tap) for name, tap in taps.items()]

    phase, params, stats = objective.phase, state.params, state.batch_stats
    sources, taps = [bad("the images", images)], []
    if objective.teacher is not None:
        variables = {"params": params.get("teacher", teacher_params), **stats["teacher"]}
        train = phase.teacher_batch_statistics or phase.trains_teacher
        teacher = run_model(objective.teacher, variables, images, train=train)
        sources += weights("the teacher's", variables)
        taps += passed("the teacher's", teacher.taps) + [
            bad("the teacher's logits", teacher.logits)
        ]
    variables = {"params": params["student"], **stats["student"]}
    student = run_model(objective.student, variables, images, train=True, dropout_key=dropout_key)
    sources += weights("the student's", {"params": params["student"]})
    taps += passed("the student's", student.taps) + [bad("the student's logits", student.logits)]
    for index, connectors in enumerate(objective.connectors):
        if connectors is not None:
            view, _, _ = apply_connectors(
                connectors, index, student, targets[index], params, stats, True
            )
            behind = {name: view.taps[name] for name in connected_taps(connectors)}
            sources += weights("the connectors'", params["connectors"][f"term{index}"])
            taps += passed("what the connector makes of the student's", behind)
    (loss, _), gradients = jax.value_and_grad(
        lambda params: objective.loss(
            params, stats, targets, images, labels, key=dropout_key, step=state.step
        ),
        has_aux=True,
    )(params)
    results, sown = [], []
    if student.losses is not None:
        results.append(bad("what the student sows", student.losses))
        axis = objective.axis_name
        sown.append({"sum": jax.lax.pmax(student.losses, axis) if axis else student.losses})
    results += [bad("the loss", loss), *weights("the gradient of the", gradients)]
    results.append(bad("the gradient's norm", optax.tree.norm(gradients)))
    return {"sources": sources, "taps": taps, "results": results, "sown": sown}


def describe_nonfinite(found: dict[str, list[dict[str, Any]]]) -> str:
    """Describes the result of `find_nonfinite`, in half a sentence."""
    sources, taps, results = (
        [name for entry in found[kind] for name, bad in entry.items() if bad]
        for kind in ("sources", "taps", "results")
    )
    if taps:
        source = f" (and of what goes in, {sources[0]})" if sources else ""
        text = f"the first tap that is not finite is {taps[0]}{source}"
    elif results or sources:
        text = f"every tap is finite, {(results or sources)[0]} is not"
    else:
        text = "looked at again, everything is finite"
    for entry in found["sown"]:
        text += f"; the losses that the student sows, added to the loss, are {entry['sum']:.3g}"
    return text


@dataclasses.dataclass
class Trend:
    """What tells divergence from a bad batch or bad weights.

    Attributes:
      norm: ℓ2 norm of the student's weights where the phase began, or was gone on with.
      lowest: the smallest finite loss since.
      last: the newest finite loss since.
    """

    norm: float
    lowest: float = math.inf
    last: float = math.nan

    def add(self, losses: np.ndarray) -> None:
        """Takes note of finite losses, `[steps]`."""
        if len(losses):
            self.lowest, self.last = min(self.lowest, float(losses.min())), float(losses[-1])

    def divergence(self, norm: float, learning_rate: float) -> str | None:
        """Half a sentence, where loss or weights have grown more than tenfold; else None."""
        grown = [
            f"{what} from {before:.3g} to {now:.3g}"
            for what, before, now in (
                ("the loss", self.lowest, self.last),
                ("the weights' norm", self.norm, norm),
            )
            if now > _GREW * before
        ]
        if not grown:
            return None
        return (
            f"training diverged: {' and '.join(grown)} grew, at a learning rate of "
            f"{learning_rate:g}"
            if math.isfinite(learning_rate)
            else f"training diverged: {' and '.join(grown)} grew, with the optimizer that was given"
        )


def norm_of(tree: Any) -> float:
    """The ℓ2 norm over all leaves of a tree on the host."""
    leaves = (np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree))
    return math.sqrt(sum(float(leaf @ leaf) for leaf in leaves))
