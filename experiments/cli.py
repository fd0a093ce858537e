"""What all commands share: a parser with manners, one way to fail, and the compilation cache."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import logging
import os
import platform
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console

import abflax
from abflax import Result, processes
from abflax.errors import BusyError, DiskError, InputError, LostError, NonFiniteError
from abflax.interrupt import Interrupted
from abflax.progress import Live

WORKDIR = Path("workdir")

# By the numbers of <malloc.h>: M_TRIM_THRESHOLD, never; M_MMAP_MAX, no mappings of single blocks;
# M_ARENA_MAX, one arena, as all but the first are mappings of 64 MB at most.
_KEEPING = {-1: -1, -4: 0, -8: 1}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence, with near matches, and exit code 2.

    Args:
      module: what `python -m` runs.
      page: its docstring, the description, which ends with a paragraph that begins "examples:".
      choices: what comes between the two, heading -> name -> one line.
      trains: it shows progress, which `--quiet` turns off (see `progress`).
    """

    def __init__(
        self,
        module: str,
        page: str | None,
        choices: Mapping[str, Mapping[str, str]] | None = None,
        trains: bool = False,
    ) -> None:
        description, examples = (page or "").split("\n\nexamples:")
        lists = [
            "\n".join([f"{heading}:", *(f"  {name:<20} {line}" for name, line in lines.items())])
            for heading, lines in (choices or {}).items()
        ]
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            epilog="\n\n".join([*lists, f"examples:{examples}"]),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action="version", version=f"abflax {abflax.__version__}")
        if trains:
            self.add_argument("--quiet", action="store_true", help="results alone, no progress")

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        found, left = self.parse_known_args(args, namespace)
        if left:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(left[0].split("=")[0], flags, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
            self.error(f"unknown argument '{left[0]}'; {hint}")
        return found

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(command: Callable[[Console], None]) -> NoReturn:
    """Runs a command and turns what it raises on purpose into one sentence and an exit code.

    0: done. 1: the numbers went wrong. 2: something given cannot be right. 69: another process of
    the same run is gone (134 where JAX's runtime has seen it first); 74: something could not be
    written; 75: another process is at it; 130, 143: stopped by Ctrl-C or SIGTERM: to be gone on
    with by the same command. Anything else is a bug and shows its traceback.
    """
    keep_freed_memory()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # What Orbax leaves running when it gives up a damaged checkpoint has nobody to report to.
    sys.unraisablehook = lambda unraisable: (
        None
        if str(unraisable.exc_value) == "Event loop is closed"
        else sys.__unraisablehook__(unraisable)
    )
    warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
    # Where nobody looks at the width, tables are as wide as they need to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        command(console)
    except BusyError as error:
        _leave(f"error: {error}", os.EX_TEMPFAIL)
    except LostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(os.EX_UNAVAILABLE)  # on the way out JAX would wait for the others, then abort
    except DiskError as error:
        _leave(f"error: {error}", os.EX_IOERR)
    except InputError as error:
        _leave(f"error: {error}", 2)
    except NonFiniteError as error:
        _leave(f"error: {error}", 1)
    except Interrupted as stop:
        _leave(str(stop), 128 + stop.signal)
    except KeyboardInterrupt:
        _leave("stopped", 128 + signal.SIGINT)
    raise SystemExit(0)


def progress(arguments: argparse.Namespace, console: Console) -> Live:
    """What a command that trains shows of it: nothing where `--quiet` was given."""
    return Live(Console(quiet=True) if arguments.quiet else console)


def results_of(runs: Iterable[Callable[[], Result]]) -> list[Result]:
    """What runs end with, those abreast included; one that another process is at waits for the
    others, and `BusyError` is raised then."""
    results: list[Result] = []
    busy: list[BusyError] = []
    for run in runs:
        try:
            result = run()
            results += [result, *result.abreast]
        except BusyError as error:
            busy.append(error)
    require_all(results, busy)
    return results


def require_all(finished: Sequence[Any], busy: Sequence[BusyError]) -> None:
    """Raises where some of a command's runs are another process's, so that no mean is of a part."""
    if busy:
        total = len(finished) + len(busy)
        raise BusyError(f"{len(finished)} of {total} runs are finished; {busy[0]}")


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)


def join(coordinator: str | None, count: int | None, process: int | None) -> None:
    """Makes this command one of several processes (see `abflax.processes.join`); the first talks.

    Standard output is for what was asked: what the collectives print there goes beside the errors.
    """
    processes.join(coordinator, count, process)
    talk = os.dup(1) if processes.is_first() else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(talk, "w")


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, where glibc is what allocates, until the process ends.

    A step's temporaries are hundreds of megabytes, which it would otherwise give back to the
    system after each step and be given again, page by page. Left alone where the environment says
    how to allocate (`MALLOC_…`, `GLIBC_TUNABLES`).
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _KEEPING.items():
            mallopt(option, value)


def cache_compilation(workdir: Path) -> None:
    """Keeps compiled programs in the workdir, by CPU model, so that a second start is quick.

    Where `JAX_COMPILATION_CACHE_DIR` names another place, they are kept there.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    machine = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
        machine += f"-{zlib.crc32(flags.encode()):08x}"
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled" / machine).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def forget_programs() -> None:
    """Lets go of the compiled programs of this process; those in the workdir stay.

    JAX keeps what it has compiled. On CPUs each method takes some 1,500 memory maps or more, of
    which Linux grants a process 65,530: without this a few dozen methods end in a segmentation
    fault.
    """
    jax.clear_caches()


def epochs_type(text: str) -> tuple[int, int]:
    """ "I+C" -> (I, C)."""
    parts = text.split("+")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not I+C, such as 20+100")
    return int(parts[0]), int(parts[1])


def seeds_type(text: str) -> tuple[int, ...]:
    """ "3" -> (0, 1, 2); "4," -> (4,); "0,2" -> (0, 2)."""
    parts = [part for part in text.split(",") if part]
    if not parts or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a count nor a list of seeds")
    if "," in text:
        return tuple(dict.fromkeys(int(part) for part in parts))
    if not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError("at least one seed is needed, and 10,000 at most")
    return tuple(range(int(text)))


def names_type(text: str) -> tuple[str, ...]:
    """ "kd,fitnet" -> ("kd", "fitnet")."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"'{text}' names nothing")
    return names
