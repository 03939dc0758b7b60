"""Means with their uncertainty; a few of many values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Value = TypeVar("Value")


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval."""

    mean: float
    """Mean over the samples."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    count: int
    """Number of samples."""

    def __str__(self) -> str:
        return f"{self.mean:.3g} (95% {self.low:.3g} to {self.high:.3g}, n = {self.count})"


def mean_interval(values: np.ndarray) -> Interval:
    """Return the mean of independent values with Student's t interval, which holds for few of them too.

    Args:
        values: ``(n,)``; a single one has an interval without ends.

    Raises:
        ValueError: There is no value.
    """
    from scipy.special import stdtrit

    count = len(values)
    if not count:
        raise ValueError("An interval needs at least one value.")
    mean = float(values.mean())
    half = float(stdtrit(count - 1, 0.975) * values.std(ddof=1) / np.sqrt(count)) if count > 1 else float("inf")
    return Interval(mean, mean - half, mean + half, count)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Spearman's rank correlation with average ranks for ties, or None when one side is constant.

    Values closer than a millionth of the largest count as ties: rounding has no ranks.
    """

    def ranks(values: np.ndarray) -> np.ndarray:
        steps = np.round(values / max(float(np.abs(values).max(initial=0.0)), 1e-300) * 1e6)
        _, inverse, counts = np.unique(steps, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        average: np.ndarray = (ends - (counts - 1) / 2)[inverse.ravel()]
        return average

    a, b = ranks(first), ranks(second)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def thinned(values: Sequence[Value], count: int = 8) -> list[Value]:
    """Return about `count` values at most, evenly spaced, the first and the last included."""
    step = max(1, math.ceil(len(values) / count))
    return [*values[::step], *(values[-1:] if (len(values) - 1) % step else ())]
