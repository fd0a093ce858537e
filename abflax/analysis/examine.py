"""Runs networks over held-out images and collects the measures of `measures`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abflax.analysis.measures import (
    by_channel,
    by_class,
    first_order_distance,
    matching,
    pattern_digests,
)
from abflax.data import Dataset, Preprocessing, normalize
from abflax.errors import InputError, require_instances, unknown
from abflax.losses import activation_indicator
from abflax.methods.connectors import connect
from abflax.metrics import misclassified
from abflax.models.checks import require_usable
from abflax.models.network import Network, configure_model, require_network
from abflax.runtime.jax_checks import jax_defaults, require_devices
from abflax.taps import Forward, Model, run_model, tap_shapes
from abflax.training.fingerprint import code_digest
from abflax.training.inputs import EVALUATION_BATCH, padded_batches


@dataclasses.dataclass(frozen=True, eq=False)
class Activity:
    """The predictions and the firing neurons of one network on n examples.

    Attributes:
      wrong: whether the prediction is wrong, booleans `[n]`.
      predictions: the class of the largest logit, `[n]`.
      firing_rate: layer -> `[…, channels]`, the share of examples on which each neuron fires.
      patterns: layer -> the number of distinct activation patterns of that layer, at most n.
      joint_patterns: the number of distinct patterns of all layers together.
    """

    wrong: np.ndarray
    predictions: np.ndarray
    firing_rate: Mapping[str, np.ndarray]
    patterns: Mapping[str, int]
    joint_patterns: int


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """The agreement of two networks on one layer, on n examples.

    Attributes:
      by_neuron: `[…, channels]`, the share of examples on which the neuron's indicators agree.
      by_channel: `[channels]`, the mean over positions.
      by_class: `[classes]`, the mean over each class's examples; NaN for a class without any.
      by_example: `[n]`, the share of neurons that agree.
      agreement: the share over all neurons and examples.
    """

    by_neuron: np.ndarray
    by_channel: np.ndarray
    by_class: np.ndarray
    by_example: np.ndarray
    agreement: float


@dataclasses.dataclass(frozen=True, eq=False)
class Examination:
    """The activity of a network and its teacher, and their agreement.

    Attributes:
      student: the network's activity.
      teacher: the teacher's activity; None if there is no teacher.
      match: layer -> `Match`, for layers with the same neurons in both networks.
      unmatched: the layers of either network that `match` leaves out.
    """

    student: Activity
    teacher: Activity | None
    match: Mapping[str, Match]
    unmatched: tuple[str, ...]

    def agreement_by_example(self) -> np.ndarray:
        """Computes each example's mean agreement over the matched layers, `[n]`.

        Raises:
          ValueError: if no layer is matched.
        """
        if not self.match:
            raise InputError(
                "there is no layer in which both networks have the same neurons, so there is no "
                "agreement"
            )
        return np.mean([match.by_example for match in self.match.values()], axis=0)


@jax_defaults()
def examine(
    student: Network | Model,
    data: Dataset,
    teacher: Network | Model | None = None,
    connectors: Mapping[str, Any] | None = None,
) -> Examination:
    """Runs a network, and its teacher if there is one, over held-out images in evaluation mode.

    Layers of different width have no neurons in common, and are listed in `unmatched`, unless the
    connectors of the training map them to the teacher's width.

    Args:
      student: the network.
      data: the images.
      teacher: the network that it is compared with.
      connectors: those of the student, `abflax.Result.connectors`. The student's own activity is
        that before them, as in records.

    Raises:
      ValueError: if a network does not fit the data, or the connectors do not fit the student.
    """
    require_instances({"data": (data, Dataset)})
    require_devices()
    roles = ("the student", "the teacher")
    given = (student,) if teacher is None else (student, teacher)
    networks = tuple(map(require_network, roles, given))
    models = tuple(_checked(roles[i], network, data) for i, network in enumerate(networks))
    variables = tuple(dict(network.variables) for network in networks)
    code = tuple(code_digest(model, data.image_shape) for model in models)
    run = _observe(models, data.preprocessing, code)
    batches = [
        _on_host(run(variables, connectors, images, labels, valid), int(valid.sum()))
        for images, labels, valid in _batches(data)
    ]
    by_network = zip(*(batch["networks"] for batch in batches), strict=True)
    activities = [_activity(measures) for measures in by_network]
    match = {
        layer: _match([batch["match"][layer] for batch in batches], data)
        for layer in batches[0]["match"]
    }
    if teacher is None:
        return Examination(activities[0], None, match, ())
    layers = {layer for activity in activities for layer in activity.firing_rate}
    unmatched = tuple(sorted(layers - set(match)))
    return Examination(activities[0], activities[1], match, unmatched)


@jax_defaults()
def boundary_distances(
    network: Network | Model, data: Dataset, layer: str, *, neurons: int | None = 64, seed: int = 0
) -> np.ndarray:
    """Estimates each image's distance to the activation boundaries of a layer's neurons.

    Distances are Euclidean over the whole image, in the units of its stored pixels, and to first
    order (see `first_order_distance`). The minimum over a row is the distance to the nearest
    boundary of the chosen neurons. This is an upper bound of the layer's minimum.

    Args:
      network: the network, which runs in evaluation mode.
      data: the images.
      layer: one of the network's taps.
      neurons: the number of neurons, drawn at random; None: all, in order. Each costs a backward
        pass.
      seed: of the draw.

    Returns:
      `[examples, neurons]`.

    Raises:
      ValueError: if the network does not fit the data or has no such tap.
    """
    network = require_network("the network", network)
    model = _checked("the network", network, data)
    variables = dict(network.variables)
    distance = _distance(model, data.preprocessing, layer, code_digest(model, data.image_shape))
    shapes = tap_shapes(model, variables, data.image_shape)
    if layer not in shapes:
        raise unknown("layer", layer, shapes)
    chosen = np.arange(np.prod(shapes[layer]))
    if neurons is not None and neurons < len(chosen):
        chosen = np.random.default_rng(seed).choice(chosen, neurons, replace=False)
    return np.concatenate(
        [
            np.stack([np.asarray(distance(variables, images, n))[valid] for n in chosen], axis=1)
            for images, _, valid in _batches(data)
        ]
    )


def _checked(what: str, network: Network, data: Dataset) -> Model:
    """Checks that a network fits the data, and returns its configured model."""
    require_usable(what, network, data.image_shape, classes=data.num_classes)
    return configure_model(network.model, "float32", None)


def _batches(data: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields the images and labels of each batch, and a mask that is False for padding."""
    batches = padded_batches(len(data), min(EVALUATION_BATCH, len(data)))
    for index, valid in zip(*batches, strict=True):
        yield data.images[index], data.labels[index], valid


@functools.lru_cache(maxsize=16)
def _observe(models: tuple[Model, ...], preprocessing: Preprocessing, code: tuple[str, ...]) -> Any:
    """Compiles the measures of a batch: each model's firing neurons, and the agreement of two.

    Returns a function of (variables of each model, connectors of the first or None, images, labels,
    mask). It returns indicators as packed bits. `code` is what the models compute now.
    """
    del code

    @jax.jit
    def observe(
        variables: Any, connectors: Any, images: jax.Array, labels: jax.Array, valid: jax.Array
    ) -> dict[str, Any]:
        images = normalize(images, preprocessing)

        def count(booleans: jax.Array) -> jax.Array:
            return jnp.einsum("b...,b->...", booleans, valid, preferred_element_type=jnp.int32)

        def measure(model: Model, variables: Any) -> tuple[dict[str, Any], Forward]:
            forward = run_model(model, variables, images, train=False)
            fires = _indicators(forward)
            flat = {layer: array.reshape(len(images), -1) for layer, array in fires.items()}
            return {
                "wrong": misclassified(forward.logits, labels),
                "predictions": forward.logits.argmax(axis=-1),
                "bits": {layer: jnp.packbits(array, axis=1) for layer, array in flat.items()},
                "fired": {layer: count(array) for layer, array in fires.items()},
            }, forward

        measures, passes = zip(*map(measure, models, variables), strict=True)
        first, last = passes[0], _indicators(passes[-1])
        first = _indicators(first if connectors is None else connect(connectors, first))
        match = {}
        for layer, fires in first.items():
            if len(models) > 1 and layer in last and fires.shape == last[layer].shape:
                agrees = matching(fires, last[layer])
                by_example = agrees.reshape(len(images), -1).mean(axis=1)
                match[layer] = {"by_example": by_example, "agreed": count(agrees)}
        return {"networks": measures, "match": match}

    return observe


def _indicators(forward: Forward) -> dict[str, jax.Array]:
    return {layer: activation_indicator(tap) for layer, tap in forward.taps.items()}


def _on_host(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """Copies the measures of a batch to the host, without padding and with patterns as digests."""
    batch = jax.tree.map(np.asarray, batch)
    for measures in (*batch["networks"], *batch["match"].values()):
        for name in ("wrong", "predictions", "by_example"):
            if name in measures:
                measures[name] = measures[name][:count]
    for measures in batch["networks"]:
        bits = measures.pop("bits")
        measures["digests"] = {layer: pattern_digests(rows[:count]) for layer, rows in bits.items()}
    return batch


@functools.lru_cache(maxsize=64)
def _distance(model: Model, preprocessing: Preprocessing, layer: str, code: str) -> Any:
    """Compiles the distance: (variables, images, index of a neuron) -> `[batch]`.

    `code` is what the model computes now.
    """
    del code

    @jax.jit
    def distance(variables: Any, images: jax.Array, neuron: jax.Array) -> jax.Array:
        def value(images: jax.Array) -> jax.Array:
            forward = run_model(model, variables, normalize(images, preprocessing), train=False)
            return forward.taps[layer].reshape(len(images), -1)[:, neuron]

        # In evaluation mode examples are independent, so one pass gives all gradients.
        values, pullback = jax.vjp(value, images.astype(jnp.result_type(float)))
        return first_order_distance(values, *pullback(jnp.ones_like(values)))

    return distance


def _activity(batches: Sequence[dict[str, Any]]) -> Activity:
    wrong = np.concatenate([batch["wrong"] for batch in batches])
    layers = batches[0]["fired"]
    digests = {
        layer: [digest for batch in batches for digest in batch["digests"][layer]]
        for layer in layers
    }
    return Activity(
        wrong=wrong,
        predictions=np.concatenate([batch["predictions"] for batch in batches]),
        firing_rate={
            layer: sum(batch["fired"][layer] for batch in batches) / len(wrong) for layer in layers
        },
        patterns={layer: len(set(patterns)) for layer, patterns in digests.items()},
        joint_patterns=len(set(zip(*digests.values(), strict=True))),
    )


def _match(batches: list[dict[str, Any]], data: Dataset) -> Match:
    by_neuron = sum(batch["agreed"] for batch in batches) / len(data)
    by_example = np.concatenate([batch["by_example"] for batch in batches])
    return Match(
        by_neuron=by_neuron,
        by_channel=by_channel(by_neuron),
        by_class=by_class(by_example, data.labels, data.num_classes),
        by_example=by_example,
        agreement=float(by_neuron.mean()),
    )
