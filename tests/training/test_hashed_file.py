"""A file is hashed and brought to the disk while it is written, whatever its parts are."""

import errno
import hashlib
import os
import threading

import numpy as np
import pytest
import torch

from utils.training import hashed_file
from utils.training.hashed_file import SMALL, HashedFile


def described(path):
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("piece", [1, 1000, 200_000, 64 << 20])
@pytest.mark.parametrize("taken", [1, 7000, 1 << 40])
def test_parts_of_all_kinds_arrive_in_order(tmp_path, monkeypatch, piece, taken):
    """A system may take fewer bytes than it was given, in the middle of a part."""
    original = os.writev

    def takes_some(descriptor, parts):
        return original(descriptor, [b"".join(parts)[: max(taken, sum(map(len, parts)) // 3)]])

    monkeypatch.setattr(os, "writev", takes_some)
    monkeypatch.setattr(hashed_file, "PIECE", piece)
    large = torch.randn(SMALL)
    parts = [
        b"head",
        b"",
        large.numpy(),
        bytearray(b"x" * 5),
        large[5:].numpy(),
        b"y" * (SMALL + 1),
        np.float64([1, 2]),
    ]
    with HashedFile(tmp_path / "file", [large, large[3:]]) as file:
        for part in parts:
            assert file.write(part) == memoryview(part).nbytes
    assert (tmp_path / "file").read_bytes() == b"".join(memoryview(part).tobytes() for part in parts)
    assert file.finish() == described(tmp_path / "file")
    assert str(file) == str(tmp_path / "file")


def test_more_parts_than_the_system_takes_at_once(tmp_path):
    tensors = [torch.full((SMALL,), float(number)) for number in range(3)]
    with HashedFile(tmp_path / "file", tensors) as file:
        for number in range(1500):
            file.write(tensors[number % 3].numpy())
            file.write(b"between")
    assert file.finish() == described(tmp_path / "file")
    assert file.bytes == 1500 * (4 * SMALL + 7)


def test_what_lasts_is_not_copied_and_what_does_not_is(tmp_path):
    lasting, passing = torch.zeros(SMALL), torch.zeros(SMALL)
    with HashedFile(tmp_path / "file", [lasting]) as file:
        file.write(lasting.numpy())
        file.write(passing.numpy())
        lasting.fill_(1)
        passing.fill_(1)
    file.finish()
    assert (tmp_path / "file").read_bytes() == torch.cat([lasting, 0 * passing]).numpy().tobytes()


def test_tensors_without_plain_memory_do_no_harm(tmp_path):
    odd = [torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(0)]
    with HashedFile(tmp_path / "file", odd) as file:
        torch.save({"sparse": odd[0], "large": torch.arange(100_000)}, file)
    assert file.finish() == described(tmp_path / "file")
    assert torch.equal(torch.load(tmp_path / "file", weights_only=True)["large"], torch.arange(100_000))


def test_a_flush_to_the_disk_that_fails_is_told(tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    with HashedFile(tmp_path / "file") as file:
        file.write(b"content")
        monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        file.finish()


@pytest.mark.parametrize("before", [False, True])
def test_a_disk_that_takes_nothing_ends_the_threads_and_closes_the_file(tmp_path, monkeypatch, before):
    def full(descriptor, parts):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    before_it = set(threading.enumerate())
    with pytest.raises(OSError, match="No space left"), HashedFile(tmp_path / "file") as file:
        file.write(b"content")
        if before:
            file.flush()
    assert set(threading.enumerate()) <= before_it, "nothing reads the tensors any more"
    assert file._stream.closed


def test_a_system_that_cannot_be_asked_to_write_early_is_left_alone(tmp_path, monkeypatch):
    def refuses(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", refuses, raising=False)
    with HashedFile(tmp_path / "one") as file:
        file.write(b"content")
    assert file.finish() == described(tmp_path / "one")
    monkeypatch.delattr(os, "posix_fadvise")
    with HashedFile(tmp_path / "two") as file:
        file.write(b"content")
    assert file.finish() == described(tmp_path / "two")
