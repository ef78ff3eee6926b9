"""Intervals and verdicts against sums done by hand."""

from __future__ import annotations

import math

import pytest

from nsa_cp.study.statistics import Interval, mean_interval, paired_difference, verdict


def test_an_interval_by_hand() -> None:
    # Differences 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7; t of 2 degrees 4.3027; half width 4.3027 * sqrt(7 / 3) = 6.5725.
    interval = paired_difference([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert interval.mean == pytest.approx(3.0) and interval.count == 3
    assert interval.high - 3.0 == pytest.approx(6.5725, abs=1e-4) and 3.0 - interval.low == pytest.approx(6.5725, abs=1e-4)


def test_pairing_takes_out_what_seeds_share() -> None:
    ours, theirs = [0.1, 0.5, 0.9], [0.0, 0.4, 0.8]
    paired = paired_difference(ours, theirs)
    assert paired.high - paired.low < 1e-9 < mean_interval(ours).high - mean_interval(ours).low


def test_one_value_says_nothing_about_the_spread() -> None:
    assert mean_interval([2.0]) == Interval(2.0, -math.inf, math.inf, 1)


def test_many_values_use_the_last_quantile() -> None:
    values = [float(i % 2) for i in range(100)]
    half = mean_interval(values).high - 0.5
    assert half == pytest.approx(2.0423 * math.sqrt(sum((v - 0.5) ** 2 for v in values) / 99 / 100))


def test_no_values_and_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        mean_interval([])
    with pytest.raises(ValueError, match="2 values cannot be paired with 1"):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "expected"),
    [
        (-0.009, 0.02, True, "shown"),
        (-0.02, 0.02, True, "open"),
        (-0.03, -0.02, True, "refuted"),
        (-0.02, 0.009, False, "shown"),
        (-0.02, 0.02, False, "open"),
        (0.02, 0.03, False, "refuted"),
        (-math.inf, math.inf, True, "open"),
    ],
)
def test_no_worse_by_more_than_a_hundredth(low: float, high: float, higher_is_better: bool, expected: str) -> None:
    assert verdict(Interval(0.0, low, high, 3), 0.01, higher_is_better) == expected
