"""The three rules against their laws, and against plain loops over one sample after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.memory import EpisodicBuffer
from utils.memory.counter_stream import CounterStream
from utils.runtime.errors import DataError
from utils.runtime.seeding import derive_seed


def stream_of(length, start=0):
    return {"value": torch.arange(start, start + length)}


def held(buffer):
    """The samples by slot."""
    values = buffer.read(buffer.slots).get("value", torch.empty(0))
    return dict(zip(buffer.slots.tolist(), values.tolist(), strict=True))


def cut(total, sizes):
    """Bounds of batches of the given sizes, and of what is left."""
    start = 0
    for size in sizes:
        if start < total:
            yield start, min(start + size, total)
            start += size
    if start < total:
        yield start, total


def loop_reservoir(capacity, total, uniforms):
    kept = {}
    for number in range(total):
        slot = number if number < capacity else int(uniforms[number] * (number + 1))
        if slot < capacity:
            kept[slot] = number
    return kept


def loop_balanced(capacity, groups, uniforms):
    kept, seen, were_largest = {}, {}, set()
    for number, group in enumerate(groups):
        seen[group] = seen.get(group, 0) + 1
        if len(kept) < capacity:
            kept[len(kept)] = number
            continue
        stored = {}
        for slot in sorted(kept):
            stored.setdefault(groups[kept[slot]], []).append(slot)
        most = max(map(len, stored.values()))
        were_largest |= {name for name, slots in stored.items() if len(slots) == most}
        if group in were_largest:
            place = int(uniforms[number] * seen[group])
            if place < len(stored[group]):
                kept[stored[group][place]] = number
        else:
            candidates = sorted(slot for slots in stored.values() if len(slots) == most for slot in slots)
            kept[candidates[int(uniforms[number] * len(candidates))]] = number
    return kept


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(0, 80), st.lists(st.integers(1, 30), max_size=8), st.integers(0, 5))
def test_a_reservoir_is_what_a_plain_loop_keeps(capacity, total, sizes, seed):
    buffer = EpisodicBuffer(capacity, seed=seed)
    for start, stop in cut(total, sizes):
        slots = buffer.add(stream_of(stop - start, start))
        now = held(buffer)
        assert {slot: number for slot, number in now.items() if number >= start} == {
            int(slot): start + row for row, slot in enumerate(slots) if slot >= 0
        }
    uniforms = CounterStream().uniforms(derive_seed(seed, "buffer"), 0, total)
    assert held(buffer) == loop_reservoir(capacity, total, uniforms)
    assert buffer.seen == total


@settings(max_examples=100)
@given(
    st.integers(4, 12),
    st.lists(st.integers(-2, 1), max_size=90),
    st.lists(st.integers(1, 30), max_size=8),
    st.integers(0, 5),
)
def test_a_balanced_buffer_is_what_a_plain_loop_keeps(capacity, groups, sizes, seed):
    buffer = EpisodicBuffer(capacity, policy="balanced", seed=seed)
    for start, stop in cut(len(groups), sizes):
        slots = buffer.add(stream_of(stop - start, start), groups=torch.tensor(groups[start:stop]))
        now = held(buffer)
        assert {slot: number for slot, number in now.items() if number >= start} == {
            int(slot): start + row for row, slot in enumerate(slots) if slot >= 0
        }
    uniforms = CounterStream().uniforms(derive_seed(seed, "buffer"), 0, len(groups))
    assert held(buffer) == loop_balanced(capacity, groups, uniforms)
    about = buffer.about()
    assert about["groups"].tolist() == [groups[number] for number in about["arrivals"].tolist()]


@settings(max_examples=100)
@given(st.integers(1, 12), st.lists(st.integers(0, 6), max_size=80), st.lists(st.integers(1, 30), max_size=8))
def test_a_priority_buffer_holds_the_highest(capacity, priorities, sizes):
    buffer = EpisodicBuffer(capacity, policy="priority")
    for start, stop in cut(len(priorities), sizes):
        buffer.add(stream_of(stop - start, start), priorities=torch.tensor(priorities[start:stop]))
    expected = sorted(range(len(priorities)), key=lambda number: (-priorities[number], number))[:capacity]
    assert sorted(held(buffer).values()) == sorted(expected)
    about = buffer.about()
    assert about["priorities"].tolist() == [priorities[number] for number in about["arrivals"].tolist()]


def test_a_reservoir_keeps_each_sample_with_the_same_probability():
    capacity, total, rounds = 10, 60, 2000
    kept = np.zeros(total)
    for seed in range(rounds):
        buffer = EpisodicBuffer(capacity, seed=seed)
        for start, stop in cut(total, [25, 7]):
            buffer.add(stream_of(stop - start, start))
        kept[list(held(buffer).values())] += 1
    expected, deviation = rounds * capacity / total, np.sqrt(rounds * capacity / total * (1 - capacity / total))
    assert np.abs(kept - expected).max() < 4.5 * deviation
    # The sum of the squares would be too small as well were the draws not independent.
    assert 0.5 < np.mean(((kept - expected) / deviation) ** 2) < 1.6


def test_a_balanced_buffer_is_uniform_within_each_group():
    """An imbalanced stream: 45 of group 0, then 15 of group 1; five of each stay."""
    groups = torch.tensor([0] * 45 + [1] * 15)
    kept, rounds = np.zeros(60), 1500
    for seed in range(rounds):
        buffer = EpisodicBuffer(10, policy="balanced", seed=seed)
        buffer.add(stream_of(60), groups=groups)
        assert buffer.counts == {0: 5, 1: 5}
        kept[list(held(buffer).values())] += 1
    for part, probability in ((kept[:45], 5 / 45), (kept[45:], 5 / 15)):
        assert np.abs(part / rounds - probability).max() < 4.5 * np.sqrt(probability * (1 - probability) / rounds)


@pytest.mark.parametrize("policy", ["reservoir", "balanced", "priority"])
def test_what_is_left_after_shrinking_obeys_the_same_law(policy):
    """Ten places, of which bytes for another field leave six."""
    groups, priorities = torch.tensor([0] * 30 + [1] * 10), torch.arange(40.0) % 17
    kept, rounds = np.zeros(40), 20 if policy == "priority" else 500
    for seed in range(rounds):
        buffer = EpisodicBuffer(10, max_bytes=1000, policy=policy, seed=seed)
        buffer.add(stream_of(40), groups=groups, priorities=priorities)
        assert len(buffer) == 10
        before = held(buffer)
        slots = buffer.slots
        each = buffer.nbytes // 10
        extra = (1000 // 6 - each) // 4
        lie = buffer.update(slots, {"extra": torch.zeros(10, extra)})
        assert len(buffer) == buffer.capacity == 6 and buffer.nbytes <= 1000
        after = held(buffer)
        assert {int(new): before[int(old)] for old, new in zip(slots, lie, strict=True) if new >= 0} == after
        if policy == "balanced":
            assert buffer.counts == {0: 3, 1: 3}
        kept[list(after.values())] += 1
    if policy == "priority":
        highest = sorted(range(40), key=lambda number: (-float(priorities[number]), number))[:6]
        assert np.flatnonzero(kept).tolist() == sorted(highest)
        return
    parts = ((kept, 6 / 40),) if policy == "reservoir" else ((kept[:30], 3 / 30), (kept[30:], 3 / 10))
    for part, probability in parts:
        assert np.abs(part / rounds - probability).max() < 4.5 * np.sqrt(probability * (1 - probability) / rounds)


def test_a_balanced_buffer_smaller_than_the_groups_is_refused_and_survives():
    buffer = EpisodicBuffer(3, policy="balanced")
    buffer.add(stream_of(4), groups=torch.tensor([0, 1, 1, 2]))
    before = held(buffer)
    with pytest.raises(DataError, match="balanced buffer of 3 samples would have to hold 5 groups.*at least 5 samples"):
        buffer.add(stream_of(3, 4), groups=torch.tensor([7, 8, 7]))
    assert held(buffer) == before and buffer.seen == 4
    with pytest.raises(DataError, match="at least one place for each group"):
        EpisodicBuffer(3, policy="balanced").add(stream_of(4), groups=torch.arange(4))
    narrow = EpisodicBuffer(3, max_bytes=600, policy="balanced")
    narrow.add(stream_of(3), groups=torch.arange(3))
    with pytest.raises(DataError, match="balanced buffer of 2 samples would have to hold 3 groups"):
        narrow.update(narrow.slots, {"extra": torch.zeros(3, 45)})
    assert len(narrow) == 3 and sorted(narrow.layouts) == ["value"]


def test_a_group_that_lost_samples_grows_again():
    buffer = EpisodicBuffer(10, policy="balanced")
    buffer.add(stream_of(100), groups=torch.arange(100) % 2)
    ones = buffer.slots[buffer.about()["groups"] == 1]
    buffer.remove(ones[:4])
    assert buffer.counts == {0: 5, 1: 1}
    buffer.add(stream_of(4, 100), groups=torch.zeros(4, dtype=torch.int64))
    assert buffer.counts == {0: 9, 1: 1}
    buffer.add(stream_of(20, 104), groups=torch.ones(20, dtype=torch.int64))
    assert buffer.counts == {0: 5, 1: 5}
    buffer.remove(buffer.slots[buffer.about()["groups"] == 1])
    assert buffer.counts == {0: 5}
    buffer.add(stream_of(5, 124), groups=torch.full((5,), 9))
    assert buffer.counts == {0: 5, 9: 5}
