"""Builds the layers of all networks, and holds the fields that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from abflax.errors import InputError
from abflax.models.batch_norm import BatchNorm
from abflax.models.convolution import convolve
from abflax.models.depthwise import depthwise
from abflax.taps import sow_features

# As in the published code: N(0, √(2 / (k²·C_out))) for convolutions of k×k to C_out channels, and
# PyTorch's default for dense layers.
CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
DENSE_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ConfiguredModule(nn.Module, kw_only=True):
    """The fields that networks and their blocks share, given by keyword.

    Attributes:
      dtype: of the computation; None: that of inputs and parameters.
      param_dtype: of the parameters.
      axis_name: the mapped axis over which batch norm averages; None: this device alone.
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # The shared fields come last, because records name unregistered models by their `repr`.
        fields = cls.__dataclass_fields__
        for name in ("dtype", "param_dtype", "axis_name"):
            fields[name] = fields.pop(name)


def shared_fields(module: ConfiguredModule) -> dict[str, Any]:
    """Returns the `dtype`, `param_dtype` and `axis_name` of a module, for its blocks."""
    return {name: getattr(module, name) for name in ("dtype", "param_dtype", "axis_name")}


def layers(
    module: ConfiguredModule, train: bool, *, tensorflow: bool = False
) -> tuple[Callable[..., nn.Conv], Callable[..., BatchNorm], Callable[..., nn.Dense]]:
    """Returns constructors of layers that use the dtypes and the axis of a module.

    Args:
      module: its fields are used.
      train: whether batch norms use the statistics of the batch.
      tensorflow: whether convolutions pad as TensorFlow's "SAME", less at the top and left, and ε
        of batch norms is 1e-3; else convolutions pad by half the kernel, and ε is 1e-5.

    Returns:
      conv(features, kernel, stride=1, *, name, groups=1): a square convolution without bias;
        groups must be 1 or the number of channels.
      norm(*, name): a batch norm, with the statistics of the batch in training and the running
        ones in evaluation.
      dense(features, *, name): a dense layer.
    """
    dtypes = {"dtype": module.dtype, "param_dtype": module.param_dtype}

    def conv(features: int, kernel: int, stride: int = 1, *, name: str, groups: int = 1) -> nn.Conv:
        return nn.Conv(
            features,
            (kernel, kernel),
            (stride, stride),
            padding="SAME" if tensorflow else [(kernel // 2, kernel // 2)] * 2,
            feature_group_count=groups,
            use_bias=False,
            kernel_init=CONV_INIT,
            conv_general_dilated=convolve if groups == 1 else depthwise,
            name=name,
            **dtypes,
        )

    def norm(*, name: str) -> BatchNorm:
        epsilon = 1e-3 if tensorflow else 1e-5
        return BatchNorm(
            not train, epsilon=epsilon, axis_name=module.axis_name, name=name, **dtypes
        )

    def dense(features: int, *, name: str) -> nn.Dense:
        return nn.Dense(features, kernel_init=DENSE_INIT, name=name, **dtypes)

    return conv, norm, dense


def require_images(images: jax.Array) -> None:
    """Raises `InputError` if an array is not a batch of images.

    Flax's convolutions would accept any number of batch dimensions.
    """
    if images.ndim != 4:
        raise InputError(f"images are [batch, height, width, channels], not {images.shape}")


def classify(module: Any, activations: jax.Array, dense: Callable[..., nn.Dense]) -> jax.Array:
    """Sows the features, which are the averages over positions, and computes their logits."""
    pooled = jnp.mean(activations, axis=(1, 2))
    sow_features(module, pooled)
    return dense(module.num_classes, name="classifier")(pooled)


def scaled(channels: int, width: float) -> int:
    """Computes channels · width, rounded to a multiple of 8 as in the published MobileNets.

    The result is at least 8, and at least nine tenths of channels · width.
    """
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8
