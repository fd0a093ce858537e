"""What terms train with the student besides connectors: regressors, embeddings, fusion."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.losses.features import as_map
from abflax.models.layers import CONV_INIT, ConfiguredModule, layers
from abflax.taps import Forward

_FIRST_VARIANCE = 5.0  # of variational information distillation, as in RepDistiller


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


def _enlarged(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats positions: position i of n shows that at ⌊i·h/n⌋ of h."""
    rows, columns = (jnp.arange(n) * h // n for n, h in zip(shape[1:3], x.shape[1:3], strict=True))
    return x[:, rows][:, :, columns]
