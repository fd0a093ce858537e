"""Writes files atomically, and reads JSON with readable errors."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from abflax.errors import DiskError, InputError, NonFiniteError, path_error


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file's content in one step, and flushes it to disk.

    Raises:
      DiskError: if the file cannot be written; it is unchanged then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}") from error


def as_json(value: Any) -> str:
    """JSON text, which holds only numbers: NaN and infinity are none in JSON.

    Raises:
      NonFiniteError: for any of them.
    """
    try:
        return json.dumps(value, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise NonFiniteError(f"what is to be written holds NaN or infinity: {error}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it cannot be read, or is not JSON.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file")
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except InputError:
        raise
    except OSError as error:
        raise path_error(f"{path} cannot be read", error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
