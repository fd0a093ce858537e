"""MobileNets of depthwise convolutions (V1: Howard et al. 2017; V2: Sandler et al., CVPR 2018)."""

from __future__ import annotations

import jax
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


class Separable(ConfiguredModule):
    """A depthwise 3×3 and a pointwise 1×1 convolution, each with a batch norm; a ReLU between.

    The block returns the output of the second norm, before its ReLU.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Computes the block's output."""
        conv, norm, _ = layers(self, train)
        channels = x.shape[-1]
        x = conv(channels, 3, self.stride, groups=channels, name="depthwise")(x)
        x = nn.relu(norm(name="depthwise_norm")(x))
        return norm(name="pointwise_norm")(conv(self.features, 1, name="pointwise")(x))


class MobileNetV1(ConfiguredModule):
    """A stem and stages of depthwise separable blocks at strides 2, 4, 8, 16, 32.

    The taps `layer1` to `layer4` are the outputs of the last pointwise norms at strides 4, 8, 16
    and 32, with 128, 256, 512 and 1024 channels. `features` are the pooled activations that the
    classifier gets.

    Attributes:
      width: the width multiplier α.
      stage_sizes: the number of blocks in each stage.
      num_classes: the number of logits.
    """

    width: float = 1.0
    stage_sizes: tuple[int, ...] = (1, 2, 2, 6, 2)
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits from normalized images `[batch, height, width, channels]`."""
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
                    **shared_fields(self),
                )(nn.relu(x), train=train)
            if stage:
                sow_tap(self, f"layer{stage}", x)
        return classify(self, nn.relu(x), dense)


class InvertedResidual(ConfiguredModule):
    """Convolutions: 1×1 to more channels, depthwise, 1×1 to fewer; each with a batch norm.

    The input is added to the output if they have the same shape. There is no ReLU at the end. The
    block returns its output, and the pre-activation of the depthwise convolution's input: the
    output of the expansion's norm, or the block's input if there is no expansion.

    Attributes:
      features: the channels of the output.
      expansion: the factor on the channels of the input; None: there is no expansion.
      stride: of the depthwise convolution.
      kernel: the side of the depthwise convolution.
      tensorflow: see `layers`.
    """

    features: int
    expansion: int | None
    stride: int = 1
    kernel: int = 3
    tensorflow: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Computes the block's output, and the pre-activation for a tap."""
        conv, norm, _ = layers(self, train, tensorflow=self.tensorflow)
        before = x
        if self.expansion is not None:
            before = conv(self.expansion * x.shape[-1], 1, name="expand")(x)
            before = norm(name="expand_norm")(before)
        channels = before.shape[-1]
        depthwise = conv(channels, self.kernel, self.stride, groups=channels, name="depthwise")
        y = depthwise(nn.relu6(before))
        y = nn.relu6(norm(name="depthwise_norm")(y))
        y = norm(name="project_norm")(conv(self.features, 1, name="project")(y))
        same = self.stride == 1 and x.shape[-1] == self.features
        return (x + y if same else y), before


# The channels and stride of each stage (Sandler et al. 2018, Table 2), and the stages whose first
# block has a tap.
_STAGES = ((16, 1), (24, 2), (32, 2), (64, 2), (96, 1), (160, 2), (320, 1))
_TAPPED = {2: "layer1", 3: "layer2", 5: "layer3"}


class MobileNetV2(ConfiguredModule):
    """A stem, seven stages of inverted residuals, and a last 1×1 convolution to 1280 channels.

    The taps are batch norm outputs before their ReLU6. `layer1` to `layer3` are the expansion norms
    of the blocks that downsample to strides 8, 16 and 32; on 224×224 images they have 144×56²,
    192×28² and 576×14² neurons. `layer4` is the last norm, 1280×7². `features` are the pooled
    activations that the classifier gets. There is no dropout.

    Attributes:
      width: the width multiplier; below 1 the last convolution is not made narrower.
      first_expansion: whether the first block has a 1×1 convolution that keeps the number of
        channels. The published code of activation boundaries has it, torchvision does not.
      stage_sizes: the number of blocks in each stage.
      num_classes: the number of logits.
    """

    width: float = 1.0
    first_expansion: bool = True
    stage_sizes: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits from normalized images `[batch, height, width, channels]`."""
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
                    **shared_fields(self),
                )(x, train=train)
                if block == 0 and stage in _TAPPED:
                    sow_tap(self, _TAPPED[stage], before)
        last = norm(name="last_norm")(conv(scaled(1280, max(1, self.width)), 1, name="last")(x))
        sow_tap(self, "layer4", last)
        return classify(self, nn.relu6(last), dense)
