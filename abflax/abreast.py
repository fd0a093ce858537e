"""Runs side by side: students that see the same batches of one teacher share every dispatch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

from abflax.errors import BusyError, InputError
from abflax.interrupt import Interrupted, StopRequest
from abflax.parallel import Program
from abflax.processes import highest
from abflax.step import TrainState

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """What a run wants done next.

    Attributes:
      step, count: of the run, the first that is to be made, and how many; 0: none, but the student
        is to be measured on held-out data.
      program: of their phase.
      state: before them.
      kept: the phase's targets, where they are kept.
    """

    step: int
    count: int
    program: Program
    state: TrainState
    kept: Any = None


Made = tuple[TrainState, dict[str, Any]]
"""The state after a dispatch, and its metrics, `[steps]` each, or what was measured."""

Steps = Generator[Dispatch, Made, _T]
"""A run: it yields dispatches, is sent what they made, and returns what it has made of them all. It
is thrown `Interrupted` instead of steps where it shall stop; it saves itself then, and raises that.
"""


def drive(
    runs: Mapping[str, Steps[_T]],
    make: Callable[[Sequence[Dispatch]], Sequence[Made]],
    stop: StopRequest,
    goes_on: bool,
) -> dict[str, _T]:
    """Takes runs to their ends: all that want the same steps get them at once, those behind first.

    Runs that stand at different steps, or ask for different numbers of them, meet at an evaluation
    that they have in common. Where one fails and `goes_on`, the others go on, and its error is
    raised at the end (the first of several; one that says that they were stopped before all
    others). What cannot be right is raised before the first step, and an error in `make` at once.
    """
    done: dict[str, _T] = {}
    errors: list[BaseException] = []
    waiting: dict[str, Dispatch] = {}

    def resume(name: str, how: Callable[..., Dispatch], *given: Any) -> None:
        try:
            waiting[name] = how(*given)
        except StopIteration as end:
            done[name] = end.value
        except (Exception, Interrupted) as error:
            errors.append(error)

    with contextlib.ExitStack() as closing:
        for name, run in runs.items():
            closing.enter_context(contextlib.closing(run))
            resume(name, run.send, None)
        for error in errors:
            if isinstance(error, InputError) and not isinstance(error, BusyError):
                raise error
        while waiting and (goes_on or not errors):
            if signal := highest(stop.signal):
                for name in [name for name, each in waiting.items() if each.count]:
                    del waiting[name]
                    resume(name, runs[name].throw, Interrupted("stopped", signal))
                if not waiting:
                    break
            wanted = min((each.step, each.count) for each in waiting.values())
            here = [
                name
                for name in runs  # in one order always, so that their program is the same
                if name in waiting and (waiting[name].step, waiting[name].count) == wanted
            ]
            for name, made in zip(here, make([waiting[name] for name in here]), strict=True):
                del waiting[name]
                resume(name, runs[name].send, made)
    if errors:
        raise next((each for each in errors if isinstance(each, Interrupted)), errors[0])
    return done
