"""The errors that abflax raises on purpose; everything else is a bug.

`InputError` is a `ValueError`: something that the caller gave cannot be right, and the message
is one sentence that names it. `NonFiniteError` stops a run whose numbers are no longer numbers,
`DiskError` one that can no longer be written down, `LostError` one that another process has left;
`BusyError` says that somebody else is at it.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import importlib
import os
import re
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pydantic

_LONGEST = 400  # characters of a message


class InputError(ValueError):
    """What the caller gave cannot be right. The message is one sentence that names the culprit.

    Of a message with more than 400 characters, the middle is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))


class UnknownNameError(InputError, KeyError):
    """A name that is not in a registry; also a `KeyError`, so that `in` and `get` work.

    Attributes:
      name: what was given.
      near: the names like it.
    """

    def __init__(self, message: str, name: str = "", near: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.name, self.near = name, tuple(near)

    def __str__(self) -> str:
        return str(self.args[0])


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite. The last good checkpoint stays."""


class BusyError(InputError):
    """Another process is doing the same work. The message names it; nothing was touched.

    Whoever has more work to do can go on with that, and come back.
    """


class DiskError(OSError):
    """A file could not be written. What stood there before stays, and the run can go on from it."""

    def __init__(self, message: str) -> None:
        super().__init__(_printable(message))

    def __str__(self) -> str:
        return str(self.args[0])


class LostError(RuntimeError):
    """Another process of the same run is gone. Started again, all go on from the checkpoint."""


def _printable(text: str) -> str:
    """Writes out the control characters of names from files, which a terminal would obey."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = _LONGEST // 2 - 2
    return text if len(text) <= _LONGEST else f"{text[:half]} … {text[-half:]}"


class _Brief(reprlib.Repr):
    """Short texts of values; arrays by their shapes, and objects by their classes."""

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, np.ndarray | jax.Array):
            return f"an array {list(x.shape)} of {x.dtype}"
        if x is None or isinstance(x, bool | float | complex | bytes | Path | type | np.generic):
            return super().repr_instance(x, level)
        return f"a {type(x).__name__}"


brief = _Brief().repr
"""What a message says of a value: its text, but arrays by shape and objects by class."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """An error for a misspelt name, with the near matches, or else all that is known.

    Args:
      kind: what the name should have been the name of, e.g. "method".
      name: what was given.
      known: the legal names.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return UnknownNameError(f"unknown {kind} '{name}'; {hint}", str(name), near)


def import_extra(module: str, extra: str) -> Any:
    """Imports a module of a package that is not always installed.

    Args:
      module: its full name.
      extra: the extra of abflax that installs the package.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'abflax[{extra}]'") from error


EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT}
"""Numbers of the system's errors that say that there is no room for a file, whatever its name."""


def path_error(what: str, error: OSError) -> InputError | DiskError:
    """The error for a path that cannot be used; a `DiskError` where the fault is not the path's."""
    kind = DiskError if error.errno in EXHAUSTED else InputError
    return kind(f"{what}: {error.strerror}")


def local_path(path: str | Path) -> Path:
    """A path of this machine, with `~` expanded.

    Raises:
      ValueError: for a URL, the home of an unknown user, and a name that is not UTF-8.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise InputError(f"{path} is no path here: give a local folder, or one that is mounted")
    try:
        str(path).encode(), os.fsencode(path)  # for libraries, and for the system
        return Path(path).expanduser()
    except UnicodeError:
        raise InputError(f"{path} is not UTF-8 in this locale, as names of files must be") from None
    except RuntimeError:
        raise InputError(f"{path} names the home of a user who is not known here") from None


def require_same_shape(
    what: str, student: jax.Array | np.ndarray, teacher: jax.Array | np.ndarray
) -> None:
    """Raises `InputError` naming both shapes where they differ: no silent broadcast."""
    ours, theirs = tuple(student.shape), tuple(teacher.shape)
    if ours != theirs:
        raise InputError(f"{what}: the student's shape {ours} is not the teacher's {theirs}")


def require_types(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raises `InputError` for the first value that is not of the type that its name asks for.

    A float is a finite number, whole ones included; a bool is not a number; a list is not a tuple.

    Args:
      values: name -> value.
      kinds: name -> type annotation, for every name in `values`.
    """
    try:
        _validator(tuple((name, kinds[name]) for name in values)).model_validate(dict(values))
    except pydantic.ValidationError as error:
        name = error.errors()[0]["loc"][0]
        found = (each["msg"] for each in error.errors() if each["loc"][0] == name)
        reasons = " or ".join(dict.fromkeys(found)).replace("Input should be", "must be")
        value = brief(values[str(name)])
        raise InputError(f"{name} {reasons.replace('or must be', 'or')}, not {value}") from None


def require_field_types(settings: Any) -> None:
    """Raises `InputError` for a field of a dataclass whose value is not of the annotated type."""
    fields = {each.name: getattr(settings, each.name) for each in dataclasses.fields(settings)}
    require_types(fields, type_hints(type(settings)))


def require_instances(values: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises `InputError` for the first value that is not an instance of its class.

    Args:
      values: name -> (value, class or union of classes).
    """
    for name, (value, kind) in values.items():
        if not isinstance(value, kind):
            kinds = (each for each in typing.get_args(kind) or (kind,) if each is not type(None))
            names = " or ".join(each.__name__ for each in kinds)
            raise InputError(f"{name} must be {names}, not {brief(value)}")


type_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
"""The annotations of a class, evaluated."""


@functools.lru_cache(maxsize=256)
def _validator(kinds: tuple[tuple[str, Any], ...]) -> type[pydantic.BaseModel]:
    strict = pydantic.ConfigDict(
        strict=True, arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=()
    )
    fields: dict[str, Any] = {name: (kind, ...) for name, kind in kinds}
    return pydantic.create_model("Settings", __config__=strict, **fields)
