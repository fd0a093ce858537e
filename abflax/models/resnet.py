"""Residual networks with bottlenecks, for large images (He et al., CVPR 2016)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.models.layers import (
    ConfiguredModule,
    classify,
    layers,
    require_images,
    scaled,
    shared_fields,
)
from abflax.taps import sow_tap


class Bottleneck(ConfiguredModule):
    """Convolutions 1×1, 3×3 and 1×1 to 4·features, each with a batch norm, plus a shortcut.

    The stride is on the 3×3, as in torchvision. The shortcut is a 1×1 convolution and a batch norm
    where the shape changes. The block returns the sum before its ReLU, which is a tap at the end
    of a stage.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Computes the residual sum, before its ReLU."""
        conv, norm, _ = layers(self, train)
        y = nn.relu(norm(name="norm1")(conv(self.features, 1, name="conv1")(x)))
        y = nn.relu(norm(name="norm2")(conv(self.features, 3, self.stride, name="conv2")(y)))
        y = norm(name="norm3")(conv(4 * self.features, 1, name="conv3")(y))
        if x.shape[-1] != y.shape[-1] or self.stride != 1:
            x = conv(y.shape[-1], 1, self.stride, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return x + y


class ResNet(ConfiguredModule):
    """A stem (7×7 and max pooling, stride 4) and stages of bottlenecks at strides 4, 8, 16, 32.

    The taps `layer1`, `layer2`, … are the residual sums of the stages before their ReLU. In
    ResNet-50 on 224×224 images they have 256×56², 512×28², 1024×14² and 2048×7² neurons.
    `features` are the pooled activations that the classifier gets.

    Attributes:
      stage_sizes: the number of bottlenecks in each stage: (3, 4, 6, 3) in ResNet-50.
      width: the factor on all channels.
      num_classes: the number of logits.
    """

    stage_sizes: tuple[int, ...]
    width: float = 1.0
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits from normalized images `[batch, height, width, channels]`."""
        require_images(images)
        conv, norm, dense = layers(self, train)
        x = norm(name="stem_norm")(conv(scaled(64, self.width), 7, 2, name="stem")(images))
        x = _max_pool(x)  # before the ReLU in the first stage, which gives the same numbers
        for stage, blocks in enumerate(self.stage_sizes, start=1):
            for block in range(blocks):
                x = Bottleneck(
                    features=scaled(64 * 2 ** (stage - 1), self.width),
                    stride=2 if stage > 1 and block == 0 else 1,
                    name=f"stage{stage}_block{block}",
                    **shared_fields(self),
                )(nn.relu(x), train=train)
            sow_tap(self, f"layer{stage}", x)
        return classify(self, nn.relu(x), dense)


ResNet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3))


def _max_pool(x: jax.Array) -> jax.Array:
    """Computes the maximum over 3×3 windows at stride 2, padded by 1: along rows, then columns.

    It uses slices, because the gradient of XLA's window reduction is 8 times slower on CPUs and
    does not compile on GPUs with deterministic operations (google/flax#4233). Equal largest values
    share the gradient.
    """
    for axis in (1, 2):
        padding = [(0, 0)] * 4
        padding[axis] = (1, 1)
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        last = x.shape[axis] - 1 - (x.shape[axis] - 1) % 2  # where the last window begins
        x = functools.reduce(
            jnp.maximum,
            (jax.lax.slice_in_dim(padded, k, k + last + 1, 2, axis) for k in range(3)),
        )
    return x
