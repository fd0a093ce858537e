"""The names under which PyTorch code publishes the weights of each architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from abflax.models import MobileNetV1, MobileNetV2, ResNet, WideResNet

_Patterns = tuple[tuple[str, str], ...]


_WIDE_RESNET: _Patterns = (
    (r"stem", r"conv1"),
    (r"norm", r"bn1"),
    (r"classifier", r"fc"),
    (r"group(\d+)_block(\d+)/norm(\d)", r"block\1.layer.\2.bn\3"),
    (r"group(\d+)_block(\d+)/conv(\d)", r"block\1.layer.\2.conv\3"),
    (r"group(\d+)_block(\d+)/shortcut", r"block\1.layer.\2.convShortcut"),
)


_RESNET: _Patterns = (  # as torchvision names them
    (r"stem", r"conv1"),
    (r"stem_norm", r"bn1"),
    (r"classifier", r"fc"),
    (r"stage(\d+)_block(\d+)/norm(\d)", r"layer\1.\2.bn\3"),
    (r"stage(\d+)_block(\d+)/conv(\d)", r"layer\1.\2.conv\3"),
    (r"stage(\d+)_block(\d+)/shortcut", r"layer\1.\2.downsample.0"),
    (r"stage(\d+)_block(\d+)/shortcut_norm", r"layer\1.\2.downsample.1"),
)


_MOBILENET_V1: _Patterns = (
    (r"stem", r"model.0.0"),
    (r"stem_norm", r"model.0.1"),
    (r"classifier", r"fc"),
    (r"block(\d+)/depthwise", r"model.\1.0"),
    (r"block(\d+)/depthwise_norm", r"model.\1.1"),
    (r"block(\d+)/pointwise", r"model.\1.3"),
    (r"block(\d+)/pointwise_norm", r"model.\1.4"),
)


def _mobilenet_v2(model: Any) -> _Patterns:
    """The names of the published code of activation boundaries, or torchvision's."""
    last = sum(model.stage_sizes) + 1
    ends = (
        (r"stem", r"features.0.0"),
        (r"stem_norm", r"features.0.1"),
        (r"last", rf"features.{last}.0"),
        (r"last_norm", rf"features.{last}.1"),
        (r"classifier", r"classifier.1"),
    )
    if model.first_expansion:
        return ends + (
            (r"block(\d+)/expand", r"features.\1.conv.0"),
            (r"block(\d+)/expand_norm", r"features.\1.conv.1"),
            (r"block(\d+)/depthwise", r"features.\1.conv.3"),
            (r"block(\d+)/depthwise_norm", r"features.\1.conv.4"),
            (r"block(\d+)/project", r"features.\1.conv.6"),
            (r"block(\d+)/project_norm", r"features.\1.conv.7"),
        )
    return ends + (
        (r"block1/depthwise", r"features.1.conv.0.0"),
        (r"block1/depthwise_norm", r"features.1.conv.0.1"),
        (r"block1/project", r"features.1.conv.1"),
        (r"block1/project_norm", r"features.1.conv.2"),
        (r"block(\d+)/expand", r"features.\1.conv.0.0"),
        (r"block(\d+)/expand_norm", r"features.\1.conv.0.1"),
        (r"block(\d+)/depthwise", r"features.\1.conv.1.0"),
        (r"block(\d+)/depthwise_norm", r"features.\1.conv.1.1"),
        (r"block(\d+)/project", r"features.\1.conv.2"),
        (r"block(\d+)/project_norm", r"features.\1.conv.3"),
    )


# Architecture -> (Flax path -> published name: patterns on the module's path, first match wins),
# and a module by whose published name state dicts of different architectures are told apart.
PUBLISHED_NAMES: Mapping[type[nn.Module], tuple[Callable[[Any], _Patterns], str]] = {
    WideResNet: (lambda _: _WIDE_RESNET, "group1_block0/conv2"),
    ResNet: (lambda _: _RESNET, "stage1_block0/conv3"),
    MobileNetV1: (lambda _: _MOBILENET_V1, "block1/pointwise"),
    MobileNetV2: (_mobilenet_v2, "block1/depthwise"),
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
    """The published name of a Flax leaf: (collection, modules …, leaf)."""
    _, *modules, leaf = path
    here = "/".join(modules)
    patterns, _ = PUBLISHED_NAMES[type(model)]
    for pattern, replacement in patterns(model):
        if match := re.fullmatch(pattern, here):
            return f"{match.expand(replacement)}.{_LEAVES[leaf]}"
    raise AssertionError(f"{type(model).__name__} has a module without published name: {here}")
