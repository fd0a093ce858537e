"""Finds the names of each architecture's weights in published PyTorch code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from abflax.models import EfficientNetLite, MobileNetV1, MobileNetV2, ResNet, WideResNet

_Patterns = tuple[tuple[str, str], ...]

# The norm of a convolution that is named here, such as `stem_norm`, has the next number.
_WIDE_RESNET: _Patterns = (
    (r"stem", r"conv1"),
    (r"norm", r"bn1"),
    (r"classifier", r"fc"),
    (r"group(\d+)_block(\d+)/norm(\d)", r"block\1.layer.\2.bn\3"),
    (r"group(\d+)_block(\d+)/conv(\d)", r"block\1.layer.\2.conv\3"),
    (r"group(\d+)_block(\d+)/shortcut", r"block\1.layer.\2.convShortcut"),
)
_RESNET: _Patterns = (  # as torchvision names them
    (r"stem_norm", r"bn1"),
    (r"stem", r"conv1"),
    (r"classifier", r"fc"),
    (r"stage(\d+)_block(\d+)/norm(\d)", r"layer\1.\2.bn\3"),
    (r"stage(\d+)_block(\d+)/conv(\d)", r"layer\1.\2.conv\3"),
    (r"stage(\d+)_block(\d+)/shortcut", r"layer\1.\2.downsample.0"),
)
_MOBILENET_V1: _Patterns = (
    (r"stem", r"model.0.0"),
    (r"classifier", r"fc"),
    (r"block(\d+)/depthwise", r"model.\1.0"),
    (r"block(\d+)/pointwise", r"model.\1.3"),
)
_EFFICIENTNET_LITE: _Patterns = (  # as efficientnet_lite_pytorch names them
    (r"stem_norm", r"_bn0"),
    (r"stem", r"_conv_stem"),
    (r"last_norm", r"_bn1"),
    (r"last", r"_conv_head"),
    (r"classifier", r"_fc"),
    (r"block(\d+)/expand_norm", r"_blocks.\1._bn0"),
    (r"block(\d+)/depthwise_norm", r"_blocks.\1._bn1"),
    (r"block(\d+)/project_norm", r"_blocks.\1._bn2"),
    (r"block(\d+)/(expand|depthwise|project)", r"_blocks.\1._\2_conv"),
)


def _mobilenet_v2(model: Any) -> _Patterns:
    """Returns the names of activation boundaries' published code, or those of torchvision."""
    ends = (
        (r"stem", r"features.0.0"),
        (r"last", rf"features.{sum(model.stage_sizes) + 1}.0"),
        (r"classifier", r"classifier.1"),
    )
    if model.first_expansion:
        return ends + (
            (r"block(\d+)/expand", r"features.\1.conv.0"),
            (r"block(\d+)/depthwise", r"features.\1.conv.3"),
            (r"block(\d+)/project", r"features.\1.conv.6"),
        )
    return ends + (
        (r"block1/depthwise", r"features.1.conv.0.0"),
        (r"block1/project", r"features.1.conv.1"),
        (r"block(\d+)/expand", r"features.\1.conv.0.0"),
        (r"block(\d+)/depthwise", r"features.\1.conv.1.0"),
        (r"block(\d+)/project", r"features.\1.conv.2"),
    )


# Architecture -> (patterns, module). The patterns map a module's Flax path to its published name;
# the first match counts. The module's published name occurs in no other architecture.
PUBLISHED_NAMES: Mapping[type[nn.Module], tuple[Callable[[Any], _Patterns], str]] = {
    WideResNet: (lambda _: _WIDE_RESNET, "group1_block0/conv2"),
    ResNet: (lambda _: _RESNET, "stage1_block0/conv3"),
    MobileNetV1: (lambda _: _MOBILENET_V1, "block1/pointwise"),
    MobileNetV2: (_mobilenet_v2, "block1/depthwise"),
    EfficientNetLite: (lambda _: _EFFICIENTNET_LITE, "block0/depthwise"),
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
IGNORED = "num_batches_tracked"


def torch_name_of(model: nn.Module, path: tuple[str, ...]) -> str:
    """Returns the published name of the Flax leaf at (collection, modules …, leaf)."""
    _, *modules, leaf = path
    module = "/".join(modules)
    patterns, _ = PUBLISHED_NAMES[type(model)]
    for pattern, replacement in patterns(model):
        if match := re.fullmatch(pattern, module):
            return f"{match.expand(replacement)}.{_LEAVES[leaf]}"
        if match := re.fullmatch(f"{pattern}_norm", module):
            prefix, number = match.expand(replacement).rsplit(".", 1)
            return f"{prefix}.{int(number) + 1}.{_LEAVES[leaf]}"
    raise AssertionError(f"{type(model).__name__}: module {module} has no published name")
