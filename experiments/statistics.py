"""Means and deviations, as tables show them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def percent(share: float, digits: int = 2) -> str:
    """0.0449 -> "4.49"."""
    return f"{100 * share:.{digits}f}"


def mean_and_std(numbers: Sequence[float], digits: int = 2, factor: float = 100.0) -> str:
    """Mean ± sample standard deviation times a factor, in percent unless told otherwise; of a
    single number, the number."""
    mean = f"{factor * statistics.mean(numbers):.{digits}f}"
    if len(numbers) < 2:
        return mean
    return f"{mean} ± {factor * statistics.stdev(numbers):.{digits}f}"


def beyond_error_bars(first: Sequence[float], second: Sequence[float]) -> int | None:
    """-1 or 1 where the first mean lies below or above the second by more than both deviations.

    That is, where mean ± sample standard deviation of the two do not overlap. 0 where they do;
    None where one of them is a single number, which has no deviation.
    """
    if min(len(first), len(second)) < 2:
        return None
    difference = statistics.mean(first) - statistics.mean(second)
    if abs(difference) <= statistics.stdev(first) + statistics.stdev(second):
        return 0
    return 1 if difference > 0 else -1
