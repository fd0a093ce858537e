"""Flax Linen networks that sow their pre-activations, and the registry that names them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping

from flax import linen as nn

from abflax.errors import UnknownNameError, unknown
from abflax.models.wide_resnet import WideResNet

__all__ = ["MODELS", "WideResNet", "model_name"]


class _Models(Mapping[str, Callable[..., nn.Module]]):
    """Name -> a callable that takes the module's remaining fields.

    `MODELS["wrn22-4"](num_classes=10, dtype=None, axis_name=None)` is a Linen module. Wide
    ResNets of any legal depth and width are parsed; iteration lists those that the paper uses.
    """

    _WIDE = re.compile(r"wrn-?(\d+)-(\d+)")
    _PAPER = ("wrn10-1", "wrn10-4", "wrn16-1", "wrn16-2", "wrn16-4", "wrn22-4")

    def __getitem__(self, name: str) -> Callable[..., nn.Module]:
        if match := self._WIDE.fullmatch(name):
            depth, width = map(int, match.groups())
            if depth < 10 or (depth - 4) % 6 or width < 1:
                near = max(10, 4 + 6 * round((depth - 4) / 6))
                raise UnknownNameError(
                    f"'{name}' is no wide ResNet: its depth must be 6n + 4 (10, 16, 22, 28, …) "
                    f"and its width at least 1; the nearest is wrn{near}-{max(width, 1)}"
                )
            return functools.partial(WideResNet, depth=depth, width=width)
        raise unknown("model", name, self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._PAPER)

    def __len__(self) -> int:
        return len(self._PAPER)


MODELS: Mapping[str, Callable[..., nn.Module]] = _Models()


def model_name(model: nn.Module) -> str:
    """The name under which `MODELS` has the module, or its class and fields for any other.

    Functions among the fields count by their names.
    """
    if isinstance(model, WideResNet):
        return f"wrn{model.depth}-{model.width}"
    named = re.sub(r"<function ([\w.<>]+) at 0x[0-9a-f]+>", r"\1", repr(model))
    return re.sub(r"\s+", " ", named)
