"""What all commands share: flags made from dataclasses, one way to fail, the compilation cache."""

import contextlib
import copy
import ctypes
import dataclasses
import logging
import math
import os
import platform
import re
import signal
import sys
import time
import typing
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import docstring_parser
import jax
import tyro
from rich.console import Console
from rich.table import Table
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

import abflax
from abflax import Result
from abflax.config import RunConfig
from abflax.errors import (
    EXHAUSTED,
    BusyError,
    DiskError,
    InputError,
    LostError,
    NonFiniteError,
    local_path,
    type_hints,
)
from abflax.methods.terms import Term
from abflax.runtime import distributed
from abflax.runtime.jax_checks import jax_defaults
from abflax.runtime.preemption import Interrupted
from abflax.runtime.rich_reporter import RichReporter
from experiments.common import output

WORKDIR = Path("workdir")

# By the numbers of <malloc.h>: M_TRIM_THRESHOLD, never; M_MMAP_MAX, no mappings of single blocks;
# M_ARENA_MAX, one arena, as all but the first are mappings of 64 MB at most.
_MALLOC_OPTIONS = {-1: -1, -4: 0, -8: 1}

_T = TypeVar("_T")


def text(read: Callable[[str], Any], metavar: str, show: Callable[[Any], str]) -> Any:
    """A flag of one word: how it is read, named in the help, and shown as a default."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [show(value)],
    )


def read_epochs(text: str) -> tuple[int, int]:
    """Reads "I+C" as (I, C)."""
    parts = text.split("+")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"'{text}' is not I+C, such as 20+100")
    return int(parts[0]), int(parts[1])


def read_seeds(text: str) -> tuple[int, ...]:
    """Reads "3" as (0, 1, 2), "4," as (4,) and "0,2" as (0, 2)."""
    parts = [part for part in text.split(",") if part]
    if not parts or not all(part.isdigit() for part in parts):
        raise ValueError(f"'{text}' is neither a count nor a list of seeds")
    if "," in text:
        return tuple(dict.fromkeys(int(part) for part in parts))
    if not 1 <= int(text) <= 10_000:
        raise ValueError("at least one seed is needed, and 10,000 at most")
    return tuple(range(int(text)))


def read_names(text: str) -> tuple[str, ...]:
    """Reads "kd,fitnet" as ("kd", "fitnet")."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ValueError(f"'{text}' names nothing")
    return names


def read_numbers(text: str) -> tuple[float, ...]:
    """Reads "0.1,1" as (0.1, 1.0)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"'{text}' is no list of numbers") from None


def _joined(values: Iterable[Any]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


Epochs = Annotated[
    tuple[int, int], text(read_epochs, "I+C", lambda epochs: "+".join(map(str, epochs)))
]
SeedList = Annotated[
    tuple[int, ...], text(read_seeds, "N|LIST", lambda seeds: "".join(f"{seed}," for seed in seeds))
]
Names = Annotated[tuple[str, ...], text(read_names, "NAMES", _joined)]
Numbers = Annotated[tuple[float, ...], text(read_numbers, "X,X,…", _joined)]

_OWN_FORMS = {tuple[int, ...]: Epochs, tuple[str, ...]: Names}
"""Types of `RunConfig` and of the terms' fields that are written in one word."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The flags of every command that trains.

    Attributes:
      workdir: where runs, records and pictures go.
      quiet: print results alone, no progress.
    """

    workdir: Path = WORKDIR
    quiet: bool = False


def parse(
    kind: type[_T],
    module: str,
    page: str | None,
    choices: Mapping[str, Mapping[str, str]] | None = None,
    hidden: Sequence[str] = (),
) -> _T:
    """The command line as a dataclass. What cannot be parsed ends the process with exit code 2.

    A field of type `RunConfig` stands for the flags of all its fields, and of the fields of all
    terms, which become its options.

    Args:
      kind: the dataclass; the help of a flag is what its docstring says of the field.
      module: what `python -m` runs.
      page: the module's docstring: the description and, after "Examples:", examples.
      choices: lists to show before the examples: heading -> name -> one line.
      hidden: fields of `RunConfig` that the command decides itself; "options": those of methods.
    """
    if "--version" in sys.argv[1:]:
        print(f"abflax {abflax.__version__}")
        raise SystemExit(0)
    description, *examples = (page or "").split("\n\nExamples:")  # no page: PYTHONOPTIMIZE=2
    lists = [
        "\n".join([f"{heading}:", *(f"  {name:<20} {line}" for name, line in lines.items())])
        for heading, lines in (choices or {}).items()
    ]
    registry = ConstructorRegistry()
    registry.primitive_rule(_optional)
    registry.primitive_rule(
        lambda info: text(local_path, "PATH", str) if info.type is Path else None
    )
    registry.struct_rule(lambda info: _run_config_flags(info, hidden))
    return tyro.cli(
        kind,
        prog=f"python -m {module}",
        description="\n\n".join([description, *lists, *(f"Examples:{each}" for each in examples)]),
        registry=registry,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _optional(info: PrimitiveTypeInfo) -> Any:
    """`T | None` is written as a `T`; None is the flag left out."""
    kinds = typing.get_args(info.type)
    if len(kinds) != 2 or type(None) not in kinds:
        return None
    kind: Any = next(option for option in kinds if option is not type(None))
    form: Any = _OWN_FORMS.get(kind, kind)
    of = PrimitiveTypeInfo.make(form, info.markers)
    spec = ConstructorRegistry.get_primitive_spec(of)
    if not isinstance(spec, PrimitiveConstructorSpec):
        return spec
    return dataclasses.replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["-"] if value is None else spec.str_from_instance(value),
    )


def _run_config_flags(info: StructTypeInfo, hidden: Sequence[str]) -> StructConstructorSpec | None:
    """A flag for every setting that `RunConfig.create` takes, but the hidden ones."""
    if info.type is not RunConfig:
        return None
    kind: Any
    flags = {}
    for name, (kind, text) in _documented(RunConfig).items():
        if name not in {"options", "seeds", "setting", "test", "own_phases", "optimizer", "anchors",
                        "augment", "target_data", *hidden}:  # fmt: skip
            kind = _OWN_FORMS.get(kind, kind)
            flags[name] = StructFieldSpec(name, kind, getattr(info.default, name), text)
    options = {}
    if "options" not in hidden:
        options["transfer_weight"] = (float, "factor on every transfer loss")
        for term in _subclasses(Term):
            options |= _documented(term)
    for name, (kind, text) in options.items():
        flags[name] = StructFieldSpec(name, kind | None, None, f"{text} (of the method)")
    decided = {name: getattr(info.default, name) for name in hidden if name != "options"}

    def create(**settings: Any) -> RunConfig:
        left_out = {name for name in options if settings[name] is None}
        given = {name: value for name, value in settings.items() if name not in left_out}
        try:
            return RunConfig.create(**decided | given)
        except InputError as error:  # one sentence, without the library's frame around it
            _leave(f"error: {error}", 2)

    return StructConstructorSpec(create, tuple(flags.values()))


def _documented(kind: type) -> dict[str, tuple[Any, str]]:
    """Field -> (type, what the docstring says of it), of a dataclass."""
    texts = {
        entry.arg_name: " ".join((entry.description or "").split())
        for base in reversed(kind.__mro__)
        for entry in docstring_parser.parse(base.__doc__ or "").params
    }
    hints = type_hints(kind)
    return {
        field.name: (hints[field.name], texts.get(field.name, ""))
        for field in dataclasses.fields(kind)
    }


def _subclasses(kind: type) -> list[type]:
    direct: list[type] = kind.__subclasses__()
    return direct + [inherited for sub in direct for inherited in _subclasses(sub)]


def main(command: Callable[[Console], None]) -> NoReturn:
    """Runs a command and turns what it raises on purpose into one sentence and an exit code.

    0: done. 1: the numbers went wrong. 2: something given cannot be right. 69: another process of
    the same run is gone (134 where JAX's runtime has seen it first); 74: something could not be
    written; 75: another process is at it; 130, 143: stopped by Ctrl-C or SIGTERM: to be gone on
    with by the same command. Anything else is a bug and shows its traceback.
    """
    output.patient_streams()
    keep_freed_memory()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # What Orbax leaves running when it gives up a checkpoint has nobody to report to.
    sys.unraisablehook = lambda unraisable: (
        None
        if str(unraisable.exc_value) == "Event loop is closed"
        or "EventLoop.__del__" in repr(unraisable.object)
        else sys.__unraisablehook__(unraisable)
    )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
    warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
    # 120 columns where the output is a file or a pipe.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    codes = {BusyError: os.EX_TEMPFAIL, InputError: 2, NonFiniteError: 1}
    try:
        with jax_defaults():
            command(console)
    except (BusyError, InputError, NonFiniteError) as error:
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        _leave(f"error: {error}", code)
    except LostError as error:
        _leave_at_once(str(error), os.EX_UNAVAILABLE)  # JAX would wait for the others, then abort
    except DiskError as error:
        _leave_at_once(str(error), os.EX_IOERR)  # Orbax's threads would wait for five minutes
    except OSError as error:
        if error.errno not in EXHAUSTED:
            raise
        _leave_at_once(str(error), os.EX_IOERR)
    except Interrupted as stop:
        _leave(str(stop), 128 + stop.signal)
    except KeyboardInterrupt:
        _leave("stopped", 128 + signal.SIGINT)
    if reason := output.lost_output():
        _leave(f"error: the results cannot be written to standard output: {reason}", os.EX_IOERR)
    raise SystemExit(0)


def progress(arguments: Arguments, console: Console) -> RichReporter:
    """Shows progress, unless `--quiet` was given."""
    return RichReporter(Console(quiet=True) if arguments.quiet else console)


def results_of(groups: Iterable[Callable[[], Sequence[Result]]]) -> list[Result]:
    """Trains one group of runs after another and returns all their results.

    A group with a run that another process is training waits: the others are trained first.
    """
    results: list[Result] = []
    busy: list[BusyError] = []
    for group in groups:
        try:
            results += group()
        except BusyError as error:
            busy.append(error)
    require_all(results, busy)
    return results


def attempt(
    train: Callable[[Sequence[_T]], None], group: Sequence[_T]
) -> list[tuple[_T, BusyError | NonFiniteError]]:
    """Trains a group of runs in one program; returns (member, error) for each that failed.

    After an error each is trained alone, which shows whose error it is; finished runs are not
    trained again.
    """
    if not group:
        return []
    try:
        train(group)
        return []
    except (BusyError, NonFiniteError) as error:
        if len(group) == 1:
            return [(group[0], error)]
    return [failed for member in group for failed in attempt(train, [member])]


def require_all(finished: Sequence[Any], busy: Sequence[BusyError]) -> None:
    """Raises `BusyError` if some runs are another process's, so that no mean is of a part."""
    if busy:
        total = len(finished) + len(busy)
        raise BusyError(f"{len(finished)} of {total} runs are finished; {busy[0]}")


@contextlib.contextmanager
def time_limit(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether the time is over; a run in the block stops then, saved.

    The alarm is repeated, for a run that starts just after it.
    """
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 60 * (minutes or 0), 1.0)  # 0: no alarm
    try:
        yield lambda: time.monotonic() >= end
    except Interrupted as stop:
        if stop.signal != signal.SIGALRM:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_table(
    columns: Iterable[str], title: str | None = None, left: int = 1, pad_edge: bool = True
) -> Table:
    """Makes an empty table to print; left: how many columns are text, not numbers."""
    table = Table(
        title=title, title_justify="left", box=None, header_style="bold", pad_edge=pad_edge
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def print_table(console: Console, table: Table) -> None:
    """Prints a table at its full width. A narrower terminal wraps its lines; nothing is cut."""
    widest, whole = console.options.update_width(10**9), copy.copy(table)
    whole.width = console.measure(table, options=widest).maximum
    console.print(whole, soft_wrap=True)


def _leave_at_once(message: str, code: int) -> NoReturn:
    """Ends the process without waiting for its threads."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)


def join_processes(place: str, task: str) -> None:
    """Makes this command one of several processes that train together; process 0 prints.

    Standard output is for results: what the collectives print there goes to standard error.
    `place` is "HOST:PORT,N,I" for process I of N, with process 0 at that address, or "auto" where
    JAX knows the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU). `task` must be the same in all.
    """
    results = os.dup(1)
    os.dup2(2, 1)
    try:
        _join(place, task)
    except BaseException:
        os.dup2(results, 1)
        raise
    others = os.open(os.devnull, os.O_WRONLY)
    sys.stdout = output.stream(results if distributed.is_first() else others)


def _join(place: str, task: str) -> None:
    if place == "auto":
        distributed.initialize_distributed()
        return
    parts = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", place)
    if parts is None:
        raise InputError(f"--distributed is auto or HOST:PORT,N,I, not '{place}'")
    distributed.initialize_distributed(parts[1], int(parts[2]), int(parts[3]), task)


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
        for option, value in _MALLOC_OPTIONS.items():
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
