"""Wide residual networks for small images (Zagoruyko, Komodakis, BMVC 2016)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.models.layers import layers, require_images, settings
from abflax.taps import sow_features, sow_tap


class WideBlock(nn.Module):
    """Norm–ReLU–conv twice, plus a shortcut that is a 1×1 convolution where the shape changes.

    Returns the block's output and that of its first norm, which is the pre-activation of what
    the *previous* group put out: the network taps it, so that no norm runs twice.
    """

    features: int
    stride: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns the block's output, and the pre-activation that a tap may want."""
        conv, norm, _ = layers(self, train)
        before = norm(name="norm1")(x)
        active = nn.relu(before)
        y = conv(self.features, 3, self.stride, name="conv1")(active)
        y = conv(self.features, 3, name="conv2")(nn.relu(norm(name="norm2")(y)))
        if x.shape[-1] != self.features or self.stride != 1:
            x = conv(self.features, 1, self.stride, name="shortcut")(active)
        return x + y, before


class WideResNet(nn.Module):
    """WRN-depth-width: a stem and three groups of (depth − 4)/6 blocks, 16, 32, 64 × width.

    Taps, pre-activations at full, half and quarter resolution: `layer1` and `layer2` are the
    outputs of the first batch norm of groups 2 and 3 (so of what groups 1 and 2 put out),
    `layer3` is the final batch norm. `features` are the pooled activations that the classifier
    reads, `[batch, 64·width]`.

    Attributes:
      depth: 6n + 4.
      width: the factor on the channels, >= 1.
      num_classes: the number of logits.
      dtype: of the computation; None: that of inputs and parameters.
      param_dtype: of the parameters.
      axis_name: the mapped axis over which batch norm averages; None: this device alone.
    """

    depth: int
    width: int
    num_classes: int = 10
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, num_classes]` of normalised images `[batch, height, width, channels]`."""
        require_images(images)
        conv, norm, dense = layers(self, train)
        x = conv(16, 3, name="stem")(images)
        for group in (1, 2, 3):
            for block in range((self.depth - 4) // 6):
                x, before = WideBlock(
                    features=16 * self.width * 2 ** (group - 1),
                    stride=2 if group > 1 and block == 0 else 1,
                    name=f"group{group}_block{block}",
                    **settings(self),
                )(x, train=train)
                if group > 1 and block == 0:
                    sow_tap(self, f"layer{group - 1}", before)
        last = norm(name="norm")(x)
        sow_tap(self, "layer3", last)
        pooled = jnp.mean(nn.relu(last), axis=(1, 2))
        sow_features(self, pooled)
        return dense(self.num_classes, name="classifier")(pooled)
