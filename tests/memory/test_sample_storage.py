"""Samples that are refused, types, files."""

import sys

import pytest
import torch

from tests.memory.buffers import CLASSES, POLICIES, add, batch_of, whole
from utils.memory import EpisodicBuffer
from utils.memory.sample_storage import DTYPES
from utils.runtime.errors import DataError

NAN = torch.tensor([[1.0], [float("nan")]])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "samples are empty"),
        (torch.zeros(2), "samples are one tensor"),
        ({3: torch.zeros(2)}, "samples are named 3"),
        ({"x": [1.0, 2.0]}, "'x' of the samples is of the type list"),
        ({"x": torch.zeros(2, 1).to_sparse()}, "'x' of the samples is a tensor without values"),
        ({"x": torch.zeros(2, 1), "slots": torch.zeros(2)}, "field named 'slots'"),
        ({"x": torch.zeros(2, 1), "y": torch.zeros(2)}, r"fields \['x', 'y'\].*Expected \['x'\]"),
        ({"x": torch.zeros(2, 2)}, r"'x' has samples of float32 \[2\].*Expected float32 \[1\]"),
        ({"x": torch.zeros(2, 1, dtype=torch.float64)}, r"samples of float64 \[1\]"),
        ({"x": torch.zeros(2, 1, dtype=torch.complex64)}, "type torch.complex64"),
        ({"x": torch.tensor(1.0)}, r"shape \[\]"),
        ({"x": NAN}, "not finite, in 1 of 2 samples.*masked logits store zeros"),
        ({"x": NAN.nan_to_num(float("inf"))}, "not finite, in 1 of 2"),
    ],
)
def test_samples_that_do_not_fit_leave_the_buffer_as_it_was(samples, message):
    buffer = EpisodicBuffer(3)
    buffer.add({"x": torch.arange(5.0)[:, None]})
    before = whole(buffer)
    with pytest.raises(DataError, match=message):
        buffer.add(samples)
    assert whole(buffer) == before


def test_rows_that_disagree_and_groups_that_are_no_numbers_are_refused():
    buffer, x = EpisodicBuffer(3, policy="balanced"), {"x": torch.zeros(2)}
    with pytest.raises(DataError, match=r"'y' has the shape \[3\].*each of the 2 samples"):
        buffer.add({"x": torch.zeros(2), "y": torch.zeros(3)}, groups=torch.zeros(2).long())
    with pytest.raises(DataError, match="groups are missing"):
        buffer.add(x)
    for groups in (torch.zeros(2), torch.zeros(3).long(), torch.zeros(2, dtype=torch.bool), [0, 1]):
        with pytest.raises(DataError, match=r"groups are .*Expected a tensor of whole numbers of the shape \[2\]"):
            buffer.add(x, groups=groups)
    for values in (torch.tensor([1.0, -1.0]), torch.tensor([1.0, float("inf")])):
        with pytest.raises(DataError, match="entries that are negative or not finite"):
            buffer.add(x, groups=torch.zeros(2).long(), priorities=values)
    with pytest.raises(DataError, match="priorities of 2 samples are missing"):
        EpisodicBuffer(3, policy="priority").add(x)
    with pytest.raises(DataError, match=r"shape \[1\]"):
        EpisodicBuffer(3, policy="priority").add(x, priorities=torch.ones(1))
    assert len(buffer) == 0 and buffer.layouts == {}


def test_large_numbers_are_finite_though_their_sum_is_not():
    buffer = EpisodicBuffer(3)
    buffer.add({"x": torch.full((3, 4), 3e38), "y": torch.full((3,), 6e4, dtype=torch.float16)})
    assert len(buffer) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_stored_and_widened(dtype, tmp_path):
    values = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype)
    for directory in (None, tmp_path):
        buffer = EpisodicBuffer(3, directory=directory)
        buffer.add({"x": values})
        buffer.widen("x", 4, fill=1)
        assert torch.equal(buffer.read(buffer.slots)["x"], torch.cat([values, torch.ones(3, 2, dtype=dtype)], 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_samples_may_come_from_a_gpu():
    here, there = EpisodicBuffer(6, policy="balanced"), EpisodicBuffer(6, policy="balanced")
    for start in range(0, 40, 20):
        groups = torch.arange(20) % CLASSES
        on_device = {name: values.cuda() for name, values in batch_of(20, start).items()}
        slots = here.add(batch_of(20, start), groups=groups)
        assert torch.equal(there.add(on_device, groups=groups.cuda(), priorities=torch.ones(20).cuda()), slots)
    there.update(there.slots, {"logits": torch.zeros(6, 3).cuda()})
    here.update(here.slots, {"logits": torch.zeros(6, 3)})
    assert whole(here) == whole(there)
    assert all(values.device.type == "cpu" for values in there.sample(4, 0).values())


@pytest.mark.parametrize("policy", POLICIES)
def test_files_and_main_memory_hold_the_same_bit_for_bit(policy, tmp_path):
    memory = EpisodicBuffer(15, policy=policy, seed=4)
    disk = EpisodicBuffer(15, policy=policy, seed=4, directory=tmp_path / "new" / "folder")
    for start in range(0, 100, 20):
        assert torch.equal(add(memory, 20, start), add(disk, 20, start))
        for one, other in zip(memory.sample(6, start).values(), disk.sample(6, start).values(), strict=True):
            assert torch.equal(one, other)
    memory.widen("logits", 5)
    disk.widen("logits", 5)
    assert whole(memory) == whole(disk)
    if sys.platform == "linux":
        assert list((tmp_path / "new" / "folder").iterdir()) == []
        with open("/proc/self/maps") as maps:
            assert str(tmp_path / "new" / "folder") in maps.read()
    state = disk.state_dict()
    again = EpisodicBuffer(15, policy=policy, seed=4, directory=tmp_path / "other")
    again.load_state_dict(state)
    assert whole(again) == whole(disk)


def test_a_directory_that_cannot_hold_it_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    buffer = EpisodicBuffer(5, directory=tmp_path / "file")
    with pytest.raises(DataError, match="no place for a file of .* bytes.*Make room"):
        add(buffer, 3)
    assert len(buffer) == 0 and buffer.seen == 0
    huge = EpisodicBuffer(1 << 50, directory=tmp_path)
    with pytest.raises(DataError, match="no place for a file"):
        huge.add({"x": torch.zeros(2, 100)})
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
