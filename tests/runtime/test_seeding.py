"""Streams come from coordinates, and a block on its own streams leaves none behind."""

import random

import numpy as np
import pytest
import torch

from utils.runtime.seeding import derive_seed, isolated_streams, restore_streams, seed_streams, stream_states


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seed_is_fixed_for_all_time():
    # A change here would make every saved run resume with other numbers.
    assert derive_seed(0) == derive_seed(0)
    assert 0 <= derive_seed(0, "batch", 7) < 2**63


def test_coordinates_are_told_apart_by_value_type_and_grouping():
    coordinates = [(1,), ("1",), (1, 2), (12,), ("1", 2), (2, 1), ("a", "b"), ("ab",), ("a\x1fb",), ()]
    assert len({derive_seed(*parts) for parts in coordinates}) == len(coordinates)


def test_seeded_streams_repeat():
    seed_streams(3, "x")
    first = draw()
    seed_streams(3, "x")
    assert draw() == first
    seed_streams(3, "y")
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_states_can_be_restored():
    states = stream_states()
    first = draw()
    draw()
    restore_streams(states)
    assert draw() == first


def test_a_block_has_its_own_streams_and_leaves_the_callers_alone():
    seed_streams(1)
    expected = draw()
    seed_streams(1)
    with isolated_streams(5):
        inside = draw()
    assert draw() == expected
    with isolated_streams(5):
        assert draw() == inside


def test_a_block_without_coordinates_continues_the_present_streams():
    seed_streams(1)
    expected = draw()
    seed_streams(1)
    with isolated_streams():
        assert draw() == expected
    assert draw() == expected


def test_streams_are_restored_after_an_error():
    seed_streams(1)
    expected = draw()
    seed_streams(1)
    with pytest.raises(ZeroDivisionError), isolated_streams(9):
        1 / 0  # noqa: B018
    assert draw() == expected
