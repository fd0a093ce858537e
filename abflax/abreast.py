"""Runs side by side: students that differ in their initial weights alone share every dispatch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

from abflax.interrupt import Interrupted, StopRequest
from abflax.processes import highest
from abflax.step import TrainState

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """What a run wants done next.

    Attributes:
      step: of the run, the first that is to be made.
      state: before it.
      make: (states of the runs that stand there) -> (new states, metrics of each).
    """

    step: int
    state: TrainState
    make: Callable[[tuple[TrainState, ...]], tuple[tuple[TrainState, ...], tuple[Any, ...]]]


Steps = Generator[Dispatch, tuple[TrainState, Any], _T]
"""A run: it yields dispatches, is sent (state, metrics), and returns what it has made. It is thrown
`Interrupted` instead where it shall stop; it saves itself then, and raises that."""


def drive(runs: Mapping[str, Steps[_T]], stop: StopRequest) -> dict[str, _T]:
    """Takes runs to their ends: one dispatch for all that stand at one step, those behind first.

    Runs that begin at different steps meet at the next evaluation. Where one fails, the others go
    on, and its error is raised at the end.
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
        while waiting:
            if signal := highest(stop.signal):
                for name in [*waiting]:
                    del waiting[name]
                    resume(name, runs[name].throw, Interrupted("stopped", signal))
                break
            step = min(each.step for each in waiting.values())
            here = {name: each for name, each in waiting.items() if each.step == step}
            made = next(iter(here.values())).make(tuple(each.state for each in here.values()))
            for name, *result in zip(here, *made, strict=True):
                del waiting[name]
                resume(name, runs[name].send, tuple(result))
    if errors:
        raise errors[0]
    return done
