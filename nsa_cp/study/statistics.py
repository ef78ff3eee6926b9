"""Means over seeds, paired differences between arms, and their 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T_95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


class Interval(NamedTuple):
    """A mean and its 95% interval; low and high are infinite for a single value."""

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values and its 95% t interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values: a mean needs at least 1")
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    # Beyond the table the quantile falls further towards 1.96; its last entry gives an interval that is slightly too wide.
    half = _T_95[min(count - 1, len(_T_95)) - 1] * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Mean of ``ours - theirs``, pair by pair, and its 95% interval.

    Raises:
        ValueError: unequal numbers of values, or none.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}; give one for each seed")
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def verdict(difference: Interval, margin: float, higher_is_better: bool) -> str:
    """Whether ours is worse by at most ``margin``: ``shown``, ``refuted`` (worse by more), or ``open`` (the interval holds both).

    Args:
        difference: ours minus theirs.
    """
    worst, best = (difference.low, difference.high) if higher_is_better else (-difference.high, -difference.low)
    if worst >= -margin:
        return "shown"
    return "refuted" if best < -margin else "open"
