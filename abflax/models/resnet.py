"""Residual networks with bottlenecks, for photographs (He et al., CVPR 2016)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.models.layers import layers, require_images, scaled, settings
from abflax.taps import sow_features, sow_tap


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution to 4·features, each with its norm, plus what came in.

    The stride is on the 3×3, as in torchvision. What came in passes a 1×1 convolution and a norm
    where the shape changes. Returns the sum before its ReLU, which is a tap at a stage's end.
    """

    features: int
    stride: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the residual sum, before its ReLU."""
        conv, norm, _ = layers(self, train)
        y = nn.relu(norm(name="norm1")(conv(self.features, 1, name="conv1")(x)))
        y = nn.relu(norm(name="norm2")(conv(self.features, 3, self.stride, name="conv2")(y)))
        y = norm(name="norm3")(conv(4 * self.features, 1, name="conv3")(y))
        if x.shape[-1] != y.shape[-1] or self.stride != 1:
            x = conv(y.shape[-1], 1, self.stride, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return x + y


class ResNet(nn.Module):
    """A stem (7×7 and max pooling, stride 4) and stages of bottlenecks at strides 4, 8, 16, 32.

    Taps `layer1`, `layer2`, …: the residual sum of each stage before its ReLU; ResNet-50 on
    224×224 images: 256×56², 512×28², 1024×14², 2048×7². `features` are the pooled activations
    that the classifier reads.

    Attributes:
      stage_sizes: how many bottlenecks a stage has: (3, 4, 6, 3) in ResNet-50.
      width: the factor on all channels.
      num_classes: the number of logits.
      dtype: of the computation; None: that of inputs and parameters.
      param_dtype: of the parameters.
      axis_name: the mapped axis over which batch norm averages; None: this device alone.
    """

    stage_sizes: tuple[int, ...]
    width: float = 1.0
    num_classes: int = 10
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, num_classes]` of normalised images `[batch, height, width, channels]`."""
        require_images(images)
        conv, norm, dense = layers(self, train)
        x = norm(name="stem_norm")(conv(scaled(64, self.width), 7, 2, name="stem")(images))
        x = _max_pool(x)  # the ReLU comes with the first stage: the larger of two stays the larger
        for stage, blocks in enumerate(self.stage_sizes, start=1):
            for block in range(blocks):
                x = Bottleneck(
                    features=scaled(64 * 2 ** (stage - 1), self.width),
                    stride=2 if stage > 1 and block == 0 else 1,
                    name=f"stage{stage}_block{block}",
                    **settings(self),
                )(nn.relu(x), train=train)
            sow_tap(self, f"layer{stage}", x)
        pooled = jnp.mean(nn.relu(x), axis=(1, 2))
        sow_features(self, pooled)
        return dense(self.num_classes, name="classifier")(pooled)


ResNet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3))


def _max_pool(x: jax.Array) -> jax.Array:
    """3×3 at stride 2, padded by 1, along rows and then columns.

    By slices: the gradient of XLA's own window is 8 times slower on CPUs, and does not compile on
    GPUs with deterministic operations (google/flax#4233). Equal largest values share a gradient.
    """
    for axis in (1, 2):
        around = [(0, 0)] * 4
        around[axis] = (1, 1)
        padded = jnp.pad(x, around, constant_values=-jnp.inf)
        last = x.shape[axis] - 1 - (x.shape[axis] - 1) % 2  # where the last window begins
        x = functools.reduce(
            jnp.maximum,
            (jax.lax.slice_in_dim(padded, k, k + last + 1, 2, axis) for k in range(3)),
        )
    return x
