"""Settings that are frozen dataclasses, and the check that their values are of their types."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from abflax.errors import InputError


def require_types(settings: Any) -> None:
    """Raises `InputError` for a field of a dataclass whose value is not of the annotated type."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if not is_of(value, hint):
            raise InputError(f"{field.name} must be {described(hint)}, not {value!r}")


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: a class, a union, a tuple of types, or `Any`.

    A float is a finite number, whole ones included; a bool is no number.
    """
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(is_of(value, each) for each in typing.get_args(hint))
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) < math.inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return all(is_of(each, kinds[0]) for each in value)
        return len(value) == len(kinds) and all(map(is_of, value, kinds))
    if hint is None:
        return value is None
    return isinstance(value, typing.get_origin(hint) or hint)


def described(hint: Any) -> str:
    """The type in words."""
    words: dict[Any, str] = {
        float: "a finite number",
        int: "a whole number",
        str: "a name",
        bool: "True or False",
        Mapping[str, Any]: "keywords by name",
        types.NoneType: "None",
    }
    if isinstance(hint, types.UnionType):
        return " or ".join(described(each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = [described(each) for each in typing.get_args(hint) if each is not Ellipsis]
        return (
            f"a tuple of ({', '.join(kinds)}{', …' if Ellipsis in typing.get_args(hint) else ''})"
        )
    return words.get(hint, getattr(hint, "__name__", "any"))
