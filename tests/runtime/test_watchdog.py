"""Limits of time and memory, rehearsals in a copy of the process, and caught output."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from utils.runtime import rehearsal
from utils.runtime.printing import KEPT, captured_output
from utils.runtime.rehearsal import rehearse
from utils.runtime.resources import allocation_limit, available_memory, is_out_of_memory, total_memory
from utils.runtime.watchdog import TimedOut, failing_module, time_limit, working_module


class Inner(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act() or x


def model_that(act):
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(Inner(act)))


def forever():
    while True:
        pass


def stubborn():
    while True:
        try:
            forever()
        except Exception:
            continue


def in_thread(function):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    thread.join(20)
    return answers[0]


@pytest.mark.parametrize("act", [forever, stubborn, lambda: time.sleep(100)])
def test_a_block_that_does_not_end_is_interrupted_and_its_module_named(act):
    model = model_that(act)
    started = time.monotonic()
    with pytest.raises(TimedOut, match=r"no answer within 0\.2 s") as caught, time_limit(0.2, model):
        model(torch.randn(1, 2))
    assert caught.value.where == "1.0"
    assert time.monotonic() - started < 3
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 or "timeout" in str(signal.getsignal(signal.SIGALRM))


def test_other_threads_are_interrupted_too():
    model = model_that(forever)

    def limited():
        try:
            with time_limit(0.2, model):
                model(torch.randn(1, 2))
        except TimedOut as error:
            return error.where, error.seconds
        return None

    assert in_thread(limited) == ("1.0", 0.2)


def test_what_ends_in_time_is_left_alone():
    def quick():
        with time_limit(5):
            pass
        return "done"

    assert quick() == in_thread(quick) == "done"


def test_an_outer_alarm_rings_after_an_inner_one():
    rung = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    left = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with contextlib.suppress(TimedOut), time_limit(0.1):
            time.sleep(5)
        assert not rung
        time.sleep(0.4)
        assert rung
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *left)


def test_modules_are_found_in_frames_and_tracebacks():
    seen = []
    model = model_that(lambda: seen.append(working_module(model, sys._getframe())))
    model(torch.randn(1, 2))
    assert seen == ["1.0"]
    assert working_module(model, sys._getframe()) == working_module(None, sys._getframe()) == ""
    model = model_that(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        model(torch.randn(1, 2))
    assert failing_module(model, caught.value) == "1.0"


def burn_in_c():
    matrix = torch.randn(1500, 1500)
    torch.linalg.multi_dot([matrix] * 4000)


def grow():
    kept = []
    while True:
        kept.append(torch.ones(4_000_000))


def own_error():
    raise ValueError("its own affair")


def stop(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "outcome", "reason"),
    [
        (lambda: None, "survived", ""),
        (own_error, "survived", "raised ValueError"),
        (lambda: os._exit(3), "died", "was ended with exit status 3"),
        (lambda: os._exit(0), "died", "was ended with exit status 0"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "died", "died with signal 9 (SIGKILL)"),
        (lambda: ctypes.string_at(0), "died", "died with signal 11 (SIGSEGV)"),
        (stop(SystemExit(2)), "died", "was ended by SystemExit(2)"),
        (stop(KeyboardInterrupt()), "died", "was ended by KeyboardInterrupt()"),
        (stop(MemoryError()), "out_of_memory", "raised MemoryError"),
        (forever, "timed_out", "gave no answer within 0.5 s"),
        (lambda: time.sleep(100), "timed_out", "gave no answer within 0.5 s"),
    ],
)
def test_rehearsals_end_as_they_would_here(act, outcome, reason):
    def rehearsed(notes):
        notes.stage, notes.where = "a pass", "block"
        act()

    result = rehearse(rehearsed, 0.5)
    assert (result.outcome, result.reason) == (outcome, reason)
    assert (result.stage, result.where) == ("a pass", "block")
    assert result.ok == (outcome == "survived")


def test_a_rehearsal_changes_nothing_here(capfd):
    values, tensor, folder = [1], torch.zeros(3), os.getcwd()

    def act(notes):
        values.append(2)
        tensor.add_(1)
        os.chdir("/")
        print("text")
        os.system("echo more")

    assert rehearse(act, 5).outcome == "survived"
    assert (values, tensor.tolist(), os.getcwd()) == ([1], [0, 0, 0], folder)
    assert capfd.readouterr() == ("", "")


def test_a_loop_in_c_is_ended(monkeypatch):
    monkeypatch.setattr(rehearsal, "GRACE_SECONDS", 0.3)
    result = rehearse(lambda notes: burn_in_c(), 0.5)
    assert (result.outcome, result.busy) == ("timed_out", True)
    assert result.reason == "gave no answer within 0.5 s and could not be interrupted"


def test_waiting_in_c_may_be_the_fault_of_forking(monkeypatch):
    monkeypatch.setattr(rehearsal, "GRACE_SECONDS", 0.3)

    def act(notes):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(100)

    result = rehearse(act, 0.3)
    assert (result.outcome, result.ok) == ("inconclusive", True)


def test_waiting_in_python_is_told_from_computing():
    assert not rehearse(lambda notes: time.sleep(100), 0.5).busy
    assert rehearse(lambda notes: forever(), 0.5).busy


def test_no_rehearsal_where_a_process_cannot_be_copied(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert rehearse(lambda notes: os._exit(1), 1) == rehearsal.Rehearsal(
        "inconclusive", "cannot be copied on this machine"
    )


def test_training_in_a_copy_after_training_here():
    """Threads of the parent's pools do not exist in the child; nothing there may wait for them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(64), nn.Linear(64, 1))
    image = torch.randn(64, 3, 16, 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model(image).sum().backward()
        assert rehearse(lambda notes: model(image).sum().backward(), 20).outcome == "survived"
    finally:
        torch.set_num_threads(threads)


def test_memory_is_limited_and_the_limit_lifted():
    with allocation_limit(300e6), pytest.raises((RuntimeError, MemoryError)) as caught:
        grow()
    assert is_out_of_memory(caught.value)
    assert torch.ones(100_000_000).sum() == 1e8
    assert 0 < available_memory() <= total_memory()


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_has_many_names(error, memory):
    assert is_out_of_memory(error) == memory


def test_output_is_caught_in_python_and_below(capfd):
    streams = sys.stdout, sys.stderr
    with captured_output() as printed:
        print("x" * 5000)
        sys.stderr.write("error")
        os.write(1, b"below")
        subprocess.run(["echo", "a program"], check=True)
        thread = threading.Thread(target=lambda: print("elsewhere", flush=True))
        thread.start()
        thread.join()
    assert printed.count == 5001 + 5 + 5 + 10
    assert printed.start == "x" * KEPT
    assert (sys.stdout, sys.stderr) == streams
    assert "elsewhere" in capfd.readouterr().out


def test_streams_come_back_after_an_error():
    streams = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), captured_output():
        sys.stdout = None
        1 / 0  # noqa: B018
    assert (sys.stdout, sys.stderr) == streams


def test_streams_that_are_closed_or_missing_do_no_harm(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with captured_output() as printed:
        print("text", end="")
    assert (printed.count, printed.start, sys.stderr) == (4, "text", None)
