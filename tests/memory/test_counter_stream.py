from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.memory.counter_stream import CounterStream, drawn


def test_the_words_are_those_of_philox():
    expected = np.random.Philox(key=77).random_raw(50)
    assert (CounterStream().words(77, 0, 50) == expected).all()


@given(st.integers(0, 2**63), st.integers(0, 2**40), st.integers(0, 30), st.integers(0, 30))
def test_a_stream_is_the_same_however_it_is_cut(key, start, first, second):
    stream = CounterStream()
    whole = stream.words(key, start, first + second)
    stream.words(key + 1, 3, 5)
    assert (np.concatenate([stream.words(key, start, first), stream.words(key, start + first, second)]) == whole).all()


def test_uniforms_are_uniform():
    uniforms = CounterStream().uniforms(5, 0, 100_000)
    assert uniforms.min() >= 0 and uniforms.max() < 1
    counts = np.bincount((uniforms * 20).astype(int), minlength=20)
    # Chi-squared with 19 degrees of freedom is above 50 once in ten thousand times.
    assert ((counts - 5000) ** 2 / 5000).sum() < 50


@pytest.mark.parametrize("total", [4, 200])
def test_every_place_is_drawn_equally_often(total):
    """Both ways to draw: 3 of 4 by sorting, 3 of 200 by drawing on until all are different."""
    stream, counts, first, rounds = CounterStream(), np.zeros(total), np.zeros(total), 20_000
    for key in range(rounds):
        places = drawn(stream, key, 3, total)
        assert len(set(places.tolist())) == 3
        counts[places] += 1
        first[places[0]] += 1
    assert np.abs(counts - 3 * rounds / total).max() < 5 * np.sqrt(3 * rounds / total)
    assert np.abs(first - rounds / total).max() < 5 * np.sqrt(rounds / total)


def test_weighted_places_come_in_the_order_of_successive_sampling():
    """Closed form: the first with w / sum, the next with w / (sum of those left)."""
    weights, stream, rounds = np.array([1.0, 2.0, 5.0]), CounterStream(), 20_000
    counts = dict.fromkeys(permutations(range(3)), 0)
    for key in range(rounds):
        counts[tuple(drawn(stream, key, 3, 3, weights).tolist())] += 1
    for (first, second, _), count in counts.items():
        expected = rounds * weights[first] / 8 * weights[second] / (8 - weights[first])
        assert abs(count - expected) < 5 * np.sqrt(expected)


def test_places_without_weight_come_last_and_in_random_order():
    stream = CounterStream()
    weights = np.array([0.0, 3.0, 0.0, 0.0])
    draws = [drawn(stream, key, 3, 4, weights).tolist() for key in range(200)]
    assert all(draw[0] == 1 for draw in draws)
    assert {draw[1] for draw in draws} == {0, 2, 3}
    assert {int(drawn(stream, key, 1, 4, np.zeros(4))[0]) for key in range(100)} == {0, 1, 2, 3}


def test_extreme_weights_are_no_trouble():
    places = drawn(CounterStream(), 1, 3, 3, np.array([1e-300, 1e308, 5e-324]))
    assert places[0] == 1 and sorted(places.tolist()) == [0, 1, 2]
