"""The errors that abflax raises on purpose; everything else is a bug.

`InputError` is a `ValueError`: something that the caller gave cannot be right, and the message
is one sentence that names it. `NonFiniteError` stops a run whose numbers are no longer numbers,
`DiskError` one that can no longer be written down, `LostError` one that another process has left;
`BusyError` says that somebody else is at it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import jax
import numpy as np


class InputError(ValueError):
    """What the caller gave cannot be right. The message is one sentence that names the culprit."""


class UnknownNameError(InputError, KeyError):
    """A name that is not in a registry; also a `KeyError`, so that `in` and `get` work."""

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

    def __str__(self) -> str:
        return str(self.args[0])


class LostError(RuntimeError):
    """Another process of the same run is gone. Started again, all go on from the checkpoint."""


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
    return UnknownNameError(f"unknown {kind} '{name}'; {hint}")


def require_same_shape(
    what: str, student: jax.Array | np.ndarray, teacher: jax.Array | np.ndarray
) -> None:
    """Raises `InputError` naming both shapes where they differ: no silent broadcast."""
    ours, theirs = tuple(student.shape), tuple(teacher.shape)
    if ours != theirs:
        raise InputError(f"{what}: the student's shape {ours} is not the teacher's {theirs}")
