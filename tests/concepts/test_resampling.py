import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from utils.concepts.resampling import Resamples, plain_metric, weighted_metric


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 40))
def test_weighted_metrics_are_those_of_repeated_samples(seed, count):
    random = np.random.default_rng(seed)
    scores = torch.tensor(random.integers(-3, 4, count)).float()
    labels = torch.tensor(np.arange(count) % 2 == 0)
    weights = torch.tensor(random.integers(0, 3, (3, count)))
    found = {name: weighted_metric(name, scores, labels, weights) for name in ("auroc", "balanced_accuracy")}
    for row, times in enumerate(weights):
        chosen = torch.repeat_interleave(torch.arange(count), times)
        if len(labels[chosen].unique()) < 2:
            assert math.isnan(found["auroc"][row])
            continue
        assert float(found["auroc"][row]) == pytest.approx(roc_auc_score(labels[chosen], scores[chosen]))
        expected = balanced_accuracy_score(labels[chosen], scores[chosen] > 0)
        assert float(found["balanced_accuracy"][row]) == pytest.approx(expected)


def test_draws_keep_the_size_of_each_side_and_clusters_together():
    strata = torch.tensor([0, 0, 0, 1, 1])
    draws = Resamples(list("abcde"), strata, 5, 200, 0)
    assert bool((draws.samples[:, :3].sum(1) == 3).all())
    assert bool((draws.samples[:, 3:].sum(1) == 2).all())
    assert torch.allclose(draws.students.sum(1), torch.ones(200, dtype=torch.float64))
    mixed = Resamples(list("aabbc"), torch.tensor([0, 1, 0, 1, 0]), 5, 200, 0)
    assert torch.equal(mixed.samples[:, 0], mixed.samples[:, 1])
    assert torch.equal(mixed.samples[:, 2], mixed.samples[:, 3])
    assert not bool((mixed.samples.sum(1) == 5).all())
    assert torch.equal(Resamples(list("abcde"), strata, 5, 200, 0).samples, draws.samples)


def test_an_interval_over_five_students_is_as_wide_as_students_t():
    values = torch.tensor([0.2, 0.9, 0.4, 0.6, 0.5], dtype=torch.float64)
    draws = Resamples([str(n) for n in range(50)], torch.zeros(50, dtype=torch.int64), 5, 10_000, 0)
    table = values[:, None].expand(5, 50).clone()
    found = draws.interval(float(values.mean()), draws.means(table))
    half = 2.776 * float(values.std()) / 5**0.5
    assert found.mean == pytest.approx(0.52)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.25)


def test_one_more_thing_of_a_kind_is_where_five_say_it_is():
    """Student's predictive interval, and 0 in it as often as it says where a sixth is of the same kind."""
    draws = Resamples([str(n) for n in range(50)], torch.zeros(50, dtype=torch.int64), 5, 4000, 0)
    drawn = torch.randn(300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held, widths = 0, []
    for row in drawn:
        five = row[:5]
        others = draws.single(five.tolist(), draws.students @ five)
        found = draws.interval(float(row[5] - five.mean()), row[5] - others)
        held += found.low <= 0 <= found.high
        widths.append((found.high - found.low) / float(five.std()))
    assert 0.92 <= held / len(drawn) <= 0.98
    assert sum(widths) / len(widths) == pytest.approx(2 * 2.776 * (1 + 1 / 5) ** 0.5, rel=0.1)


def test_means_of_some_samples_leave_out_draws_without_them():
    draws = Resamples(list("abcd"), torch.zeros(4, dtype=torch.int64), 5, 500, 0)
    table = torch.ones(5, 4, dtype=torch.float64)
    found = draws.means(table, torch.tensor([True, False, False, False]))
    assert bool(torch.isnan(found).any())
    interval = draws.interval(1.0, found)
    assert (interval.low, interval.high) == (1, 1)
    assert plain_metric("auroc", torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 1
