"""Networks run over held-out images, for what `measures` says of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
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
from abflax.errors import InputError, unknown
from abflax.losses import activation_indicator
from abflax.metrics import misclassified
from abflax.models.checks import require_classes, require_fits, require_runs
from abflax.models.network import Network, configure_model
from abflax.taps import Model, run_model

_BATCH = 250


@dataclasses.dataclass(frozen=True, eq=False)
class Activity:
    """What one network does on n examples.

    Attributes:
      wrong: booleans `[n]`.
      predictions: the class of the largest logit, `[n]`.
      firing_rate: layer -> `[…, channels]`, the share of examples on which each neuron fires.
      patterns: layer -> the number of distinct activation patterns of that layer, at most n.
      joint_patterns: the same of all layers together.
    """

    wrong: np.ndarray
    predictions: np.ndarray
    firing_rate: Mapping[str, np.ndarray]
    patterns: Mapping[str, int]
    joint_patterns: int


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """Where two networks agree on one layer, on n examples.

    Attributes:
      by_neuron: `[…, channels]`, the share of examples on which the neuron's indicators agree.
      by_channel: `[channels]`.
      by_class: `[classes]`, NaN for a class without examples.
      by_example: `[n]`, the share of neurons that agree.
      agreement: the mean of any of them, weighted by what it stands for.
    """

    by_neuron: np.ndarray
    by_channel: np.ndarray
    by_class: np.ndarray
    by_example: np.ndarray
    agreement: float


@dataclasses.dataclass(frozen=True, eq=False)
class Examination:
    """A network, its teacher if there is one, and how they match.

    Attributes:
      student, teacher: see `Activity`.
      match: layer -> `Match`, of the layers that both have with the same neurons.
      unmatched: the layers of either that are left out, the teacher having other neurons there.
    """

    student: Activity
    teacher: Activity | None
    match: Mapping[str, Match]
    unmatched: tuple[str, ...]

    def agreement_by_example(self) -> np.ndarray:
        """`[n]`, each example's mean over the matched layers, each layer counting alike."""
        if not self.match:
            raise InputError(
                "there is no layer in which both networks have the same neurons, so there is no "
                "agreement"
            )
        return np.mean([each.by_example for each in self.match.values()], axis=0)


def examine(student: Network, data: Dataset, teacher: Network | None = None) -> Examination:
    """Runs a network, and its teacher beside it, over held-out images in evaluation mode.

    Networks of different widths have no neurons in common, and the connectors that training used
    are gone: such layers are left out and named in `unmatched`.

    Raises:
      ValueError: if a network does not fit the data.
    """
    networks = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    models = {name: _checked(f"the {name}", each, data) for name, each in networks.items()}
    weights = {name: dict(each.variables) for name, each in networks.items()}
    run = _observe(tuple(models.values()), data.preprocessing)
    found = [
        _on_host(run(tuple(weights.values()), images, labels, valid), int(valid.sum()))
        for images, labels, valid in _batches(data)
    ]
    activities = [
        _activity([batch["networks"][index] for batch in found]) for index in range(len(models))
    ]
    match = {
        layer: _match([batch["match"][layer] for batch in found], data)
        for layer in found[0]["match"]
    }
    layers = {layer for each in activities for layer in each.firing_rate}
    unmatched = sorted(layers - set(match)) if teacher is not None else []
    return Examination(
        activities[0], activities[1] if teacher is not None else None, match, tuple(unmatched)
    )


def boundary_distances(
    network: Network,
    data: Dataset,
    layer: str,
    *,
    neurons: int | None = 64,
    seed: int = 0,
) -> np.ndarray:
    """Each image's distance to the activation boundaries of a layer's neurons, to first order.

    Distances are Euclidean over the whole image, in the units of its stored pixels; see
    `first_order_distance`. The minimum over a row is the distance to the nearest boundary: of
    the layer if all neurons are taken, else of those taken, which bounds it from above.

    Args:
      network: in evaluation mode.
      data: the images.
      layer: one of its taps.
      neurons: how many, drawn at random; None: all, in order. Each costs a backward pass.
      seed: of the draw.

    Returns:
      `[examples, neurons]`.
    """
    model = _checked("the network", network, data)
    variables = dict(network.variables)
    distance = _distance(model, data.preprocessing, layer)
    images = next(_batches(data))[0]
    taps = jax.eval_shape(
        lambda v, x: run_model(model, v, x, train=False).taps,
        variables,
        jax.ShapeDtypeStruct(images.shape, jnp.result_type(float)),
    )
    if layer not in taps:
        raise unknown("layer", layer, taps)
    chosen = np.arange(np.prod(taps[layer].shape[1:]))
    if neurons is not None and neurons < len(chosen):
        chosen = np.random.default_rng(seed).choice(chosen, neurons, replace=False)
    return np.concatenate(
        [
            np.stack([np.asarray(distance(variables, images, n))[valid] for n in chosen], axis=1)
            for images, _, valid in _batches(data)
        ]
    )


def _checked(what: str, network: Network, data: Dataset) -> Model:
    """The model as it is run, once it is known to fit."""
    require_runs(what, network.model, data.image_shape, train=False, dropout=False)
    require_classes(what, network.model, data.image_shape, data.num_classes)
    require_fits(f"{what}'s weights", network.model, network.variables, data.image_shape)
    return configure_model(network.model, "float32", None)


def _batches(data: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images, labels, and which of them are no padding."""
    size = min(_BATCH, len(data))
    for start in range(0, len(data), size):
        index = np.arange(start, start + size)
        valid = index < len(data)
        index = np.where(valid, index, 0)
        yield data.images[index], data.labels[index], valid


@functools.lru_cache(maxsize=16)
def _observe(models: tuple[Model, ...], preprocessing: Preprocessing) -> Any:
    """Compiles the measurement of a batch: what each model's neurons do, and what matches.

    Returns a function of (variables of each model, images, labels, which are valid). Indicators
    leave the device as bits.
    """

    @jax.jit
    def observe(
        variables: Any, images: jax.Array, labels: jax.Array, valid: jax.Array
    ) -> dict[str, Any]:
        images = normalize(images, preprocessing)

        def count(booleans: jax.Array) -> jax.Array:
            return jnp.einsum("b...,b->...", booleans, valid, preferred_element_type=jnp.int32)

        def see(model: Model, variables: Any) -> tuple[dict[str, Any], dict[str, jax.Array]]:
            forward = run_model(model, variables, images, train=False)
            fires = {name: activation_indicator(tap) for name, tap in forward.taps.items()}
            flat = {name: each.reshape(len(images), -1) for name, each in fires.items()}
            return {
                "wrong": misclassified(forward.logits, labels),
                "predictions": forward.logits.argmax(axis=-1),
                "bits": {name: jnp.packbits(each, axis=1) for name, each in flat.items()},
                "fired": {name: count(each) for name, each in fires.items()},
            }, fires

        seen, fires = zip(*map(see, models, variables), strict=True)
        first, last = fires[0], fires[-1]
        agrees = {
            name: matching(first[name], last[name])
            for name in first
            if len(models) > 1 and name in last and first[name].shape == last[name].shape
        }
        match = {
            name: {
                "by_example": each.reshape(len(images), -1).mean(axis=1),
                "agreed": count(each),
            }
            for name, each in agrees.items()
        }
        return {"networks": seen, "match": match}

    return observe


def _on_host(found: dict[str, Any], count: int) -> dict[str, Any]:
    """One batch without its padding, and its patterns as digests."""
    found = jax.tree.map(np.asarray, found)
    for each in (*found["networks"], *found["match"].values()):
        for name in ("wrong", "predictions", "by_example"):
            if name in each:
                each[name] = each[name][:count]
    for each in found["networks"]:
        bits = each.pop("bits")
        each["digests"] = {name: pattern_digests(rows[:count]) for name, rows in bits.items()}
    return found


@functools.lru_cache(maxsize=64)
def _distance(model: Model, preprocessing: Preprocessing, layer: str) -> Any:
    """(variables, images, index of a neuron) -> `[batch]`."""

    @jax.jit
    def distance(variables: Any, images: jax.Array, neuron: jax.Array) -> jax.Array:
        def value(images: jax.Array) -> jax.Array:
            forward = run_model(model, variables, normalize(images, preprocessing), train=False)
            return forward.taps[layer].reshape(len(images), -1)[:, neuron]

        # In evaluation mode an example depends on no other, so one pass has all gradients.
        values, pullback = jax.vjp(value, images.astype(jnp.result_type(float)))
        return first_order_distance(values, *pullback(jnp.ones_like(values)))

    return distance


def _activity(batches: list[dict[str, Any]]) -> Activity:
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
        patterns={layer: len(set(found)) for layer, found in digests.items()},
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
