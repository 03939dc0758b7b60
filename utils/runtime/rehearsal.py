"""Run something in a copy of this process first: if it dies, hangs or eats all memory there, it is not done here.

A forked child shares the parent's memory until one of them writes, so that rehearsing a model costs one pass and no
copy of its weights. The child uses one thread: the OpenMP threads of its parent do not exist in it. Nothing that
forking itself can cause is held against the code: a child that only sleeps in C may wait for a lock whose owner was not
copied, and counts as ``"inconclusive"``.
"""

import faulthandler
import gc
import mmap
import os
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from utils.runtime.errors import AdapterError
from utils.runtime.resources import allocation_limit, format_bytes, is_out_of_memory, peak_memory
from utils.runtime.watchdog import TimedOut, failing_module, limited, time_limit

GRACE_SECONDS = 2.0
"""Time beyond the limit after which a child that its own alarm could not interrupt is ended."""
BUSY_SHARE = 0.1
"""A child that used less of its time than this was waiting for something, possibly for what forking took away."""
FORKING_SECONDS = 0.2
"""Processor time that a child of a large process takes for being one: pages are copied as they are touched."""
NOTABLE_BYTES = 1e9
FIELD = 512
ONCE_SECONDS, SECONDS_PER_BILLION = 60.0, 30.0
"""Limit of `rehearse_once`, and what each billion of parameters adds to it."""
CONFIRMING_SECONDS = 8.0
"""The same for what was seen waiting in the copy, perhaps for something that was not copied."""


@dataclass(frozen=True)
class Rehearsal:
    """How it went."""

    outcome: str
    """``"survived"`` (also when an exception was raised), ``"died"``, ``"timed_out"``, ``"out_of_memory"`` or
    ``"inconclusive"``."""
    reason: str = ""
    """What happened, as the end of a sentence that begins with "the process"."""
    stage: str = ""
    """The last `Notes.stage`."""
    where: str = ""
    """The last `Notes.where`."""
    busy: bool = True
    """Whether the child was computing rather than waiting."""
    taken: float = 0.0
    """Bytes by which the child grew."""

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against doing it here."""
        return self.outcome in ("survived", "inconclusive")


class _Same:
    """Stands for one object without keeping it alive, and is equal to what stands for the same one."""

    def __init__(self, value: Any) -> None:
        try:
            self._value: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            # What cannot be watched may be gone, and another object in its place.
            self._value = lambda: None

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (mine := self._value()) is not None and mine is other._value()


_SURVIVED: dict[int, tuple[weakref.ref[torch.nn.Module], Any]] = {}
"""By their ids, the models that have survived `rehearse_once`, and how they were called."""


class Notes:
    """A few words that the child writes and the parent can read however the child ends."""

    def __init__(self) -> None:
        """Share a page between this process and its children."""
        self._page = mmap.mmap(-1, 4 * FIELD)

    def _put(self, index: int, text: str) -> None:
        self._page[index * FIELD : (index + 1) * FIELD] = text.encode()[: FIELD - 1].ljust(FIELD, b"\0")

    def _get(self, index: int) -> str:
        return self._page[index * FIELD : (index + 1) * FIELD].rstrip(b"\0").decode(errors="ignore")

    stage = property(lambda self: self._get(0), lambda self, text: self._put(0, text))
    where = property(lambda self: self._get(1), lambda self, text: self._put(1, text))
    outcome = property(lambda self: self._get(2), lambda self, text: self._put(2, text))
    reason = property(lambda self: self._get(3), lambda self, text: self._put(3, text))


def can_rehearse() -> bool:
    """Tell whether this process can be forked safely: on Linux, without a CUDA context."""
    return sys.platform == "linux" and hasattr(os, "fork") and not torch.cuda.is_initialized()


def rehearse(act: Callable[[Notes], Any], seconds: float, module: torch.nn.Module | None = None) -> Rehearsal:
    """Run ``act(notes)`` in a forked child and say how it ended; nothing that it does reaches this process.

    Args:
        act: What to rehearse; it should write `Notes.stage` and `Notes.where` as it goes.
        seconds: Limit.
        module: The model, to name the module in which Python code was interrupted.
    """
    if not can_rehearse():
        return Rehearsal("inconclusive", "cannot be copied on this machine")
    notes = Notes()
    started = time.monotonic()
    with warnings.catch_warnings():
        # Python warns that forking beside threads may deadlock the child, which is accounted for here.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            child = os.fork()
        except OSError as error:
            return Rehearsal("inconclusive", f"could not be copied: {error}")
    if child == 0:
        try:
            _perform(act, notes, seconds, module)
        finally:
            os._exit(0)
    return _watch(child, notes, started, seconds)


def rehearse_once(model: Any, act: Callable[[], Any], **given: Any) -> None:
    """Before a model's first passes in this process: rehearse them, until it has survived them once.

    Another call of a model, or another ``forward``, is rehearsed again. Nothing is done inside a time limit, whose
    owner has taken care of it, nor for a model that is not on the CPU.

    Args:
        model: A module, or what has one in ``module``.
        act: Does the first passes.
        **given: What they depend on beside the module; what is None may be an attribute of what holds the module.

    Raises:
        AdapterError: This process would hang in them, end or run out of memory.
    """
    module = model if isinstance(model, torch.nn.Module) else getattr(model, "module", None)
    if not isinstance(module, torch.nn.Module) or limited() or not can_rehearse():
        return
    parameters = list(module.parameters())
    if any(parameter.device.type != "cpu" for parameter in parameters):
        return
    key = id(module)
    held = {} if model is module else {name: getattr(model, name, None) for name in given}
    facts = {name: held.get(name) if value is None else value for name, value in given.items()}
    code = [(getattr(type(part), "forward", None), vars(part).get("forward")) for part in module.modules()]
    circumstances = _mark((facts, code))
    known, survived = _SURVIVED.get(key, (None, None))
    if known is not None and known() is module and survived == circumstances:
        return
    size = sum(p.numel() for p in parameters if not torch.nn.parameter.is_lazy(p))
    result = rehearse(lambda notes: act(), ONCE_SECONDS + SECONDS_PER_BILLION * size / 1e9, module)
    if result.outcome == "timed_out" and not result.busy:
        result = _confirmed(result, act, module)
    if result.ok:
        _SURVIVED[key] = (weakref.ref(module, lambda _: _SURVIVED.pop(key, None)), circumstances)
        return
    where = f" at {result.where}" if result.where else ""
    raise AdapterError(
        f"{type(module).__name__} was not run: in a copy of this process, its first forward pass{where}"
        f" {result.reason}.",
        "Expected a model that answers.",
        "validate(model) reports where; look there for endless loops, waiting, and code outside Python.",
    )


def _mark(value: Any) -> Any:
    """Return what two values can be compared by later, without keeping alive what may hold a model.

    Settings that say nothing are as good as none.
    """
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, (tuple, list)):
        return [_mark(item) for item in value]
    if is_dataclass(value) and not isinstance(value, (type, torch.nn.Module)):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        marks = {str(key): _mark(item) for key, item in value.items()}
        return {key: mark for key, mark in marks.items() if mark is not None and mark != []} or None
    return _Same(value)


def _confirmed(result: Rehearsal, act: Callable[[], Any], module: torch.nn.Module) -> Rehearsal:
    """Try here, in a short time, what waited in the copy."""
    try:
        with time_limit(CONFIRMING_SECONDS, module):
            act()
    except TimedOut:
        return result
    except Exception:
        # The caller will meet it.
        return Rehearsal("survived")
    return Rehearsal("survived")


def _perform(act: Callable[[Notes], Any], notes: Notes, seconds: float, module: torch.nn.Module | None) -> None:
    """Be the child: quiet, single-threaded, limited in time and memory."""
    # A session of its own: Ctrl-C in the terminal is not for it, and its own children can be ended with it.
    os.setsid()
    faulthandler.disable()
    gc.disable()
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    try:
        with allocation_limit(), time_limit(seconds, module):
            act(notes)
        notes.outcome = "survived"
    except TimedOut as error:
        notes.where = error.where or notes.where
        notes.reason, notes.outcome = f"gave no answer within {seconds:.3g} s", "timed_out"
    except (SystemExit, KeyboardInterrupt) as error:
        notes.where = _site(module, error) or notes.where
        notes.reason, notes.outcome = f"was ended by {type(error).__name__}({error})", "died"
    except BaseException as error:
        notes.where = _site(module, error) or notes.where
        notes.reason = f"raised {type(error).__name__}"
        notes.outcome = "out_of_memory" if is_out_of_memory(error) else "survived"


def _site(module: torch.nn.Module | None, error: BaseException) -> str:
    return failing_module(module, error) if module is not None else ""


def _watch(child: int, notes: Notes, started: float, seconds: float) -> Rehearsal:
    """Wait for the child, end it when it is late, and judge."""
    pause, late, over = 0.001, False, False
    before = peak_memory()
    try:
        while True:
            ended, status, usage = os.wait4(child, os.WNOHANG)
            if ended:
                over = True
                break
            if time.monotonic() - started > seconds + GRACE_SECONDS:
                late = True
                _end(child)
                _, status, usage = os.wait4(child, 0)
                over = True
                break
            time.sleep(pause)
            pause = min(0.005, pause * 1.5)
    except ChildProcessError:
        over = True
        return Rehearsal("inconclusive", "was awaited by somebody else")
    finally:
        if not over:
            _end(child)
            os.waitpid(child, 0)
    used = usage.ru_utime + usage.ru_stime - FORKING_SECONDS
    busy = used > BUSY_SHARE * (time.monotonic() - started)
    grown = usage.ru_maxrss * 1024 - before
    place: dict[str, Any] = {"stage": notes.stage, "where": notes.where, "busy": busy, "taken": grown}
    taken = f" and had taken {format_bytes(grown)}" if grown > NOTABLE_BYTES else ""
    if late:
        if not busy:
            return Rehearsal("inconclusive", "waited in C and could not be interrupted", **place)
        reason = f"gave no answer within {seconds:.3g} s{taken} and could not be interrupted"
        return Rehearsal("timed_out", reason, **place)
    if notes.outcome:
        return Rehearsal(notes.outcome, notes.reason + (taken if notes.outcome == "timed_out" else ""), **place)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Rehearsal("died", f"died with signal {number} ({signal.Signals(number).name})", **place)
    return Rehearsal("died", f"was ended with exit status {os.WEXITSTATUS(status)}", **place)


def _end(child: int) -> None:
    """Kill the child and what it started."""
    for kill in (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
