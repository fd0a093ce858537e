"""What the networks are built of, in the dtypes and on the axis of the module they stand in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from abflax.errors import InputError
from abflax.models.batch_norm import BatchNorm
from abflax.models.convolution import convolve
from abflax.models.depthwise import depthwise

# N(0, √(2 / (k²·C_out))), and PyTorch's default for dense layers, as in the published code.
_CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def settings(module: Any) -> dict[str, Any]:
    """The `dtype`, `param_dtype` and `axis_name` of a module, for those inside it."""
    return {name: getattr(module, name) for name in ("dtype", "param_dtype", "axis_name")}


def layers(
    module: Any, train: bool
) -> tuple[Callable[..., nn.Conv], Callable[..., BatchNorm], Callable[..., nn.Dense]]:
    """Convolution, batch norm and dense layer with the module's own dtypes and axis.

    Returns:
      conv(features, kernel, stride=1, *, name, groups=1): square, without bias, padded by half
        the kernel; with groups, one for each channel.
      norm(*, name): of the batch while training, else of the running statistics.
      dense(features, *, name).
    """
    dtypes = {"dtype": module.dtype, "param_dtype": module.param_dtype}

    def conv(features: int, kernel: int, stride: int = 1, *, name: str, groups: int = 1) -> nn.Conv:
        # Explicit padding: at stride 2 'SAME' pads (0, 1), which the published weights do not.
        return nn.Conv(
            features,
            (kernel, kernel),
            (stride, stride),
            padding=[(kernel // 2, kernel // 2)] * 2,
            feature_group_count=groups,
            use_bias=False,
            kernel_init=_CONV_INIT,
            conv_general_dilated=convolve if groups == 1 else depthwise,
            name=name,
            **dtypes,
        )

    def norm(*, name: str) -> BatchNorm:
        return BatchNorm(not train, axis_name=module.axis_name, name=name, **dtypes)

    def dense(features: int, *, name: str) -> nn.Dense:
        return nn.Dense(features, kernel_init=_DENSE_INIT, name=name, **dtypes)

    return conv, norm, dense


def require_images(images: jax.Array) -> None:
    """Raises `InputError` for what is no batch of images.

    Flax's convolutions take any number of batch dimensions, and none.
    """
    if images.ndim != 4:
        raise InputError(f"images are [batch, height, width, channels], not {images.shape}")


def scaled(channels: int, width: float) -> int:
    """Channels · width, rounded to a multiple of 8 as the published MobileNets are.

    At least 8, and at least nine tenths of channels · width.
    """
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8
