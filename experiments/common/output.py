"""Standard output and error that may go away: `| head`, `>&-`, a full disk."""

import errno
import io
import os
import sys
from typing import Any


class _Descriptor(io.RawIOBase):
    """Writes to a file descriptor until that fails, and from then on nowhere.

    Attributes:
      error: why it failed, if it did.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: "memoryview[int]") -> int:  # type: ignore[override]
        if self.error is None:
            try:
                return os.write(self._descriptor, data)
            except OSError as error:
                self.error = error
        return len(data)


def stream(descriptor: int) -> io.TextIOWrapper:
    """A text stream that never raises: what it cannot encode is written as an escape sequence."""
    encoding = getattr(sys.__stderr__, "encoding", "utf-8")
    raw: Any = _Descriptor(descriptor)
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)


def patient_streams() -> None:
    """Makes standard output and error such streams, unless somebody else has replaced them."""
    if sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__:
        sys.stdout, sys.stderr = stream(1), stream(2)


def lost_output() -> str | None:
    """Why standard output could not be written; None if it was, or if its reader has left."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Descriptor) else None
    return None if error is None or error.errno == errno.EPIPE else os.strerror(error.errno or 0)
