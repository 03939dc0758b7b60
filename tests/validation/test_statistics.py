"""Intervals and rank correlation, beside scipy's."""

import numpy as np
import pytest
from scipy import stats

from utils.validation.statistics import mean_interval, rank_correlation, thinned


@pytest.mark.parametrize("count", [2, 4, 16])
def test_interval_covers_the_mean_as_often_as_it_says(count):
    """In 1000 experiments the 95% interval holds the true mean about 95% of the time, for two draws as well."""
    generator = np.random.default_rng(0)
    found = [mean_interval(generator.normal(3, 2, count)) for _ in range(1000)]
    covered = np.mean([interval.low <= 3 <= interval.high for interval in found])
    assert 0.93 <= covered <= 0.97


def test_interval_equals_scipy():
    """Student's t, two-sided."""
    values = np.random.default_rng(1).normal(size=12)
    low, high = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_interval_of_equal_values_is_a_point():
    """Nothing varies, so nothing is uncertain."""
    interval = mean_interval(np.full(5, 0.25))
    assert (interval.mean, interval.low, interval.high, interval.count) == (0.25, 0.25, 0.25, 5)
    assert str(interval) == "0.25 (95% 0.25 to 0.25, n = 5)"


def test_no_values_is_an_error():
    """A mean of nothing."""
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval(np.array([]))


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_equals_scipy(ties):
    """With and without ties."""
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=30), generator.normal(size=30)
    if ties:
        a, b = a.round(), b.round()
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_rank_correlation_needs_variation():
    """One constant side has no ranks."""
    assert rank_correlation(np.ones(4), np.arange(4.0)) is None


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17, 100])
def test_a_few_of_many_keep_both_ends(count):
    """Evenly spaced, and never more than one above what was asked for."""
    few = thinned(list(range(count)), 8)
    assert few[0] == 0 and few[-1] == count - 1 and len(few) <= 9 and few == sorted(set(few))
