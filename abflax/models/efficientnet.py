"""EfficientNet-Lite: ReLU6, no squeeze-and-excitation (Tan, Le, ICML 2019; Liu 2020)."""

from __future__ import annotations

from typing import ClassVar

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
from abflax.models.mobilenet import InvertedResidual
from abflax.taps import sow_tap

# The channels, kernel and stride of each stage, and the stages whose first block has a tap.
_STAGES = ((16, 3, 1), (24, 3, 2), (40, 5, 2), (80, 3, 2), (112, 5, 1), (192, 5, 2), (320, 3, 1))
_TAPPED = {2: "layer1", 3: "layer2", 5: "layer3"}


class EfficientNetLite(ConfiguredModule):
    """A stem, seven stages of inverted residuals, and a last 1×1 convolution to 1280 channels.

    The taps are batch norm outputs before their ReLU6, as in `MobileNetV2`: the expansion norms of
    the blocks that downsample to strides 8, 16 and 32, and the last norm. On 224×224 images those
    of Lite0 have 144×56², 240×28², 672×14² and 1280×7² neurons. `features` are the pooled
    activations that the classifier gets. There is neither dropout nor drop-connect.

    The published weights are of images of side 224, 240, 260, 280 and 300 (Lite0 to 4).

    Attributes:
      stage_sizes: the number of blocks in each stage.
      width: the width multiplier of the stages; stem and last convolution are not scaled.
      num_classes: the number of logits.
      pixel_mean: the published weights expect (x − pixel_mean) / pixel_std of pixels 0 to 255.
      pixel_std: see `pixel_mean`.

    References:
      https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    stage_sizes: tuple[int, ...]
    width: float = 1.0
    num_classes: int = 10
    pixel_mean: ClassVar = (127.0,)
    pixel_std: ClassVar = (128.0,)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits from normalized images `[batch, height, width, channels]`."""
        require_images(images)
        conv, norm, dense = layers(self, train, tensorflow=True)
        x = nn.relu6(norm(name="stem_norm")(conv(32, 3, 2, name="stem")(images)))
        number = 0
        for stage, ((channels, kernel, stride), blocks) in enumerate(
            zip(_STAGES, self.stage_sizes, strict=True)
        ):
            for block in range(blocks):
                x, before = InvertedResidual(
                    features=scaled(channels, self.width),
                    expansion=6 if stage else None,
                    stride=stride if block == 0 else 1,
                    kernel=kernel,
                    tensorflow=True,
                    name=f"block{number}",
                    **shared_fields(self),
                )(x, train=train)
                number += 1
                if block == 0 and stage in _TAPPED:
                    sow_tap(self, _TAPPED[stage], before)
        last = norm(name="last_norm")(conv(1280, 1, name="last")(x))
        sow_tap(self, "layer4", last)
        return classify(self, nn.relu6(last), dense)
