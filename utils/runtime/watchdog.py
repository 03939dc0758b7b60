"""A time limit for code that may never come back, and the module it was in when time ran out.

`TimedOut` is no `Exception`, because code that may hang also holds ``except Exception`` clauses, which would take the
limit for an error of their own. In the main thread an alarm interrupts Python code and system calls such as
``time.sleep``; in other threads only Python code can be interrupted. Nothing interrupts a kernel that runs for ever in
C: `utils.runtime.rehearsal` is for that.
"""

import ctypes
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import nn

AGAIN_SECONDS, MOST_ALARMS = 1.0, 20
"""Code that swallows the first alarm gets another one so much later, at most so many times."""


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


@contextmanager
def time_limit(seconds: float, module: nn.Module | None = None) -> Iterator[None]:
    """Interrupt a block that takes longer than `seconds`.

    Limits can be nested: an outer alarm that was set before, by anybody, is set again afterwards with the time it has
    left.

    Args:
        seconds: The limit.
        module: The model whose submodules are named in the exception.

    Raises:
        TimedOut: The block took longer.
    """
    by_alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    with _alarm(seconds, module) if by_alarm else _asynchronous(seconds, module):
        yield


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


@contextmanager
def _alarm(seconds: float, module: nn.Module | None) -> Iterator[None]:
    """Limit a block of the main thread by a timer of the system."""
    alarms = 0
    active = True

    def ring(signum: int, frame: FrameType | None) -> None:
        nonlocal alarms
        alarms += 1
        if alarms >= MOST_ALARMS:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if active:
            raise TimedOut(seconds, working_module(module, frame))

    started = time.monotonic()
    previous = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    # Two levels, because the alarm may ring in the first moment of the inner one.
    try:
        try:
            yield
        finally:
            active = False
    finally:
        active = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous if previous is not None else signal.SIG_DFL)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - started)), interval)


@contextmanager
def _asynchronous(seconds: float, module: nn.Module | None) -> Iterator[None]:
    """Limit a block of another thread by an exception that a timer's thread raises in it."""
    thread = threading.get_ident()
    where = ""

    def ring() -> None:
        nonlocal where
        where = working_module(module, sys._current_frames().get(thread))
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimedOut))

    timer = threading.Timer(seconds, ring)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TimedOut as error:
        raise TimedOut(seconds, error.where or where) from None
    finally:
        timer.cancel()
        timer.join(AGAIN_SECONDS)
        # One that was raised and has not arrived yet must not arrive outside the block.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
