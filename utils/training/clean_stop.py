"""A stop that loses nothing: signals, and the end of the machine's session, end a run after the step under way."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from utils.runtime.colab import in_colab

LAUNCHER = "SEEDBED_LAUNCHED"
"""Environment variable of processes that another one started to train on several devices: that one's number."""
STOP_FILE = "SEEDBED_STOP_FILE"
"""Environment variable of such processes: a file that appears when they should stop, with the reason."""
MARGIN_MINUTES = 15
"""Minutes before the end of a machine's session at which training stops."""
_imported = time.monotonic()


class CleanStop:
    """Turns SIGTERM and the first interrupt into a stop at the end of the step; a second interrupt is immediate.

    Attributes:
        reason: Why to stop; None as long as nothing asks for it.
    """

    def __init__(self) -> None:
        """Nothing has asked to stop yet."""
        self.reason: str | None = None
        self._launcher = int(os.environ.get(LAUNCHER) or 0)
        self._file = Path(os.environ[STOP_FILE]) if STOP_FILE in os.environ else None

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

    def look(self) -> None:
        """Ask the process that started this one, if there is one, whether to stop."""
        if self.reason is not None:
            return
        if self._file is not None and self._file.exists():
            self.reason = self._file.read_text(encoding="utf-8").strip() or "terminated"
        elif self._launcher:
            try:
                os.kill(self._launcher, 0)
            except ProcessLookupError:
                self.reason = "terminated"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = "interrupted" if number == signal.SIGINT else "terminated"


@contextmanager
def interruptible() -> Iterator[None]:
    """Let an interrupt that Lightning has caught inside the block go on as one: it leaves by ``sys.exit(1)``."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def session_minutes() -> float:
    """Return for how many minutes this session has been running.

    On Colab that is the age of the whole machine, whose end it shares; elsewhere the age of this process, or of the one
    that started it to train on several devices.
    """
    process = 1 if in_colab() else int(os.environ.get(LAUNCHER) or os.getpid())
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        # The twenty-second field counts the ticks from the boot to the start; the name before it may hold spaces.
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return (time.clock_gettime(time.CLOCK_BOOTTIME) - started) / 60
    except (OSError, ValueError, IndexError, AttributeError):
        return (time.monotonic() - _imported) / 60
