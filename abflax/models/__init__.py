"""Finds Flax Linen networks, which sow their pre-activations, by their names."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen as nn

from abflax.errors import UnknownNameError, unknown
from abflax.models.efficientnet import EfficientNetLite
from abflax.models.mobilenet import MobileNetV1, MobileNetV2
from abflax.models.resnet import ResNet, ResNet50
from abflax.models.wide_resnet import WideResNet
from abflax.taps import Model, Tapped, module_of, side_of

__all__ = [
    "MODELS",
    "EfficientNetLite",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "ResNet50",
    "WideResNet",
    "model_name",
]


# The bound fields define the architecture; the caller chooses the others.
_MOBILENET_V2 = functools.partial(MobileNetV2, width=1.0, stage_sizes=(1, 2, 3, 4, 3, 3, 1))
_WITH_MULTIPLIER: Mapping[str, functools.partial[Any]] = {
    "resnet50": functools.partial(ResNet50, width=1.0),
    "mobilenet-v1": functools.partial(MobileNetV1, width=1.0, stage_sizes=(1, 2, 2, 6, 2)),
    "mobilenet-v2": functools.partial(_MOBILENET_V2, first_expansion=True),
    "mobilenet-v2-torchvision": functools.partial(_MOBILENET_V2, first_expansion=False),
}
# Width and depth grow together.
_LITE = (
    (1.0, (1, 2, 2, 3, 3, 4, 1)),
    (1.0, (1, 3, 3, 4, 4, 5, 1)),
    (1.1, (1, 3, 3, 4, 4, 5, 1)),
    (1.2, (1, 3, 3, 5, 5, 6, 1)),
    (1.4, (1, 4, 4, 6, 6, 8, 1)),
)
_NAMED: Mapping[str, functools.partial[Any]] = {
    "wrn10-1": functools.partial(WideResNet, depth=10, width=1),
    "wrn10-4": functools.partial(WideResNet, depth=10, width=4),
    "wrn16-1": functools.partial(WideResNet, depth=16, width=1),
    "wrn16-2": functools.partial(WideResNet, depth=16, width=2),
    "wrn16-4": functools.partial(WideResNet, depth=16, width=4),
    "wrn22-4": functools.partial(WideResNet, depth=22, width=4),
    **_WITH_MULTIPLIER,
    **{
        f"efficientnet-lite{number}": functools.partial(
            EfficientNetLite, width=width, stage_sizes=sizes
        )
        for number, (width, sizes) in enumerate(_LITE)
    },
}


class _Models(Mapping[str, Callable[..., nn.Module]]):
    """The type of `MODELS`."""

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
"""Name -> a callable that takes the module's other fields: `MODELS["wrn22-4"](num_classes=10)`.

Names of wide ResNets of any valid depth and width work, such as "wrn28-10", and so do width
multipliers: "mobilenet-v1-0.5" has half the channels. Iteration lists those of the paper
and its tables.
"""


def model_name(model: Model) -> str:
    """Returns the name of a module in `MODELS`, or else its class and fields, with its tap paths.

    Functions among the fields are represented by their names, an NNX module by its class and the
    shapes of its variables, and nothing by its address, so a name is the same in every process; two
    that differ in what a closure holds may share one.
    """
    if isinstance(model, Tapped):
        taps = ", ".join(f"{name}={path}" for name, path in model.tap_paths)
        return f"{model_name(model.model)} tapped at {taps}" if taps else model_name(model.model)
    side = side_of(model)
    if side.digest is not None:
        return f"{side.name}({side.digest})"
    model = module_of(model)
    for known, factory in _NAMED.items():
        bound = factory.keywords
        if type(model) is factory.func and all(getattr(model, k) == bound[k] for k in bound):
            return known
    if type(model) is WideResNet:
        return f"wrn{model.depth}-{model.width}"
    if isinstance(model, (ResNet, MobileNetV1, MobileNetV2)) and model.width != 1:
        full_width = model_name(model.clone(width=1.0))
        if full_width in _NAMED:
            return f"{full_width}-{model.width!r}"
    text = repr(model)
    for function in _code(model):
        if name := getattr(function, "__qualname__", None):
            text = text.replace(repr(function), name)
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", text))


def without_fields(name: str) -> str:
    """Shortens the name of a module to its class: "Net( # attributes …)" becomes "Net"."""
    return re.sub(r"^([^\s(]+)\(.*", r"\1", name)


def is_local(model: Model) -> bool:
    """Whether the code of a Linen module has no name to import it by, so that two may share one.

    That is so for a class or function made in a function, a notebook or a script.
    """
    names = ("__qualname__", "__module__")
    return side_of(model).digest is None and any(
        "<" in qualname or module == "__main__"
        for qualname, module in (
            [getattr(each, name, None) or "" for name in names] for each in _code(module_of(model))
        )
    )


def _code(value: Any) -> Iterator[Callable[..., Any]]:
    """Yields the classes of modules, and the functions among their fields, at any depth."""
    if isinstance(value, nn.Module):
        yield type(value)
        for field in dataclasses.fields(value):
            if field.name != "parent":
                yield from _code(getattr(value, field.name, None))
    elif isinstance(value, functools.partial):
        yield from _code((value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, Mapping):
        yield from _code(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _code(item)
    elif callable(value) and not isinstance(value, type):
        yield value
