"""Sizes read well, and memory is what the system says."""

import numpy as np
import pytest
import torch

from utils.runtime import resources
from utils.runtime.resources import format_bytes, format_count


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (14.2e9, "14.2 GB"), (2.5e12, "2.5 TB"), (9e15, "9000.0 TB")],
)
def test_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (124.4e6, "124.4M"), (7e9, "7.0B"), (2e12, "2.0T")]
)
def test_counts(count, text):
    assert format_count(count) == text


def test_available_memory_is_part_of_the_total():
    assert 0 < resources.available_memory() <= resources.total_memory()


def test_a_control_group_limits_the_total(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")

    def fake(name):
        return limit if name == "/sys/fs/cgroup/memory.max" else tmp_path / "absent"

    monkeypatch.setattr(resources, "Path", fake)
    assert resources.total_memory() == 1_000_000
    assert resources.available_memory() == 1_000_000
    limit.write_text("max\n")
    assert resources.total_memory() > 1_000_000


def test_peak_memory_grows_with_use():
    before = resources.peak_memory()
    block = np.ones(max(before, 100_000_000) // 8, dtype=np.float64)
    assert resources.peak_memory() > before
    assert block[-1] == 1


def test_device_has_a_name_and_memory():
    device = torch.device("cpu")
    assert "CPU" in resources.device_name(device)
    assert "thread" in resources.device_name(device)
    assert resources.device_memory(device) == resources.total_memory()
    assert resources.best_device().type in ("cpu", "cuda")


@pytest.mark.gpu
def test_cuda_device_has_a_name_and_memory():
    device = resources.best_device()
    assert device.type == "cuda"
    assert resources.device_memory(device) > 1e9
    assert resources.device_name(device)
