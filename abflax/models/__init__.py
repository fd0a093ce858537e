"""Flax Linen networks that sow their pre-activations, and the registry that names them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen as nn

from abflax.errors import UnknownNameError, unknown
from abflax.models.mobilenet import MobileNetV1, MobileNetV2
from abflax.models.resnet import ResNet, ResNet50
from abflax.models.wide_resnet import WideResNet
from abflax.taps import Model, Tapped

__all__ = [
    "MODELS",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "ResNet50",
    "WideResNet",
    "model_name",
]


# One entry a model, whose architecture is what is bound here; other fields are the caller's.
_WITH_MULTIPLIER: Mapping[str, functools.partial[Any]] = {
    "resnet50": functools.partial(ResNet50, width=1.0),
    "mobilenet-v1": functools.partial(MobileNetV1, width=1.0, stage_sizes=(1, 2, 2, 6, 2)),
    "mobilenet-v2": functools.partial(
        MobileNetV2, width=1.0, stage_sizes=(1, 2, 3, 4, 3, 3, 1), first_expansion=True
    ),
    "mobilenet-v2-torchvision": functools.partial(
        MobileNetV2, width=1.0, stage_sizes=(1, 2, 3, 4, 3, 3, 1), first_expansion=False
    ),
}
_NAMED: Mapping[str, functools.partial[Any]] = {
    "wrn10-1": functools.partial(WideResNet, depth=10, width=1),
    "wrn10-4": functools.partial(WideResNet, depth=10, width=4),
    "wrn16-1": functools.partial(WideResNet, depth=16, width=1),
    "wrn16-2": functools.partial(WideResNet, depth=16, width=2),
    "wrn16-4": functools.partial(WideResNet, depth=16, width=4),
    "wrn22-4": functools.partial(WideResNet, depth=22, width=4),
    **_WITH_MULTIPLIER,
}


class _Models(Mapping[str, Callable[..., nn.Module]]):
    """What `MODELS` is, see there."""

    _WIDE = re.compile(r"wrn-?(\d+)-(\d+)")
    _SCALED = re.compile(r"(.+)-(\d+(?:\.\d+)?)")

    def __getitem__(self, name: str) -> Callable[..., nn.Module]:
        if name in _NAMED:
            return _NAMED[name]
        if match := self._WIDE.fullmatch(name):
            depth, width = map(int, match.groups())
            if depth < 10 or (depth - 4) % 6 or width < 1:
                near = max(10, 4 + 6 * round((depth - 4) / 6))
                raise UnknownNameError(
                    f"'{name}' is no wide ResNet: its depth must be 6n + 4 (10, 16, 22, 28, …) "
                    f"and its width at least 1; the nearest is wrn{near}-{max(width, 1)}"
                )
            return functools.partial(WideResNet, depth=depth, width=width)
        if (match := self._SCALED.fullmatch(name)) and match[1] in _WITH_MULTIPLIER:
            if not 0 < float(match[2]) <= 16:
                raise UnknownNameError(f"'{name}': a width multiplier is above 0 and at most 16")
            return functools.partial(_WITH_MULTIPLIER[match[1]], width=float(match[2]))
        raise unknown("model", name, self)

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMED)

    def __len__(self) -> int:
        return len(_NAMED)


MODELS: Mapping[str, Callable[..., nn.Module]] = _Models()
"""Name -> a callable that takes a module's fields: `MODELS["wrn22-4"](num_classes=10)`.

Wide ResNets of any legal depth and width are parsed, and "mobilenet-v1-0.5" is a mobilenet-v1 of
half the width; iteration lists those that the paper uses.
"""


def model_name(model: Model) -> str:
    """Names a module as `MODELS` does, or any other by its class and fields, with its tap paths.

    Functions among the fields count by their names.
    """
    if isinstance(model, Tapped):
        taps = ", ".join(f"{name}={path}" for name, path in model.tap_paths)
        return f"{model_name(model.model)} tapped at {taps}"
    for known, make in _NAMED.items():
        bound = make.keywords.items()
        if type(model) is make.func and all(getattr(model, key) == to for key, to in bound):
            return known
    if type(model) is WideResNet:
        return f"wrn{model.depth}-{model.width}"
    if isinstance(model, (ResNet, MobileNetV1, MobileNetV2)) and model.width != 1:
        whole = model_name(model.clone(width=1.0))
        if whole in _NAMED:
            return f"{whole}-{model.width!r}"
    named = repr(model)
    for function in _functions(model):
        if name := getattr(function, "__qualname__", None):
            named = named.replace(repr(function), name)
    return re.sub(r"\s+", " ", named)


def _functions(value: Any) -> Iterator[Callable[..., Any]]:
    """The functions among a module's fields, at any depth."""
    if isinstance(value, nn.Module):
        for field in dataclasses.fields(value):
            if field.name != "parent":
                yield from _functions(getattr(value, field.name, None))
    elif isinstance(value, functools.partial):
        yield from _functions((value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, Mapping):
        yield from _functions(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _functions(each)
    elif callable(value) and not isinstance(value, type):
        yield value
