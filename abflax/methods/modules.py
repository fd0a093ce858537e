"""What terms train with the student besides connectors: regressors, embeddings, translators."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.losses.dtypes import at_least_float32
from abflax.losses.features import as_map
from abflax.models.convolution import convolve
from abflax.models.layers import CONV_INIT, ConfiguredModule, layers, shared_fields
from abflax.taps import Forward

_FIRST_VARIANCE = 5.0  # of variational information distillation, as in RepDistiller
_LEAK = 0.1  # of factor transfer's leaky ReLUs


class Regressors(ConfiguredModule):
    """Three 1×1 convolutions and a variance a channel, for each layer (Ahn et al. 2019).

    Attributes:
      channels: (tap, channels of the teacher) of each layer.
    """

    channels: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, student: Forward, targets: Any, *, train: bool) -> tuple[Forward, Any]:
        """Maps the taps; adds `log_scale` to the targets, for each example alike."""
        conv, _, _ = layers(self, train)
        first = math.log(math.expm1(_FIRST_VARIANCE - 1e-5))
        taps, described = dict(student.taps), {}
        for layer, width in self.channels:
            x = as_map("a regressor", taps[layer])
            for index in range(3):
                x = conv(width, 1, name=f"{layer}_conv{index}")(nn.relu(x) if index else x)
            taps[layer] = x.reshape(*taps[layer].shape[:-1], width)
            log_scale = self.param(
                f"{layer}_log_scale", nn.initializers.constant(first), (width,), self.param_dtype
            )
            if targets is not None:
                scales = jnp.broadcast_to(log_scale, (len(x), width))
                described[layer] = {"teacher": targets[layer], "log_scale": scales}
        return dataclasses.replace(student, taps=taps), described


class Embeddings(ConfiguredModule):
    """A dense layer on the features of either network, both trained (Peng et al. 2019).

    Attributes:
      teacher_width: of the teacher's features.
      dimensions: of the embeddings.
    """

    teacher_width: int
    dimensions: int

    @nn.compact
    def __call__(self, student: Forward, targets: Any, *, train: bool) -> tuple[Forward, Any]:
        """Embeds the student's features, and the targets, which are the teacher's."""
        _, _, dense = layers(self, train)
        if targets is None:
            targets = jnp.zeros((1, self.teacher_width))
        ours = dense(self.dimensions, name="student")(student.features)
        theirs = dense(self.dimensions, name="teacher")(targets)
        return dataclasses.replace(student, features=ours), theirs


class Fusion(ConfiguredModule):
    """Maps each layer of the student together with all deeper ones (Chen et al. 2021).

    From the deepest up: x is the batch norm of a 1×1 convolution of the layer. Where there is a
    deeper one, x becomes a₀·x + a₁·y, where y is the deeper one's x, enlarged by repetition, and
    a₀, a₁ are sigmoids of a 1×1 convolution of both. The layer's result is the batch norm of a 3×3
    convolution of x to the teacher's channels. Tokens are a map that is one position wide.

    Attributes:
      channels: (tap, channels of the teacher) of each layer, the shallowest first. Under
        "features" the student's features count as a last layer of a single position.
      middle: channels of x.
    """

    channels: tuple[tuple[str, int], ...]
    middle: int

    @nn.compact
    def __call__(self, student: Forward, targets: Any, *, train: bool) -> tuple[Forward, Any]:
        """Replaces the student's taps, and adds "features" to them."""
        conv, norm, _ = layers(self, train)
        taps = dict(student.taps)
        if student.features is not None:
            taps["features"] = student.features[:, None, None, :]
        deeper = None
        for layer, width in reversed(self.channels):
            tap = as_map("knowledge review", taps[layer])
            x = norm(name=f"{layer}_norm1")(conv(self.middle, 1, name=f"{layer}_conv1")(tap))
            if deeper is not None:
                both = jnp.concatenate([x, y := _enlarged(deeper, x.shape)], axis=-1)
                attention = nn.sigmoid(
                    nn.Conv(
                        2,
                        (1, 1),
                        dtype=self.dtype,
                        param_dtype=self.param_dtype,
                        kernel_init=CONV_INIT,
                        name=f"{layer}_attention",
                    )(both)
                )
                x = x * attention[..., :1] + y * attention[..., 1:]
            mapped = norm(name=f"{layer}_norm2")(conv(width, 3, name=f"{layer}_conv2")(x))
            taps[layer] = mapped.reshape(*taps[layer].shape[:-1], width)
            deeper = x
        return dataclasses.replace(student, taps=taps), targets


class _Convolutions(ConfiguredModule):
    """3×3 convolutions, each with leaky ReLU, and with batch norm before it if `normalized`."""

    channels: tuple[int, ...]
    normalized: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        _, norm, _ = layers(self, train)
        for index, width in enumerate(self.channels):
            x = nn.Conv(
                width,
                (3, 3),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=CONV_INIT,
                conv_general_dilated=convolve,
                name=f"conv{index}",
            )(x)
            if self.normalized:
                x = norm(name=f"norm{index}")(x)
            x = nn.leaky_relu(x, _LEAK)
        return x


class Paraphrasers(ConfiguredModule):
    """For each layer, convolutions to a factor of the teacher's tap and back (Kim et al. 2018).

    Three 3×3 convolutions, the second to the factor's channels, and three that mirror them; a leaky
    ReLU after each. Tokens are a map that is one position wide.

    Attributes:
      channels: (tap, channels of the teacher, channels of the factor) of each layer.
    """

    channels: tuple[tuple[str, int, int], ...]

    @nn.compact
    def __call__(self, student: Forward, targets: Any, *, train: bool) -> tuple[Forward, Any]:
        """Adds what it makes of the targets, which are the teacher's taps."""
        del train
        described = {}
        for layer, width, few in self.channels:
            factor = _factor(self, layer, width, few, targets)
            back = _Convolutions((few, width, width), name=f"{layer}_back", **shared_fields(self))
            paraphrased = back(factor)
            if targets is not None:
                teacher = as_map("a paraphraser", targets[layer])
                described[layer] = {"teacher": teacher, "paraphrased": paraphrased}
        return student, described


class Translators(ConfiguredModule):
    """For each layer, convolutions from the student's tap to the teacher's factor.

    As the first half of a paraphraser, with batch norms. The paraphrasers are not trained.

    Attributes:
      channels: as in `Paraphrasers`.
    """

    channels: tuple[tuple[str, int, int], ...]

    @nn.compact
    def __call__(self, student: Forward, targets: Any, *, train: bool) -> tuple[Forward, Any]:
        """Maps the student's taps, and the targets, which are the teacher's taps, to factors."""
        taps, factors = dict(student.taps), {}
        for layer, width, few in self.channels:
            tap, name = as_map("a translator", taps[layer]), f"{layer}_translator"
            own = (tap.shape[-1], few, few)
            taps[layer] = _Convolutions(own, True, name=name, **shared_fields(self))(tap, train)
            factors[layer] = jax.lax.stop_gradient(_factor(self, layer, width, few, targets))
        return dataclasses.replace(student, taps=taps), factors


def _factor(module: ConfiguredModule, layer: str, width: int, few: int, targets: Any) -> jax.Array:
    """The teacher's factor of a layer; of zeros, to draw weights, without targets."""
    tap = jnp.zeros((1, 1, 1, width)) if targets is None else targets[layer]
    return _Convolutions((width, few, few), name=f"{layer}_paraphraser", **shared_fields(module))(
        as_map("a paraphraser", tap)
    )


class TeachersClassifier(ConfiguredModule):
    """Maps the student's last tap to the teacher's features, and those to its logits.

    A 1×1 convolution without bias, batch norm and ReLU, of the ReLU of the tap (Yang et al. 2021);
    the features are the averages over positions. The teacher's classifier is not trained.

    Attributes:
      layer: the last tap.
      features: the number of the teacher's.
      num_classes: of the teacher.
    """

    layer: str
    features: int
    num_classes: int

    def __call__(self, student: Forward, targets: Any, *, train: bool) -> tuple[Forward, Any]:
        """Replaces the student's features and logits."""
        tap = as_map("softmax regression", student.taps[self.layer])
        features, logits = self.classify(nn.relu(tap), train)
        return dataclasses.replace(student, features=features, logits=logits), targets

    @nn.compact
    def classify(self, activations: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Computes features, and the logits of the teacher's classifier."""
        conv, norm, _ = layers(self, train)
        x = nn.relu(norm(name="norm")(conv(self.features, 1, name="conv")(activations)))
        pooled = at_least_float32(jnp.mean(x, axis=(1, 2)))
        shape, zeros = (self.features, self.num_classes), nn.initializers.zeros
        kernel = self.param("classifier_kernel", zeros, shape, self.param_dtype)
        bias = self.param("classifier_bias", zeros, shape[1:], self.param_dtype)
        kernel, bias = jax.lax.stop_gradient((kernel, bias))
        return pooled, pooled @ kernel + bias


def _enlarged(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats positions: position i of n shows that at ⌊i·h/n⌋ of h."""
    rows, columns = (jnp.arange(n) * h // n for n, h in zip(shape[1:3], x.shape[1:3], strict=True))
    return x[:, rows][:, :, columns]
