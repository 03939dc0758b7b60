"""A stop that loses nothing: signals end a run after the step that is under way."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class CleanStop:
    """Turns SIGTERM and the first interrupt into a stop at the end of the step; a second interrupt is immediate."""

    def __init__(self) -> None:
        """Nothing has asked to stop yet."""
        self.reason: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals while the block runs; outside the main thread nothing can be handled."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Install the handlers; again after Lightning has put its own in, which leave in the middle of a step."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = "interrupted" if number == signal.SIGINT else "terminated"
