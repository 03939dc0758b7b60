"""Work beside training: one thread that writes checkpoints, one that copies them away.

A step waits only for the copy of the state into main memory. While a checkpoint is still being written no second one is
begun: the next becomes due a few steps later, so memory holds one snapshot at most. A copy on a slow or vanished mount
delays neither steps nor checkpoints: it has a thread of its own, and that thread always copies the newest state.
"""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from utils.runtime.errors import CheckpointError, RunError
from utils.training.checkpoint_manager import CheckpointManager, Snapshot
from utils.training.mirror import mirror_run


class Worker:
    """A thread that does one piece of work at a time; it never keeps the process alive."""

    def __init__(self, name: str) -> None:
        """Make the worker; its thread starts with the first piece of work."""
        self.name = name
        self._changed = threading.Condition()
        self._work: Callable[[], None] | None = None
        self._running = False
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether there is work that is not done."""
        with self._changed:
            return self._running or self._work is not None

    def submit(self, work: Callable[[], None]) -> None:
        """Do a piece of work next; one that was waiting is replaced. `work` must not raise."""
        with self._changed:
            self._work = work
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self.name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all work is done; return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running and self._work is None, seconds)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work is not None)
                work, self._work, self._running = self._work, None, True
            try:
                assert work is not None
                work()
            finally:
                with self._changed:
                    self._running = False
                    self._changed.notify_all()


class CheckpointWriter:
    """Writes a run's checkpoints and its second copy while training goes on.

    Attributes:
        saved_step: The step of the newest checkpoint that is on disk.
        lost: Checkpoints that could not be written.
    """

    PATIENCE = 120.0
    """Seconds that the end of a session waits for the second copy."""

    def __init__(self, checkpoints: CheckpointManager, directory: Path, mirror: Path | None) -> None:
        """Write for one run.

        Args:
            checkpoints: Where they go.
            directory: The run.
            mirror: Where a second copy of the run is kept; None keeps none.
        """
        self.checkpoints, self.directory, self.mirror = checkpoints, directory, mirror
        self.saved_step, self.lost = 0, 0
        self._writer, self._copier = Worker("checkpoints"), Worker("second copy")
        self._messages: list[str] = []
        self._copy_fails = False

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.busy

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint; `report` says later what became of it."""
        self._writer.submit(lambda: self._write(snapshot))

    def finish(self, copy: bool = True) -> None:
        """Wait until the checkpoint is written and, with `copy`, the second copy too, unless that hangs."""
        self._writer.wait()
        if copy and not self._copier.wait(self.PATIENCE):
            self._messages.append(
                f"The copy in {self.mirror} is not complete after {self.PATIENCE:.0f} s of waiting. The run in "
                f"{self.directory} is; copy it by hand or continue it with the same mirror."
            )
        self.report()

    def copy(self) -> None:
        """Bring the second copy up to date, in its own thread."""
        if self.mirror is not None:
            self._copier.submit(self._copy)

    def report(self) -> None:
        """Warn, in the thread of the caller, of what went wrong since the last report."""
        while self._messages:
            warnings.warn(self._messages.pop(0), stacklevel=3)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.checkpoints.write(snapshot)
            self.saved_step = snapshot.step
        except CheckpointError as error:
            self.lost += 1
            self._messages.append(f"{error} Training goes on.")
        except Exception as error:  # A thread that dies would end all saving without a word.
            self.lost += 1
            self._messages.append(
                f"The checkpoint of step {snapshot.step} could not be written ({type(error).__name__}: {error}). "
                "Training goes on."
            )
        self.copy()

    def _copy(self) -> None:
        """Copy; when that fails, say it once, and try again after the next checkpoint."""
        assert self.mirror is not None
        try:
            mirror_run(self.directory, self.mirror, self.checkpoints)
            self._copy_fails = False
        except Exception as error:  # Mounts fail in many ways, and none may end the training.
            if not self._copy_fails:
                reason = getattr(error, "strerror", None) or error
                kind = "" if isinstance(error, (OSError, RunError)) else f"{type(error).__name__}: "
                self._messages.append(
                    f"The copy in {self.mirror} cannot be written ({kind}{reason}). Training goes on with "
                    f"the run in {self.directory}; the copy is tried again after each checkpoint."
                )
            self._copy_fails = True
