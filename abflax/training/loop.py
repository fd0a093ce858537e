"""The training loop: restore, train some steps, evaluate, record, save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from abflax.errors import BusyError, InputError
from abflax.runtime.distributed import max_over_processes
from abflax.training.group import TrainingGroup
from abflax.training.run import Run


def train(runs: Sequence[Run], group: TrainingGroup) -> None:
    """Trains the runs of a group to their ends: afterwards each has a `result` or an `error`.

    Runs at the same step share every dispatch. A run that is behind the others (it was resumed from
    an earlier checkpoint) trains alone until it has caught up. A run that fails leaves the others
    running if `group.keep_going`.

    Args:
      runs: those to train, none of them restored yet.
      group: what they share. Its `preemption` is asked before each dispatch; on a signal all runs
        are saved.

    Raises:
      ValueError: before the first step, if one of the runs cannot be right.
    """
    for run in runs:
        _attempt(run, run.restore)
    _raise_input_errors(runs)
    while active := _active(runs, group):
        if signal := max_over_processes(group.preemption.signal):
            for run in active:
                _attempt(run, run.stop, signal)
            return
        step = min(run.step for run in active)
        here = [run for run in active if run.step == step]
        count = min(group.steps_per_dispatch, *(run.next_evaluation - step for run in here))
        for run, trained in zip(here, group.train_steps(here, count), strict=True):
            _attempt(run, run.update, *trained, count)
        due = [run for run in here if run.at_evaluation and not run.ended]
        for run, measured in zip(due, group.evaluate(due), strict=True):
            _attempt(run, run.record, measured)


def _active(runs: Sequence[Run], group: TrainingGroup) -> list[Run]:
    """The runs that are not over; none of them once one has failed, unless the others go on."""
    failed = any(run.error is not None for run in runs)
    return [] if failed and not group.keep_going else [run for run in runs if not run.ended]


def _attempt(run: Run, do: Callable[..., None], *arguments: Any) -> None:
    """Calls a method of a run. An error ends this run, and no other."""
    try:
        do(*arguments)
    except Exception as error:
        run.fail(error)


def _raise_input_errors(runs: Sequence[Run]) -> None:
    """Raises for a run that cannot be right; one that is another process's is left to it."""
    for run in runs:
        if isinstance(run.error, InputError) and not isinstance(run.error, BusyError):
            raise run.error
