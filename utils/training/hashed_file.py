"""A file that is hashed while it is written, so that nothing has to be read back for its manifest.

Hashing takes longer than handing bytes to the operating system, and both let other threads run: a thread hashes what
was written while the next piece, or the next file, is being written.
"""

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from utils.runtime.files import sync_file

BUFFER = 1 << 20
BEHIND = 64 << 20
"""Bytes by which hashing may lag behind where they have to be copied for it."""


class HashedFile:
    """A new file that counts and hashes what is written to it.

    Attributes:
        path: Where it is.
        bytes: How many bytes were written.
    """

    def __init__(self, path: Path, lasting: bool = False) -> None:
        """Open a file.

        Args:
            path: Where it will be.
            lasting: What is written stays as it is until `sha256` was read, and need not be copied to be hashed later.

        Raises:
            OSError: It cannot be opened.
        """
        self.path, self.lasting, self.bytes = path, lasting, 0
        self._digest = hashlib.sha256()
        self._stream = open(path, "wb", buffering=BUFFER)  # noqa: SIM115 - closed by __exit__
        self._pool = ThreadPoolExecutor(1, "hash")
        self._hashing: deque[tuple[int, Future[None]]] = deque()
        self._behind = 0

    def __str__(self) -> str:
        """Return its path."""
        return str(self.path)

    @property
    def sha256(self) -> str:
        """The SHA-256 of what was written so far, in hexadecimal."""
        self._catch_up(0)
        return self._digest.hexdigest()

    def write(self, data: Any) -> int:
        """Write bytes or anything with their memory."""
        view = memoryview(data).cast("B")
        piece = view if self.lasting else bytes(view)
        self._hashing.append((len(view), self._pool.submit(self._digest.update, piece)))
        self._behind += len(view)
        self._stream.write(view)
        if not self.lasting:
            self._catch_up(BEHIND)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._stream.flush()

    def sync(self) -> None:
        """Force the closed file onto the disk."""
        sync_file(self.path)

    def _catch_up(self, allowed: int) -> None:
        """Wait until hashing lags by at most so many bytes."""
        while self._hashing and (self._behind > allowed or not allowed):
            length, hashed = self._hashing.popleft()
            hashed.result()
            self._behind -= length

    def __enter__(self) -> "HashedFile":
        """Write in a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; what is not hashed yet will be."""
        self._pool.shutdown(wait=False)
        self._stream.close()
