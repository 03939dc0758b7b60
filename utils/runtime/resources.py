"""What this machine has: memory, device, names."""

import os
import platform
import resource
import sys
from pathlib import Path

import torch


def format_bytes(count: float) -> str:
    """Format a number of bytes with decimal units, for example ``14.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_count(count: float) -> str:
    """Format a count with a suffix, for example ``124.4M``."""
    for suffix in ("", "k", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if suffix == "" else f"{count:.1f}{suffix}"
        count /= 1000
    return f"{count:.1f}T"


def total_memory() -> int:
    """Return the bytes of memory this process may use: the machine's, or its control group's limit if lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit_file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit_file.exists() and (text := limit_file.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def available_memory() -> int:
    """Return the bytes of main memory that are free for a new model."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, total_memory())
    return total_memory()


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def best_device() -> torch.device:
    """Return the first CUDA device if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_memory(device: torch.device) -> int:
    """Return the total bytes of memory on a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_memory()


def device_name(device: torch.device) -> str:
    """Return what a person calls the device, for example ``NVIDIA T4`` or ``CPU, 2 threads``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
