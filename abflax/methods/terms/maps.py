"""Terms on maps with modules of their own: VID, the overhaul, knowledge review, SRRL."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from abflax.errors import InputError
from abflax.losses import hierarchical_context, overhaul_difference, variational_information
from abflax.losses.dtypes import at_least_float32
from abflax.methods.connectors import Connectors, Pair
from abflax.methods.modules import Fusion, Regressors, TeachersClassifier
from abflax.methods.terms.base import LayerTerm, Term, features_of, per_example, summed
from abflax.models import model_name
from abflax.models.network import Network, configure_model
from abflax.models.variables import floats_in
from abflax.taps import Forward, run_model

_ROUNDING = 0.02  # of the largest logit, in bfloat16


@dataclasses.dataclass(frozen=True)
class VariationalInformation(LayerTerm):
    """Σ_l w_l · variational_information(r_l(S_l), T_l), for each example (Ahn et al. 2019).

    r_l are three 1×1 convolutions; they and the variances are trained with the student. The targets
    are the teacher's taps. RepDistiller compares outputs of blocks; here as everywhere it is the
    pre-activations behind them.
    """

    positions: ClassVar = "pooled"

    def module(self, pair: Pair) -> Regressors:
        """Adds the regressors and variances."""
        return Regressors(pair.widths, **pair.fields)

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Returns the teacher's tap."""
        return teacher

    def layer_loss(self, student: jax.Array, targets: Any) -> jax.Array:
        """Computes the likelihood of the teacher's tap."""
        log_scale = targets["log_scale"][0]  # the same for all examples
        return variational_information(student, targets["teacher"], log_scale)


@dataclasses.dataclass(frozen=True)
class OverhaulDifference(LayerTerm):
    """Σ_l w_l · Σ_neurons overhaul_difference(r_l(S_l), T_l), for each example (Heo et al. 2019).

    r_l is a connector, also where the widths are equal. The targets are the teacher's taps. The
    margin of a channel is the mean of its negative pre-activations in the batch, as the authors
    have it for networks without batch norm; their CIFAR code computes it from the scale and bias of
    the teacher's batch norms (`overhaul_margin`), and leaves these on the batch's statistics. Its
    `layer_ratio` is 0.5.
    """

    relates: ClassVar = "batch"

    def module(self, pair: Pair) -> Connectors:
        """Connects all layers."""
        return Connectors.between(pair, equal=True)

    def layer_targets(self, teacher: jax.Array) -> jax.Array:
        """Returns the teacher's tap."""
        return teacher

    def layer_loss(self, student: jax.Array, targets: jax.Array) -> jax.Array:
        """Sums the differences over positions and neurons."""
        targets = at_least_float32(targets)  # a sum over the batch
        axes = tuple(range(targets.ndim - 1))
        negative = targets < 0
        count = jnp.maximum(negative.sum(axis=axes), 1)
        margin = jnp.where(negative, targets, 0).sum(axis=axes) / count
        return per_example(overhaul_difference(student, targets, margin))


@dataclasses.dataclass(frozen=True)
class KnowledgeReview(LayerTerm):
    """Σ_l w_l · hierarchical_context(fused S_l, T_l), for each example (Chen et al. 2021).

    The student's layers are fused with its deeper ones (`Fusion`); the features count as the
    deepest layer. The targets are the teacher's taps and features. The authors' student gives the
    outputs of its blocks; here as everywhere it is the pre-activations behind them.
    """

    positions: ClassVar = "pooled"

    def module(self, pair: Pair) -> Fusion:
        """Fuses the layers."""
        assert pair.teacher is not None
        middle = min(512, features_of(pair.student).shape[-1])
        features = ("features", features_of(pair.teacher).shape[-1])
        return Fusion((*pair.widths, features), middle, **pair.fields)

    def targets(self, teacher: Forward) -> dict[str, jax.Array]:
        """Returns the teacher's taps and features."""
        taps = {name: teacher.taps[name] for name in self.chosen(teacher.taps)}
        return taps | {"features": features_of(teacher)[:, None, None, :]}

    def loss(self, student: Forward, targets: Any, labels: jax.Array) -> jax.Array:
        """Sums the weighted losses of the layers, and that of the features."""
        del labels
        taps = {name: tap for name, tap in student.taps.items() if name != "features"}
        weights = self.layer_weights(taps) | {"features": 1.0}
        return summed(
            weight * hierarchical_context(student.taps[name], targets[name])
            for name, weight in weights.items()
        )


@dataclasses.dataclass(frozen=True)
class SoftmaxRegression(Term):
    """mean (f − F)² + logit_ratio · mean (Wᵀf + b − T)², for each example (Yang et al. 2021).

    f are the student's features after a connector of its last tap, F the teacher's features, and
    W, b the teacher's classifier, which is not trained (`TeachersClassifier`). The targets are the
    teacher's features and logits.

    Attributes:
      logit_ratio: >= 0; 1 in the authors' code.
    """

    transfers: ClassVar[bool] = True
    positions: ClassVar = "free"
    logit_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not self.logit_ratio >= 0:
            raise InputError(f"logit_ratio must be at least 0, not {self.logit_ratio}")

    def chosen(self, taps: Iterable[str]) -> tuple[str, ...]:
        """Returns the last tap."""
        return tuple(taps)[-1:]

    def module(self, pair: Pair) -> TeachersClassifier:
        """Adds the connector and the teacher's classifier."""
        assert pair.teacher is not None
        if not pair.layers:
            raise InputError("softmax regression reads the student's last tap, and it has none")
        features, classes = features_of(pair.teacher).shape[-1], pair.teacher.logits.shape[-1]
        return TeachersClassifier(pair.layers[0], features, classes, **pair.fields)

    def require_teacher(self, teacher: Network, image_shape: tuple[int, ...]) -> None:
        """Raises `InputError` unless the logits are those of the classifier on the features.

        A model that scales them, or returns logarithms of probabilities, is refused.
        """
        dtype, model = jnp.result_type(float), configure_model(teacher.model, "float32", None)
        images = jax.random.normal(jax.random.key(0), (4, *image_shape), dtype)

        @jax.jit
        def run(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            forward = run_model(model, variables, images, train=False)
            return features_of(forward), forward.logits

        with jax.default_matmul_precision("highest"):
            variables = floats_in(dtype, dict(teacher.variables))
            features, logits = map(np.asarray, run(variables, images))
        layer = _classifier(variables["params"], (features.shape[-1], logits.shape[-1]))
        computed = features @ np.asarray(layer["kernel"]) + np.asarray(layer.get("bias", 0.0))
        apart, size = np.abs(computed - logits).max(), np.abs(logits).max()
        if apart > _ROUNDING * size:
            raise InputError(
                "softmax regression needs a teacher whose logits are its classifier's, applied to "
                f"its features: those of {model_name(teacher.model).partition('(')[0]} are apart "
                f"from them by {apart:.3g}, and {size:.3g} at most"
            )

    def first_weights(
        self, drawn: dict[str, Any], teacher: Any, before: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Takes the teacher's classifier, the one dense layer from its features to its logits.

        Raises:
          ValueError: if there is none, or several are of these widths.
        """
        del before
        like = drawn["classifier_kernel"]
        found = _classifier(teacher, like.shape)
        bias = found.get("bias", drawn["classifier_bias"])
        classifier = {"classifier_kernel": found["kernel"], "classifier_bias": bias}
        return drawn | {name: each.astype(like.dtype) for name, each in classifier.items()}

    def targets(self, teacher: Forward) -> dict[str, jax.Array]:
        """Returns the teacher's features and logits."""
        return {"features": features_of(teacher), "logits": teacher.logits}

    def loss(self, student: Forward, targets: Any, labels: jax.Array) -> jax.Array:
        """Compares features, and what the teacher's classifier makes of them."""
        del labels
        features = jnp.square(features_of(student) - targets["features"]).mean(axis=-1)
        logits = jnp.square(student.logits - targets["logits"]).mean(axis=-1)
        return features + self.logit_ratio * logits


def _classifier(params: Any, shape: tuple[int, ...]) -> Mapping[str, Any]:
    """Finds the one dense layer with a kernel of that shape. Raises `InputError`."""
    found = list(_dense_layers(params, shape))
    if len(found) != 1:
        raise InputError(
            f"softmax regression needs the teacher's classifier: of its layers, {len(found)} "
            f"are dense with a kernel [features, classes] of {shape}"
        )
    return found[0]


def _dense_layers(params: Any, shape: tuple[int, ...]) -> Iterator[Mapping[str, Any]]:
    """Finds the layers with a kernel of that shape."""
    if isinstance(params, Mapping):
        if getattr(params.get("kernel"), "shape", None) == shape:
            yield params
        for each in params.values():
            yield from _dense_layers(each, shape)
