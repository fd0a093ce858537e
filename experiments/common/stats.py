"""Means and deviations, as tables show them."""

import statistics
from collections.abc import Sequence


def percent(share: float, digits: int = 2) -> str:
    """0.0449 -> "4.49"."""
    return f"{100 * share:.{digits}f}"


def mean_and_std(numbers: Sequence[float], digits: int = 2, factor: float = 100.0) -> str:
    """Formats mean ± sample standard deviation, times a factor; a single number without ±.

    With the default factor, shares become percent.
    """
    mean = f"{factor * statistics.mean(numbers):.{digits}f}"
    if len(numbers) < 2:
        return mean
    return f"{mean} ± {factor * statistics.stdev(numbers):.{digits}f}"


def beyond_error_bars(first: Sequence[float], second: Sequence[float]) -> int | None:
    """Compares two means with the error bars of both.

    Returns -1 or 1 where the first mean is smaller or larger than the second by more than the sum
    of the two sample standard deviations; 0 where the error bars overlap; None where one of the two
    is a single number, which has no deviation.
    """
    if min(len(first), len(second)) < 2:
        return None
    difference = statistics.mean(first) - statistics.mean(second)
    if abs(difference) <= statistics.stdev(first) + statistics.stdev(second):
        return 0
    return 1 if difference > 0 else -1
