"""What this machine has: memory, device, names; and what running out of memory looks like."""

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LARGE_MODEL = 20_000_000
"""Parameters from which on a pass takes seconds and a copy gigabytes: what is dear is done less often or not at all."""
LEAST_ALLOCATION = 256e6
"""`allocation_limit` never leaves less than this."""
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "could not create a memory",
)


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
                return min(int(line.split()[1]) * 1024, total_memory() - _group_usage())
    return total_memory()


def _group_usage() -> int:
    """Return the bytes that this process's control group uses and could not give back, 0 if that is not told."""
    try:
        usage = int(Path("/sys/fs/cgroup/memory.current").read_text())
        cached = [
            line for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines() if "inactive_file" in line
        ]
        return usage - int(cached[0].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


@contextmanager
def allocation_limit(extra: float | None = None) -> Iterator[None]:
    """Make allocations beyond what is free raise an error in this block, instead of having the system end the process.

    Does nothing where the system cannot do it, and in processes with a CUDA context, which reserve more addresses than
    there is memory.

    Args:
        extra: Bytes that the block may allocate; None for nearly all that is free.
    """
    statm = Path("/proc/self/statm")
    if not statm.exists() or torch.cuda.is_initialized():
        yield
        return
    extra = max(LEAST_ALLOCATION, 0.9 * available_memory()) if extra is None else extra
    wanted = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + int(extra)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    for limit in (soft, hard):
        wanted = wanted if limit == resource.RLIM_INFINITY else min(wanted, limit)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out; the CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Return the bytes of main memory that this process holds now; its peak where the present size is not told."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_of_block() -> Iterator[list[int]]:
    """Measure the largest resident size of this process inside a block, in bytes.

    Yields:
        A list that holds the number after the block; empty where the system cannot measure a block of its own.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    result: list[int] = []
    try:
        reset.write_text("5")
    except OSError:
        yield result
        return
    yield result
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            result.append(int(line.split()[1]) * 1024)


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
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' * (threads > 1)})"
