"""The state of a buffer: what comes back, and what is refused."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.buffers import POLICIES, add, whole
from utils.memory import EpisodicBuffer
from utils.runtime.errors import CheckpointError


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=5), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.booleans())
def test_a_restored_buffer_goes_on_bit_for_bit(policy, before, after, holes):
    buffer = EpisodicBuffer(12, policy=policy, seed=1)
    for rows in before:
        add(buffer, rows, buffer.seen, time=rows)
        buffer.sample(4, rows)
    if holes:
        buffer.remove(buffer.slots[::3])
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    again = EpisodicBuffer(12, policy=policy, seed=1)
    add(again, 40)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert whole(again) == whole(buffer)
    for rows in after:
        assert torch.equal(add(again, rows, again.seen), add(buffer, rows, buffer.seen))
        one, other = again.sample(5, rows), buffer.sample(5, rows)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole(again) == whole(buffer)


def test_the_state_is_plain_and_a_copy():
    def is_plain(value):
        if isinstance(value, dict):
            return all(type(key) is str and is_plain(part) for key, part in value.items())
        return value is None or type(value) in (int, float, str, torch.Tensor)

    for policy in POLICIES:
        buffer = EpisodicBuffer(6, policy=policy)
        add(buffer, 40)
        state = buffer.state_dict()
        assert is_plain(state)
        numbers = state["fields"]["number"].clone()
        add(buffer, 200, 40)
        buffer.sample(6, 0)
        assert torch.equal(state["fields"]["number"], numbers) and int(state["about"]["rehearsals"].sum()) == 0


def test_a_buffer_that_shrank_is_restored_as_it_was():
    buffer = EpisodicBuffer(16, max_bytes=1600)
    add(buffer, 30)
    buffer.widen("logits", 9)
    again = EpisodicBuffer(16, max_bytes=1600)
    again.load_state_dict(buffer.state_dict())
    assert whole(again) == whole(buffer)


def test_a_buffer_from_another_tokenizer_or_run_is_refused():
    buffer = EpisodicBuffer(6, source="tokenizer a")
    buffer.add({"input_ids": torch.zeros(6, 4, dtype=torch.int32)})
    other = EpisodicBuffer(6, source="tokenizer b")
    other.add({"input_ids": torch.ones(3, 8, dtype=torch.int64)})
    before = whole(other)
    with pytest.raises(CheckpointError, match="made with 'tokenizer a'.*'tokenizer b'.*another tokenizer"):
        other.load_state_dict(buffer.state_dict())
    with pytest.raises(CheckpointError, match="'an unnamed source'"):
        EpisodicBuffer(6).load_state_dict(buffer.state_dict())
    for changed in ({"capacity": 7}, {"seed": 1}, {"policy": "balanced"}, {"max_bytes": 10**6}):
        with pytest.raises(CheckpointError, match="saved buffer has the settings"):
            EpisodicBuffer(**({"capacity": 6, "source": "tokenizer a"} | changed)).load_state_dict(buffer.state_dict())
    assert whole(other) == before


def break_slots(state):
    state["slots"][0] = state["slots"][1]


def break_rows(state):
    state["fields"]["logits"] = state["fields"]["logits"][:-1]


def break_column(state):
    state["about"]["times"] = state["about"]["times"][:-1]


def break_arrivals(state):
    state["about"]["arrivals"][2] = -1


def break_groups(state):
    state["rule"]["ids"] += 1


def break_capacity(state):
    state["capacity"] = 100


def break_seen(state):
    state["seen"] = 3


def break_settings(state):
    del state["settings"]


def break_fields(state):
    del state["fields"]


@pytest.mark.parametrize(
    "break_it",
    [
        break_slots,
        break_rows,
        break_column,
        break_arrivals,
        break_groups,
        break_capacity,
        break_seen,
        break_settings,
        break_fields,
    ],
)
def test_a_state_that_does_not_hold_together_is_refused(break_it):
    buffer = EpisodicBuffer(8, policy="balanced")
    add(buffer, 30)
    before = whole(buffer)
    state = buffer.state_dict()
    break_it(state)
    with pytest.raises(CheckpointError, match="state of the buffer does not hold together"):
        buffer.load_state_dict(state)
    assert whole(buffer) == before
