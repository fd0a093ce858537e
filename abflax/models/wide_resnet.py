"""Wide residual networks for small images (Zagoruyko, Komodakis, BMVC 2016)."""

from __future__ import annotations

import jax
from flax import linen as nn

from abflax.models.layers import ConfiguredModule, classify, layers, require_images, shared_fields
from abflax.taps import sow_tap


class WideBlock(ConfiguredModule):
    """Norm–ReLU–conv twice, plus a shortcut that is a 1×1 convolution where the shape changes.

    The block returns its output and that of its first norm. The first norm of a group's first
    block is the pre-activation of the *previous* group's output. The network taps it there, so
    that no norm runs twice.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Computes the block's output, and the pre-activation for a tap."""
        conv, norm, _ = layers(self, train)
        before = norm(name="norm1")(x)
        active = nn.relu(before)
        y = conv(self.features, 3, self.stride, name="conv1")(active)
        y = conv(self.features, 3, name="conv2")(nn.relu(norm(name="norm2")(y)))
        if x.shape[-1] != self.features or self.stride != 1:
            x = conv(self.features, 1, self.stride, name="shortcut")(active)
        return x + y, before


class WideResNet(ConfiguredModule):
    """WRN-depth-width: a stem and three groups of (depth − 4)/6 blocks, 16, 32, 64 × width.

    The taps are pre-activations at full, half and quarter resolution. `layer1` and `layer2` are
    the outputs of the first batch norms of groups 2 and 3, which normalize the outputs of groups 1
    and 2. `layer3` is the output of the final batch norm. `features` are the pooled activations
    that the classifier gets, `[batch, 64·width]`.

    Attributes:
      depth: 6n + 4.
      width: the factor on the channels, >= 1.
      num_classes: the number of logits.
    """

    depth: int
    width: int
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits from normalized images `[batch, height, width, channels]`."""
        require_images(images)
        conv, norm, dense = layers(self, train)
        x = conv(16, 3, name="stem")(images)
        for group in (1, 2, 3):
            for block in range((self.depth - 4) // 6):
                x, before = WideBlock(
                    features=16 * self.width * 2 ** (group - 1),
                    stride=2 if group > 1 and block == 0 else 1,
                    name=f"group{group}_block{block}",
                    **shared_fields(self),
                )(x, train=train)
                if group > 1 and block == 0:
                    sow_tap(self, f"layer{group - 1}", before)
        last = norm(name="norm")(x)
        sow_tap(self, "layer3", last)
        return classify(self, nn.relu(last), dense)
