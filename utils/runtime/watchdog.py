"""A time limit for code that may never come back, and the module it was in when time ran out.

`TimedOut` is no `Exception`, because code that may hang also holds ``except Exception`` clauses, which would take the
limit for an error of their own. In the main thread an alarm interrupts Python code and system calls such as
``time.sleep``; in other threads only Python code can be interrupted. Nothing interrupts a kernel that runs for ever in
C: `utils.runtime.rehearsal` is for that.

Limits can be nested: all of them run on, and the one that ends first interrupts. Until it reaches the end of its own
block, the interruption is no `TimedOut` but a private exception, which blocks further in and the ``except`` clauses
around them cannot take for theirs.
"""

import ctypes
import signal
import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager
from types import CodeType, FrameType, TracebackType
from typing import Any

from torch import nn

AGAIN_SECONDS, MOST_ALARMS = 1.0, 20
"""Code that swallows the first alarm gets another one so much later, at most so many times."""
MOMENT = 1e-3
"""What is due within so many seconds is due; an alarm that comes at a bad time is put off by as much."""


class TimedOut(BaseException):
    """A block took longer than its limit.

    Attributes:
        seconds: The limit.
        where: Name of the innermost module that was running; empty outside all modules and for the model itself.
    """

    def __init__(self, seconds: float = 0.0, where: str = "") -> None:
        """Keep the circumstances; without arguments where only a class can be raised."""
        super().__init__(f"no answer within {seconds:.3g} s")
        self.seconds, self.where = seconds, where


_INSIDE = threading.local()


class _Expired(BaseException):
    """Interrupts the block of a limit; only that limit knows it, and turns it into `TimedOut`."""

    def __init__(self, limit: "_Limit", where: str) -> None:
        super().__init__("time is up")
        self.limit, self.where = limit, where


def time_limit(seconds: float, module: nn.Module | None = None) -> AbstractContextManager[None]:
    """Interrupt a block that takes longer than `seconds`, with `TimedOut`.

    Limits can be nested, and an alarm that anybody else has set rings in time for whoever set it.

    Args:
        seconds: The limit.
        module: The model whose submodules are named in the exception.
    """
    by_alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    return (_Alarm if by_alarm else _Asynchronous)(seconds, module)


def limited() -> bool:
    """Tell whether this thread runs inside a limit: then somebody has taken care that it comes back."""
    return getattr(_INSIDE, "limits", 0) > 0


def working_module(module: nn.Module | None, frame: FrameType | None) -> str:
    """Return the name of the innermost submodule with a method among a frame and its callers."""
    names = _names(module)
    while frame is not None:
        if (owner := _owner(frame)) in names:
            return names[owner]
        frame = frame.f_back
    return ""


def failing_module(module: nn.Module, error: BaseException) -> str:
    """Return the name of the innermost submodule with a method among the frames that an exception passed."""
    names = _names(module)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((names[owner] for frame in reversed(frames) if (owner := _owner(frame)) in names), "")


def _names(module: nn.Module | None) -> dict[int, str]:
    """Return the names of all submodules by their ids."""
    return {id(child): name for name, child in module.named_modules()} if module is not None else {}


def _owner(frame: FrameType) -> int:
    """Return the id of what a method is called on: its first argument."""
    code = frame.f_code
    return id(frame.f_locals.get(code.co_varnames[0])) if code.co_argcount else 0


class _Limit:
    """What both kinds of limit share."""

    def __init__(self, seconds: float, module: nn.Module | None) -> None:
        self.seconds, self.module = seconds, module

    def _begin(self) -> None:
        _INSIDE.limits = getattr(_INSIDE, "limits", 0) + 1

    def _end(self, error: BaseException | None) -> None:
        """Turn this limit's own interruption into what the caller knows; let any other exception pass."""
        _INSIDE.limits -= 1
        if isinstance(error, _Expired) and error.limit is self:
            raise TimedOut(self.seconds, error.where).with_traceback(error.__traceback__) from None


class _Alarm(_Limit):
    """Limits a block of the main thread by the process's one timer.

    The handler and the timer that were there before, an outer limit's or anybody's, go on as if this one did not exist:
    the timer always runs to the next moment at which either has something to do.
    """

    def __enter__(self) -> None:
        # From here on no alarm rings half way.
        left, self._interval = signal.setitimer(signal.ITIMER_REAL, 0)
        self._begin()
        now = time.monotonic()
        self._alarms = 0
        self._due: float | None = now + self.seconds
        self._other_due = now + left if left else None
        self._previous: Any = signal.signal(signal.SIGALRM, self._ring)
        self._arm()

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._previous if self._previous is not None else signal.SIG_DFL)
        if self._other_due is not None:
            signal.setitimer(signal.ITIMER_REAL, max(MOMENT, self._other_due - time.monotonic()), self._interval)
        self._end(error)

    def _arm(self) -> None:
        """Let the timer run to the next moment at which there is something to do."""
        other = self._other_due if callable(self._previous) else None
        moments = [moment for moment in (self._due, other) if moment is not None]
        signal.setitimer(signal.ITIMER_REAL, max(MOMENT, min(moments) - time.monotonic()) if moments else 0)

    def _ring(self, signum: int, frame: FrameType | None) -> None:
        """Do what is due: this limit's interruption, or what the handler before does."""
        now = time.monotonic()
        own = self._due if self._due is not None and self._due <= now + MOMENT else None
        other = self._other_due if self._other_due is not None and self._other_due <= now + MOMENT else None
        if callable(self._previous) and (own is None or (other is not None and other < own)):
            self._pass_on(signum, frame)
        elif own is None:
            self._arm()
        elif _is_handling(frame):
            self._due = now + MOMENT
            self._arm()
        else:
            self._alarms += 1
            self._due = now + AGAIN_SECONDS if self._alarms < MOST_ALARMS else None
            self._arm()
            raise _Expired(self, working_module(self.module, frame))

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        """Call the handler before, with the timer as it would have it."""
        signal.setitimer(signal.ITIMER_REAL, self._interval, self._interval)
        try:
            self._previous(signum, frame)
        except BaseException:
            # The block is being left already; its own limit counts only if it is not.
            if self._due is not None:
                self._due = max(self._due, time.monotonic() + AGAIN_SECONDS)
            raise
        finally:
            left, self._interval = signal.setitimer(signal.ITIMER_REAL, 0)
            self._other_due = time.monotonic() + left if left else None
            self._arm()


_RAISING = threading.Lock()
_PENDING: dict[int, "_Asynchronous"] = {}
"""By thread, the limit whose interruption was raised in it last; it may not have arrived yet."""


class _Asynchronous(_Limit):
    """Limits a block of another thread by an exception that a thread of its own raises in it."""

    def __enter__(self) -> None:
        self._thread, self._where, self._over = threading.get_ident(), "", threading.Event()
        self._begin()
        try:
            # Only a class can be raised in another thread, so that each limit has one.
            self._kind = type("_Expired", (_Expired,), {"__init__": lambda error: _Expired.__init__(error, self, "")})
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        except BaseException:
            # A block that was never entered is not left either.
            self._stop()
            _INSIDE.limits -= 1
            raise

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        while True:
            try:
                self._stop()
                break
            except _Expired as late:
                # It was raised while the block still ran, and arrived here.
                if late.limit is not self:
                    raise
                error = late
        self._watcher.join(AGAIN_SECONDS)
        if isinstance(error, _Expired) and error.limit is self:
            error.where = self._where
        self._end(error)

    def _stop(self) -> None:
        """Let nothing be raised from now on."""
        self._over.set()
        with _RAISING:
            # One that was raised and has not arrived yet must not arrive outside the block. Another limit's must.
            if _PENDING.get(self._thread) is self:
                del _PENDING[self._thread]
                _raise_in(self._thread, None)

    def _watch(self) -> None:
        """Wait, and interrupt the block; again and again if it does not end."""
        pause = self.seconds
        alarms = 0
        while alarms < MOST_ALARMS and not self._over.wait(pause):
            # Finding the module takes a while in a large model, in which the block may come to its end.
            where = self._where or working_module(self.module, sys._current_frames().get(self._thread))
            with _RAISING:
                if self._over.is_set():
                    break
                if _is_handling(sys._current_frames().get(self._thread)):
                    pause = MOMENT
                    continue
                self._where = where
                _PENDING[self._thread] = self
                _raise_in(self._thread, self._kind)
            pause = AGAIN_SECONDS
            alarms += 1


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in a thread at its next step in Python; None takes one back that was not raised yet."""
    raised = ctypes.py_object(kind) if kind is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _is_handling(frame: FrameType | None) -> bool:
    """Tell whether a limit is just being entered, left or enforced, which must not be interrupted half way."""
    while frame is not None:
        if frame.f_code in _HANDLING:
            return True
        frame = frame.f_back
    return False


_HANDLING: set[CodeType] = {
    function.__code__
    for kind in (_Alarm, _Asynchronous)
    for name, function in vars(kind).items()
    if name in ("__enter__", "__exit__", "_arm", "_ring", "_pass_on")
}
