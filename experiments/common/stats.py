"""Means, deviations and paired differences, as tables show them."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import scipy.stats


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


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean difference of two methods over the seeds that both have.

    Attributes:
      mean: of first − second, seed by seed.
      half_width: of its 95 % confidence interval by the paired t-test, t₀.₉₇₅ · s / √n; None for a
        single pair.
      pairs: n.
    """

    mean: float
    half_width: float | None
    pairs: int

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval is on that side of 0; else 0, undecided."""
        if self.half_width is None or abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Compares two methods, seed -> number each; None if they have no seed in common."""
    differences = [first[seed] - second[seed] for seed in first if seed in second]
    if not differences:
        return None
    count, half_width = len(differences), None
    if count > 1:
        error = statistics.stdev(differences) / math.sqrt(count)
        half_width = float(scipy.stats.t.ppf(0.975, count - 1)) * error
    return Difference(statistics.mean(differences), half_width, count)


def describe_points(difference: Difference, digits: int = 2, factor: float = 100.0) -> str:
    """Formats a difference and its interval: "3.69 ± 0.42 points (n = 3)"."""
    text = f"{factor * difference.mean:.{digits}f}"
    if difference.half_width is not None:
        text += f" ± {abs(factor) * difference.half_width:.{digits}f}"
    undecided = ", undecided" * (difference.pairs > 1 and difference.sign == 0)
    return f"{text} points (n = {difference.pairs}{undecided})"
