"""What code prints is kept away from the terminal and the notebook: the first lines and the amount are remembered.

Python's streams and the descriptors below them are both caught, for C code writes to the latter. Other threads go on
printing where they did.
"""

import contextlib
import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

KEPT = 2000
"""Characters that are kept."""


class Printed:
    """What a block printed.

    Attributes:
        count: Characters and, below Python, bytes.
        start: The first `KEPT` of them.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.count = 0
        self.start = ""

    def add(self, text: str, count: int | None = None) -> None:
        """Take note of a piece."""
        self.count += len(text) if count is None else count
        self.start += text[: KEPT - len(self.start)]


def first_printed(printed: Printed, width: int = 200) -> str:
    """Return the first line that holds anything, cut to a width, or nothing."""
    line = next((line.strip() for line in printed.start.splitlines() if line.strip()), "")
    return line if len(line) <= width else f"{line[: width - 3]}..."


class _Catcher(io.TextIOBase):
    """Stands for ``sys.stdout`` or ``sys.stderr``; only one thread's text is caught."""

    def __init__(self, original: TextIO, elsewhere: Any, printed: Printed) -> None:
        self._original, self._elsewhere, self._printed = original, elsewhere, printed
        self._thread: int | None = threading.get_ident()

    def release(self) -> None:
        """Pass everything on from now on: a log handler may have kept this stream for good."""
        self._thread, self._elsewhere = None, self._original

    def write(self, text: str) -> int:
        """Count or pass on."""
        if threading.get_ident() == self._thread:
            self._printed.add(text)
            return len(text)
        return int(self._elsewhere.write(text) or 0)

    def flush(self) -> None:
        """Flush what is passed on."""
        if threading.get_ident() != self._thread:
            self._elsewhere.flush()

    def writable(self) -> bool:
        """Say so."""
        return True

    def __getattr__(self, name: str) -> Any:
        """Look like the original in all else, such as ``encoding``."""
        return getattr(self._original, name)


@contextmanager
def captured_output() -> Iterator[Printed]:
    """Catch what the block prints, in Python and below."""
    printed = Printed()
    streams = sys.stdout, sys.stderr
    with ExitStack() as stack:
        stack.callback(lambda: _put_back(streams))
        copies = [stack.enter_context(_caught_descriptor(number, stream, printed))
                  for number, stream in zip((1, 2), streams, strict=True)]  # fmt: skip
        catchers = [
            _Catcher(stream, copy or stream, printed) if stream is not None else None
            for stream, copy in zip(streams, copies, strict=True)
        ]
        for catcher in catchers:
            if catcher is not None:
                stack.callback(catcher.release)
        sys.stdout, sys.stderr = catchers
        yield printed


def _put_back(streams: tuple[TextIO, TextIO]) -> None:
    sys.stdout, sys.stderr = streams


@contextmanager
def _caught_descriptor(number: int, stream: Any, printed: Printed) -> Iterator[Any]:
    """Send a descriptor to a file for the block; yield a stream for others if theirs ends in that descriptor."""
    with contextlib.suppress(Exception):
        stream.flush()
    try:
        copy = os.dup(number)
    except OSError:
        yield None
        return
    try:
        ends_here = stream is not None and stream.fileno() == number
    except (OSError, ValueError, AttributeError):
        ends_here = False
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), number)
        others = open(copy, "w", buffering=1, closefd=False) if ends_here else None  # noqa: SIM115
        try:
            yield others
        finally:
            if others is not None:
                others.close()
            os.dup2(copy, number)
            os.close(copy)
            if size := file.seek(0, os.SEEK_END):
                file.seek(0)
                printed.add(file.read(KEPT).decode(errors="replace"), size)
