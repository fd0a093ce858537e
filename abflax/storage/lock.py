"""Locks a file until the process ends, so that only one process works on a run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from pathlib import Path

from abflax.errors import BusyError, DiskError
from abflax.runtime.distributed import on_process_zero

_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}


class Lock:
    """A context manager that holds an exclusive lock on a file.

    It uses `flock`, and writes the holder's name into the file. The kernel releases the lock when
    the holder ends, also by SIGKILL or a power failure. So a file that a dead process left behind
    is not locked. On exit the file is removed.

    The lock works between hosts if the file system supports it: NFSv4, NFSv3 with its lock daemon,
    Lustre mounted with `flock`. With the mount options `nolock` or `localflock` hosts do not see
    each other's locks, which cannot be detected here. If the file system refuses locks, a warning
    says so, and the work continues without one. With several processes per run, process 0 holds
    the lock.

    Args:
      path: of the file; its directory must exist.
      what: what the lock protects, for the message.

    Raises:
      BusyError: on entering, if another process (or thread) holds the lock.
      DiskError: on entering, if the file cannot be written.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._file: int | None = None

    @on_process_zero
    def __enter__(self) -> Lock:
        while self._file is None:
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise DiskError(f"cannot write {self._path}: {error.strerror}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
                os.close(file)
                if error.errno in _HELD:
                    raise BusyError(
                        f"{self._what} is being worked on by {holder or 'another process'}, which "
                        f"holds {self._path}"
                    ) from None
                warnings.warn(
                    f"{self._path.parent} cannot be locked ({error.strerror}): make sure that no "
                    "other process works there",
                    stacklevel=2,
                )
                return self
            if os.fstat(file).st_nlink == 0:  # the last holder removed the file after `open`
                os.close(file)
                continue
            self._file = file
        # The holder's name is only for messages, so a full disk is no error here.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()  # before the release, so that others see that the file is gone
        os.close(self._file)
        self._file = None
