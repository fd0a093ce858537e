"""MobileNets of depthwise convolutions (V1: Howard et al. 2017; V2: Sandler et al., CVPR 2018)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.models.layers import layers, require_images, scaled, settings
from abflax.taps import sow_features, sow_tap


class Separable(nn.Module):
    """A depthwise 3×3 and a pointwise 1×1 convolution, each with its norm; a ReLU between them.

    Returns what the second norm puts out, before its ReLU.
    """

    features: int
    stride: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the block's output."""
        conv, norm, _ = layers(self, train)
        channels = x.shape[-1]
        x = conv(channels, 3, self.stride, groups=channels, name="depthwise")(x)
        x = nn.relu(norm(name="depthwise_norm")(x))
        return norm(name="pointwise_norm")(conv(self.features, 1, name="pointwise")(x))


class MobileNetV1(nn.Module):
    """A stem and stages of depthwise separable blocks at strides 2, 4, 8, 16, 32.

    Taps `layer1` to `layer4`: the last pointwise norm at the strides 4, 8, 16, 32; 128, 256, 512
    and 1024 channels. `features` are the pooled activations that the classifier reads.

    Attributes:
      width: the width multiplier α.
      stage_sizes: how many blocks a stage has.
      num_classes: the number of logits.
      dtype: of the computation; None: that of inputs and parameters.
      param_dtype: of the parameters.
      axis_name: the mapped axis over which batch norm averages; None: this device alone.
    """

    width: float = 1.0
    stage_sizes: tuple[int, ...] = (1, 2, 2, 6, 2)
    num_classes: int = 10
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, num_classes]` of normalised images `[batch, height, width, channels]`."""
        require_images(images)
        conv, norm, dense = layers(self, train)
        x = norm(name="stem_norm")(conv(scaled(32, self.width), 3, 2, name="stem")(images))
        number = 0
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                number += 1
                x = Separable(
                    features=scaled(64 * 2**stage, self.width),
                    stride=2 if stage and block == 0 else 1,
                    name=f"block{number}",
                    **settings(self),
                )(nn.relu(x), train=train)
            if stage:
                sow_tap(self, f"layer{stage}", x)
        pooled = jnp.mean(nn.relu(x), axis=(1, 2))
        sow_features(self, pooled)
        return dense(self.num_classes, name="classifier")(pooled)


class InvertedResidual(nn.Module):
    """A 1×1 to more channels, a depthwise 3×3, a 1×1 to few; each with its norm, and no ReLU last.

    What came in is added where the shape stays. Returns the sum, and what the depthwise convolution
    reads before its ReLU6: the expansion's norm, or what came in where nothing is expanded.
    """

    features: int
    expansion: int | None
    stride: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns the block's output, and the pre-activation that a tap may want."""
        conv, norm, _ = layers(self, train)
        before = x
        if self.expansion is not None:
            before = conv(self.expansion * x.shape[-1], 1, name="expand")(x)
            before = norm(name="expand_norm")(before)
        channels = before.shape[-1]
        y = conv(channels, 3, self.stride, groups=channels, name="depthwise")(nn.relu6(before))
        y = nn.relu6(norm(name="depthwise_norm")(y))
        y = norm(name="project_norm")(conv(self.features, 1, name="project")(y))
        same = self.stride == 1 and x.shape[-1] == self.features
        return (x + y if same else y), before


# Channels and stride of each stage (Sandler et al. 2018, Table 2), and which begin with a tap.
_STAGES = ((16, 1), (24, 2), (32, 2), (64, 2), (96, 1), (160, 2), (320, 1))
_TAPPED = {2: "layer1", 3: "layer2", 5: "layer3"}


class MobileNetV2(nn.Module):
    """A stem, seven stages of inverted residuals, and a last 1×1 convolution to 1280 channels.

    Taps, before their ReLU6: `layer1` to `layer3`, the expansion norms of the blocks that begin
    strides 8, 16 and 32 (so at 4, 8 and 16; 144×56², 192×28², 576×14² on 224×224 images), and
    `layer4`, the last norm, 1280×7². `features` are the pooled activations that the classifier
    reads. No dropout.

    Attributes:
      width: the width multiplier, on the last convolution only where it is above 1.
      first_expansion: whether the first block has a 1×1 convolution to as many channels, as in
        the published code of activation boundaries; in torchvision's networks it has none.
      stage_sizes: how many blocks a stage has.
      num_classes: the number of logits.
      dtype: of the computation; None: that of inputs and parameters.
      param_dtype: of the parameters.
      axis_name: the mapped axis over which batch norm averages; None: this device alone.
    """

    width: float = 1.0
    first_expansion: bool = True
    stage_sizes: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)
    num_classes: int = 10
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, num_classes]` of normalised images `[batch, height, width, channels]`."""
        require_images(images)
        conv, norm, dense = layers(self, train)
        x = norm(name="stem_norm")(conv(scaled(32, self.width), 3, 2, name="stem")(images))
        x, number = nn.relu6(x), 0
        for stage, ((channels, stride), blocks) in enumerate(
            zip(_STAGES, self.stage_sizes, strict=True)
        ):
            for block in range(blocks):
                number += 1
                x, before = InvertedResidual(
                    features=scaled(channels, self.width),
                    expansion=6 if stage else (1 if self.first_expansion else None),
                    stride=stride if block == 0 else 1,
                    name=f"block{number}",
                    **settings(self),
                )(x, train=train)
                if block == 0 and stage in _TAPPED:
                    sow_tap(self, _TAPPED[stage], before)
        last = norm(name="last_norm")(conv(scaled(1280, max(1, self.width)), 1, name="last")(x))
        sow_tap(self, "layer4", last)
        pooled = jnp.mean(nn.relu6(last), axis=(1, 2))
        sow_features(self, pooled)
        return dense(self.num_classes, name="classifier")(pooled)
