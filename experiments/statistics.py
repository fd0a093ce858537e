"""Means and deviations, as tables show them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def percent(share: float, digits: int = 2) -> str:
    """0.0449 -> "4.49"."""
    return f"{100 * share:.{digits}f}"


def mean_and_std(shares: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation in percent; of a single number, the number."""
    mean = percent(statistics.mean(shares), digits)
    if len(shares) < 2:
        return mean
    return f"{mean} ± {percent(statistics.stdev(shares), digits)}"
