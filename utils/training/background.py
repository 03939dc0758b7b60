"""Work beside training: one thread that writes checkpoints, one that copies them away.

A step waits only for the copy of the state into main memory. While a checkpoint is still being written no second one is
begun: the next becomes due a few steps later, so memory holds one snapshot. Only one that no other step can stand for
waits in memory for its turn: one that is to stay for ever, and the best so far, which makes way for a better one. A
step waits only when a state is waiting that must not be lost. A copy on a slow or vanished mount delays neither steps
nor checkpoints: it has a thread of its own, and that thread always copies the newest state.
"""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from utils.runtime.errors import CheckpointError, RunError
from utils.training.checkpoint_manager import CheckpointManager, Snapshot, is_finite
from utils.training.mirror import is_at_work, mirror_run


class Worker:
    """A thread that does one piece of work at a time; it never keeps the process alive."""

    def __init__(self, name: str) -> None:
        """Make the worker; its thread starts with the first piece of work."""
        self.name = name
        self._changed = threading.Condition()
        self._work: Callable[[], None] | None = None
        self._running = False
        self._thread: threading.Thread | None = None
        self._failures: list[BaseException] = []

    @property
    def busy(self) -> bool:
        """Whether there is work that is not done."""
        with self._changed:
            return self._running or self._work is not None

    @property
    def full(self) -> bool:
        """Whether a piece of work waits for the one before it."""
        with self._changed:
            return self._work is not None

    def submit(self, work: Callable[[], None]) -> None:
        """Do a piece of work next; one that was waiting is replaced. What it raises is kept for `failures`.

        Raises:
            RuntimeError: The system has no room for a thread; nothing was taken on.
        """
        with self._changed:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._loop, name=self.name, daemon=True)
                thread.start()
                self._thread = thread
            self._work = work
            self._changed.notify_all()

    def withdraw(self) -> bool:
        """Drop the work that waits, if it has not begun; return whether there was any."""
        with self._changed:
            waited, self._work = self._work is not None, None
            self._changed.notify_all()
            return waited

    def failures(self) -> list[BaseException]:
        """Return, once, what work has raised since the last call."""
        with self._changed:
            failures, self._failures = self._failures, []
            return failures

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all work is done; return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running and self._work is None, seconds)

    def wait_for_room(self) -> None:
        """Wait until no piece of work waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._work is None)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work is not None)
                work, self._work, self._running = self._work, None, True
                self._changed.notify_all()
            try:
                assert work is not None
                work()
            except BaseException as error:  # A thread that dies would leave all who wait for it waiting.
                with self._changed:
                    self._failures.append(error.with_traceback(None))
            finally:
                # What was worked on may be large, and the next piece may be long in coming.
                work = None
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
        self._write_fails, self._copy_fails = False, False
        self._last: tuple[int, float | None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.busy

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint; `report` says later what became of it."""
        self._last = snapshot.step, snapshot.loss
        try:
            self._writer.submit(lambda: self._write(snapshot))
        except RuntimeError:  # No room for a thread: the step waits for the disk, and nothing is lost.
            self._write(snapshot)

    def make_room(self, loss: float | None = None) -> None:
        """Wait until one more snapshot may be held in memory; at once unless one waits already.

        Args:
            loss: Held-out loss of that snapshot; what waits and is worse makes way, unless it is to stay for ever.
        """
        if self._last is not None and is_finite(loss):
            step, waiting = self._last
            if is_finite(waiting) and loss < waiting and not self.checkpoints.stays(step):
                self._writer.withdraw()
        self._writer.wait_for_room()

    def finish(self, copy: bool = True) -> None:
        """Wait until the checkpoint is written and, with `copy`, the second copy too, unless that hangs."""
        self._writer.wait()
        if copy and not self._copier.wait(self.PATIENCE):
            self._messages.append(_hangs(self.directory, self.mirror, self.PATIENCE))
        self.report()

    def copy(self) -> None:
        """Bring the second copy up to date, in its own thread."""
        if self.mirror is not None:
            try:
                self._copier.submit(self._copy)
            except RuntimeError as error:  # Not here instead: a copy that hangs would end all saving.
                self._note_copy(error)

    def report(self) -> None:
        """Warn, in the thread of the caller, of what went wrong since the last report."""
        for worker in (self._writer, self._copier):
            for error in worker.failures():
                kind = type(error).__name__
                self._messages.append(f"The thread for the {worker.name} met {kind}: {error}. Training goes on.")
        while self._messages:
            warnings.warn(self._messages.pop(0), stacklevel=3)

    def _write(self, snapshot: Snapshot) -> None:
        """Write; when that fails, say it once, until it has worked again."""
        try:
            self.checkpoints.write(snapshot)
            self.saved_step = max(self.saved_step, snapshot.step)
            self._write_fails = False
        except Exception as error:  # A thread that dies would end all saving without a word.
            self.lost += 1
            text = (
                f"{error}"
                if isinstance(error, CheckpointError)
                else f"The checkpoint of step {snapshot.step} could not be written ({type(error).__name__}: {error})."
            )
            if not self._write_fails:
                self._messages.append(f"{text} Training goes on.")
            self._write_fails = True
        self.copy()

    def _copy(self) -> None:
        """Copy; when that fails, say it once, and try again after the next checkpoint."""
        assert self.mirror is not None
        try:
            mirror_run(self.directory, self.mirror, self.checkpoints)
            self._copy_fails = False
        except Exception as error:  # Mounts fail in many ways, and none may end the training.
            self._note_copy(error)

    def _note_copy(self, error: Exception) -> None:
        """Have it said once that the copy cannot be written, until it has worked again."""
        if not self._copy_fails:
            reason = getattr(error, "strerror", None) or error
            kind = "" if isinstance(error, (OSError, RunError)) else f"{type(error).__name__}: "
            self._messages.append(
                f"The copy in {self.mirror} cannot be written ({kind}{reason}). Training goes on with "
                f"the run in {self.directory}; the copy is tried again after each checkpoint."
            )
        self._copy_fails = True


def within(seconds: float, work: Callable[[], object]) -> bool:
    """Do something in a thread of its own and give it up when it hangs; return whether it was done.

    Raises:
        Exception: What `work` raised.
    """
    failure: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            failure.append(error)

    worker = Worker("given up when it hangs")
    worker.submit(guarded)
    done = worker.wait(seconds)
    if done and failure:
        raise failure[0]
    return done


def copy_at_the_end(directory: Path, mirror: Path) -> None:
    """Bring a second copy up to date and wait for it, but not for one that hangs.

    Args:
        directory: The run.
        mirror: Its copy.

    Raises:
        OSError: It could not be written.
        RunError: The folder holds something else.
    """
    # One that is still at work has been waited for by the session, which has said so.
    if not is_at_work(mirror) and not within(CheckpointWriter.PATIENCE, lambda: mirror_run(directory, mirror)):
        warnings.warn(_hangs(directory, mirror, CheckpointWriter.PATIENCE), stacklevel=3)


def _hangs(directory: Path, mirror: Path | None, patience: float) -> str:
    return (
        f"The copy in {mirror} is not complete after {patience:.0f} s of waiting. The run in {directory} is; copy it "
        "by hand or continue it with the same mirror."
    )
