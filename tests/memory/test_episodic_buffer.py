import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.buffers import CLASSES, POLICIES, add, batch_of, is_consistent, whole
from utils.memory import EpisodicBuffer
from utils.runtime.errors import ConfigError, DataError


@pytest.mark.parametrize("policy", POLICIES)
def test_samples_stay_whole(policy):
    buffer = EpisodicBuffer(20, policy=policy)
    for start in range(0, 300, 30):
        slots = add(buffer, 30, start, time=start)
        kept = slots[slots >= 0]
        assert torch.equal(buffer.read(kept)["number"], torch.arange(start, start + 30)[slots >= 0])
    assert len(buffer) == 20 and buffer.seen == 300 and is_consistent(buffer)
    about = buffer.about()
    assert torch.equal(about["times"], about["arrivals"] // 30 * 30)
    assert sum(buffer.counts.values()) == 20


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.one_of(st.none(), st.integers(2, 30)),
    st.integers(250, 6000),
    st.lists(st.tuples(st.sampled_from(["add", "update", "widen", "remove", "sample"]), st.integers(1, 40))),
)
def test_the_bytes_are_never_exceeded(policy, capacity, most, actions):
    buffer = EpisodicBuffer(capacity, max_bytes=most, policy=policy)
    number = 0
    for step, (action, size) in enumerate(actions):
        before = whole(buffer)
        try:
            if action == "add":
                samples = batch_of(size, buffer.seen) | {
                    name: torch.zeros(size, *layout.shape)
                    for name, layout in buffer.layouts.items()
                    if name.startswith("new")
                }
                width = buffer.layouts["logits"].shape[0] if buffer.layouts else 3
                samples["logits"] = torch.nn.functional.pad(samples["logits"], (0, width - 3))
                numbers = samples["number"]
                buffer.add(samples, groups=numbers % CLASSES, priorities=numbers.float())
            elif action == "update":
                number += 1
                buffer.update(buffer.slots, {f"new{number}": torch.zeros(len(buffer), size)})
            elif action == "widen" and buffer.layouts:
                buffer.widen("logits", buffer.layouts["logits"].shape[0] + size)
            elif action == "remove":
                buffer.remove(buffer.slots[:size])
            elif len(buffer):
                buffer.sample(size, step)
        except DataError:
            assert whole(buffer) == before
        held = buffer.read(buffer.slots)
        assert buffer.nbytes <= most
        assert len(buffer) <= (buffer.capacity or 0) <= (capacity or most)
        assert sum(value.numel() * value.element_size() for value in held.values()) <= buffer.nbytes
        assert buffer.about()["arrivals"].tolist() == held.get("number", torch.empty(0)).tolist()


def test_the_smaller_bound_counts():
    x = {"x": torch.zeros(50, 100)}
    by_bytes, by_count = EpisodicBuffer(40, max_bytes=5000), EpisodicBuffer(4, max_bytes=5000)
    only_bytes = EpisodicBuffer(max_bytes=5000)
    assert only_bytes.capacity is None and EpisodicBuffer(7).capacity == 7 and only_bytes.nbytes == 0
    for buffer in (by_bytes, by_count, only_bytes):
        buffer.add(x)
    assert by_bytes.capacity == only_bytes.capacity == 5000 // (400 + 48)
    assert by_count.capacity == len(by_count) == 4
    with pytest.raises(DataError, match="A sample takes 448 bytes in the buffer, which may take 300"):
        EpisodicBuffer(max_bytes=300).add(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither a capacity nor max_bytes"),
        ({"capacity": 0}, "capacity of the buffer is 0"),
        ({"capacity": True}, "capacity of the buffer is True"),
        ({"max_bytes": 1.5}, "max_bytes of the buffer is 1.5"),
        ({"capacity": 5, "policy": "fifo"}, "policy of the buffer is 'fifo'.*reservoir, balanced, priority"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EpisodicBuffer(**options)


def test_nothing_is_taken_from_a_batch_of_nothing():
    buffer = EpisodicBuffer(3)
    assert buffer.add({"x": torch.zeros(0, 4)}).tolist() == []
    assert buffer.seen == 0 and buffer.layouts == {}


def test_samples_are_copies_without_history():
    buffer, x = EpisodicBuffer(3), torch.ones(3, requires_grad=True)
    buffer.add({"x": x * 2})
    batch = buffer.sample(3, 0)
    assert not batch["x"].requires_grad
    batch["x"].zero_()
    assert buffer.read(buffer.slots)["x"].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_draw_is_a_function_of_its_number(policy):
    buffer = EpisodicBuffer(20, policy=policy, seed=3)
    add(buffer, 60)
    torch.manual_seed(0)
    stream = torch.get_rng_state()
    first = buffer.sample(8, 5)
    buffer.sample(8, 6)
    again = buffer.sample(8, 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), stream)
    assert sorted(first) == ["images", "labels", "logits", "number", "slots"]
    assert torch.equal(buffer.read(first["slots"])["number"], first["number"])
    assert len(set(first["slots"].tolist())) == 8
    assert buffer.sample(8, 6)["slots"].tolist() != first["slots"].tolist()
    assert len(buffer.sample(50, 1)["number"]) == 20
    rehearsals = buffer.about()["rehearsals"]
    assert int(rehearsals.sum()) == 8 * 4 + 20
    drawn = torch.zeros(20).long()
    drawn[first["slots"]] += 2
    assert (rehearsals >= drawn + 1).all()


def test_draws_from_some_groups_only():
    buffer = EpisodicBuffer(40)
    buffer.add({"x": torch.arange(40)}, groups=torch.arange(40) % 4)
    assert set((buffer.sample(15, 0, groups=[1, 3])["x"] % 4).tolist()) == {1, 3}
    assert set((buffer.sample(15, 0, groups=torch.tensor([1, 3]))["x"] % 4).tolist()) == {1, 3}
    assert set((buffer.sample(40, 1, without=[0])["x"] % 4).tolist()) == {1, 2, 3}
    assert set((buffer.sample(40, 1, groups=[1, 2], without=[2])["x"] % 4).tolist()) == {1}
    with pytest.raises(DataError, match="5 samples were to be drawn, and none of the 40 in the buffer fits"):
        buffer.sample(5, 0, groups=[9])
    with pytest.raises(
        DataError, match="The number of samples to draw is 0. Expected a whole number, at least 1. Draw"
    ):
        buffer.sample(0, 0)
    with pytest.raises(DataError, match="none of the 0 in the buffer fits"):
        EpisodicBuffer(4).sample(1, 0)


def test_the_highest_priorities_are_drawn_most():
    buffer = EpisodicBuffer(4, policy="priority")
    buffer.add({"x": torch.arange(5)}, priorities=torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5]))
    for draw in range(2000):
        buffer.sample(1, draw)
    shares = buffer.about()["rehearsals"] / 2000
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.04)
    buffer.prioritise(torch.tensor([3, -1, 0]), torch.tensor([0.0, 9.0, 6.0]))
    assert buffer.about()["priorities"].tolist() == [6.0, 2.0, 3.0, 0.0]
    slots = buffer.add({"x": torch.tensor([5])}, priorities=torch.tensor([1.0]))
    assert slots.tolist() == [3] and buffer.about(slots)["rehearsals"].tolist() == [0]


def test_fields_are_updated_where_they_lie():
    buffer = EpisodicBuffer(5)
    slots = add(buffer, 12)
    rows = torch.arange(12.0)[:, None].expand(12, 3)
    kept = slots[slots >= 0]
    assert torch.equal(buffer.update(slots, {"logits": rows}), slots)
    assert torch.equal(buffer.read(kept)["logits"], rows[slots >= 0])
    lie = buffer.update(buffer.slots.flip(0), {"extra": torch.arange(5), "labels": torch.arange(5)})
    assert lie.tolist() == [4, 3, 2, 1, 0]
    held = buffer.read(buffer.slots)
    assert held["extra"].tolist() == held["labels"].tolist() == [4, 3, 2, 1, 0]
    before = whole(buffer)
    for values, message in (
        ({"logits": torch.zeros(5, 4)}, r"samples of float32 \[4\]"),
        ({"labels": torch.zeros(5).long(), "logits": torch.full((5, 3), torch.nan)}, "not finite, in 5 of 5"),
        ({"labels": torch.zeros(2).long()}, "each of the 5 samples"),
        ({"slots": torch.zeros(5)}, "no field named 'slots'"),
    ):
        with pytest.raises(DataError, match=message):
            buffer.update(buffer.slots, values)
    with pytest.raises(DataError, match=r"new fields \['more'\] are given for 2 of 5 samples"):
        buffer.update(torch.tensor([0, 1]), {"more": torch.zeros(2)})
    with pytest.raises(DataError, match="given for 0 of 0 samples"):
        EpisodicBuffer(3).update(torch.empty(0).long(), {"more": torch.zeros(0)})
    assert whole(buffer) == before


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.tensor([0, 7]), r"slots \[7\] hold no sample"),
        (torch.tensor([-2]), r"slots \[-2\] hold no sample"),
        (torch.tensor([3]), r"slots \[3\] hold no sample"),
        (torch.tensor([1, 1]), "given twice"),
        (torch.tensor([1.0]), "slots are a tensor of the type float32"),
        ([1], "slots are of the type list"),
    ],
)
def test_slots_that_hold_nothing_are_refused(slots, message):
    buffer = EpisodicBuffer(5)
    buffer.add({"x": torch.arange(3)})
    before = whole(buffer)
    for act in (buffer.remove, buffer.read, buffer.about, lambda slots: buffer.update(slots, {"x": slots})):
        with pytest.raises(DataError, match=message):
            act(slots)
    assert whole(buffer) == before


def test_what_is_removed_makes_room():
    buffer = EpisodicBuffer(5)
    add(buffer, 50)
    buffer.remove(torch.tensor([1, 3]))
    assert buffer.slots.tolist() == [0, 2, 4] and len(buffer.sample(9, 0)["slots"]) == 3
    assert add(buffer, 2, 50).tolist() == [1, 3]
    assert is_consistent(buffer)
    buffer.remove(buffer.slots)
    assert len(buffer) == 0 and buffer.counts == {} and "number" in buffer.layouts


@pytest.mark.parametrize("most", [None, 1600])
def test_a_field_is_widened_and_put_back(most):
    """With 1,600 bytes, the wider logits cost samples."""
    buffer = EpisodicBuffer(16, max_bytes=most)
    add(buffer, 30)
    capacity = buffer.capacity
    before, tensors = whole(buffer), dict(buffer._content.fields)
    undo = buffer.widen("logits", 9, fill=-1.0)
    held = buffer.read(buffer.slots)
    assert held["logits"].shape == (len(buffer), 9)
    assert (held["logits"][:, 3:] == -1).all()
    assert torch.equal(held["logits"][:, :3], batch_of(30)["logits"][held["number"]])
    assert (len(buffer) < capacity) == (most is not None) and buffer.nbytes <= (most or 1e9)
    undo()
    assert whole(buffer) == before
    assert all(buffer._content.fields[name] is tensor for name, tensor in tensors.items())
    buffer.widen("logits", 3)()
    assert whole(buffer) == before


def test_what_cannot_be_widened_is_refused():
    buffer = EpisodicBuffer(6, max_bytes=900)
    add(buffer, 6)
    before = whole(buffer)
    for name, size, fill, message in (
        ("other", 4, 0.0, r"no field 'other'.*\['images', 'logits'\]"),
        ("labels", 4, 0.0, "no field 'labels' with a dimension"),
        (
            "logits",
            2,
            0.0,
            "The new size of the field 'logits', which is 3 wide, is 2. Expected a whole number, at least 3",
        ),
        ("logits", 4, float("nan"), "filled with nan"),
        ("logits", 4, 1e39, r"filled with 1e\+39.*float32"),
        ("images", 4, 300, "filled with 300"),
        ("logits", 1000, 0.0, "A sample takes .* bytes"),
    ):
        with pytest.raises(DataError, match=message):
            buffer.widen(name, size, fill)
    assert whole(buffer) == before


def test_it_needs_torch_only():
    code = (
        "import sys, utils.memory; heavy = {'lightning', 'torchmetrics', 'faiss', 'transformers', 'matplotlib'};"
        "assert not heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
