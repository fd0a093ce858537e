"""One run at a time: a lock that dies with its process."""

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
    """A context in which no other process holds the lock on the same file.

    `flock` on a file that names its holder. The kernel lets go of it when the holder ends, by
    SIGKILL or power too, so what a dead process left behind is just a file and is taken over. On
    leaving, the file is removed.

    Between hosts it holds where the file system carries locks: NFSv4 does, NFSv3 with its lock
    daemon, Lustre mounted with `flock`. Mounted to lock within one host only (`nolock`,
    `localflock`), two hosts do not see each other, and nothing here can tell. A file system that
    refuses locks is told of in a warning, and the work goes on. Of several processes at one run the
    first holds it, for all.

    Args:
      path: of the file; its directory exists.
      what: what it protects, for the message.

    Raises:
      BusyError: on entering, if another process (or thread) holds it.
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
            if os.fstat(file).st_nlink == 0:  # its last holder removed it after it was opened here
                os.close(file)
                continue
            self._file = file
        # Only a help for whoever reads it: a full disk is not a reason to stop here.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()  # while it is still held: who opened it meanwhile sees no link
        os.close(self._file)
        self._file = None
