"""How long a command takes until its first step, with and without programs compiled before."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent.parent
_COMMAND = (sys.executable, "-m", "experiments.quickstart", "--seeds", "1", "--force")


def startup(_bench: Any, _repetitions: int) -> list[dict[str, Any]]:
    """The quickstart with one seed, twice in processes of their own; measured once."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            {"name": name} | _timed((*_COMMAND, "--workdir", folder))
            for name in ("nothing compiled before", "its programs compiled before")
        ]


def _timed(command: tuple[str, ...]) -> dict[str, float]:
    """Seconds until the first line of progress, and in all. Raises if the command fails."""
    began, first = time.perf_counter(), None
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if first is None and "epoch" in line:
                first = time.perf_counter() - began
    if child.returncode or first is None:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    return {"first_seconds": first, "whole_seconds": time.perf_counter() - began}
