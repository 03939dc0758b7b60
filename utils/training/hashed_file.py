"""A file that is hashed and brought to the disk while it is written: nothing is read back, or waited for twice.

SHA-256 takes two to three times as long as handing the same bytes to the operating system. Both let other threads run,
and so does the disk: what was written is gathered into large pieces without copying the tensors, and while this thread
hands over one piece another hashes it and a third has the disk begin with the one before.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 32 << 20
"""Bytes that are gathered before they are handed over: at each hand-over threads wait for each other."""
SMALL = 64 << 10
"""Up to so many bytes are copied, into one part with their neighbours."""
PARTS = 1000
"""Parts of one piece; the operating system takes at most 1024 at once."""


class HashedFile:
    """A new file that counts and hashes what is written to it.

    Attributes:
        path: Where it is.
        bytes: How many bytes were written.
    """

    def __init__(self, path: Path, lasting: Iterable[Tensor] = ()) -> None:
        """Open a file.

        Args:
            path: Where it will be.
            lasting: Tensors in main memory that stay as they are until `finish`: their bytes are not copied.

        Raises:
            OSError: It cannot be opened.
        """
        self.path, self.bytes = path, 0
        # What is written is recognised by its address; the storages are held so that no other memory can have it.
        plain = [tensor for tensor in lasting if tensor.layout == torch.strided and tensor.device.type == "cpu"]
        self._storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in plain}
        self._starts = sorted(self._storages)
        self._digest = hashlib.sha256()
        self._stream = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._hashing, self._syncing = ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "sync")
        self._work: list[Future[None]] = []
        self._parts: list[bytearray | memoryview] = []
        self._gathered, self._handed_over = 0, 0

    def __str__(self) -> str:
        """Return its path."""
        return str(self.path)

    def write(self, data: Any) -> int:
        """Write bytes or anything with their memory.

        Raises:
            OSError: The disk does not take what was gathered so far.
        """
        view = memoryview(data).cast("B")
        length = len(view)
        if length > SMALL and self._lasts(view):
            self._parts.append(view)
        else:
            last = self._parts[-1] if self._parts else None
            if isinstance(last, bytearray):
                last.extend(view)
            else:
                self._parts.append(bytearray(view))
        self.bytes += length
        self._gathered += length
        if self._gathered >= PIECE or len(self._parts) >= PARTS:
            self.flush()
        return length

    def flush(self) -> None:
        """Hand everything to the operating system.

        Raises:
            OSError: It does not take it.
        """
        parts, self._parts, self._gathered = [memoryview(part) for part in self._parts], [], 0
        if not parts:
            return
        self._work.append(self._hashing.submit(_hash, self._digest, list(parts)))
        while parts:
            written = os.writev(self._stream.fileno(), parts)
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][written:]
        begin, self._handed_over = self._handed_over, self.bytes
        self._work.append(self._syncing.submit(_start_writing, self._stream.fileno(), begin, self.bytes - begin))

    def finish(self) -> dict[str, Any]:
        """Wait until the closed file is on the disk and hashed; return its ``bytes`` and ``sha256``.

        Raises:
            OSError: It could not be forced onto the disk.
        """
        for work in self._work:
            work.result()
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}

    def _lasts(self, view: memoryview) -> bool:
        """Tell whether bytes lie in one of the tensors that stay as they are."""
        address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return False
        start = self._starts[place]
        return bool(address + len(view) <= start + self._storages[start].nbytes())

    def _force(self) -> None:
        """Force the file onto the disk and close it."""
        try:
            os.fsync(self._stream.fileno())
        finally:
            self._stream.close()

    def __enter__(self) -> "HashedFile":
        """Write in a block; `finish` comes behind it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hand over the rest; the threads go on with it."""
        whole = False
        try:
            if kind is None:
                self.flush()
                self._work.append(self._syncing.submit(self._force))
                whole = True
        finally:
            # After a failure nothing may read the tensors or the file any more once the caller knows of it.
            self._hashing.shutdown(wait=not whole, cancel_futures=not whole)
            self._syncing.shutdown(wait=not whole, cancel_futures=not whole)
            if not whole:
                self._stream.close()


def _hash(digest: Any, parts: list[memoryview]) -> None:
    """Hash what was written."""
    for part in parts:
        digest.update(part)


def _start_writing(descriptor: int, begin: int, length: int) -> None:
    """Have the disk begin with a part of a file, where the system can be asked to."""
    if hasattr(os, "posix_fadvise"):
        # What is said not to be needed in the cache is written out at once. That it cannot be is no fault of the file:
        # `_force` waits for all of it and reports what failed.
        with suppress(OSError):
            os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)
