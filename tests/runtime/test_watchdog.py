"""Limits of time and memory, what a rehearsal in a copy of the process ends with, and caught output."""

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

from utils.runtime import rehearsal, watchdog
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


def in_thread(function, seconds=20):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    thread.join(seconds)
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


def outcome(outer, inner, act):
    """Run something inside two limits and say which blocks were ended, the inner one first."""
    ended = []
    try:
        with time_limit(outer):
            try:
                with time_limit(inner):
                    act()
            except TimedOut as error:
                ended.append(error.seconds)
            act()
    except TimedOut as error:
        ended.append(error.seconds)
    return ended


def anywhere(function):
    """Run a function in the main thread and in another one."""
    return function(), in_thread(function)


def short():
    end = time.monotonic() + 0.15
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize(
    ("outer", "inner", "act", "ended"),
    [
        (0.2, 5, forever, [0.2]),
        (0.2, 5, stubborn, [0.2]),
        (5, 0.05, short, [0.05]),
        (0.4, 0.2, forever, [0.2, 0.4]),
        (0.2, 5, short, [0.2]),
        (0.2, 0.2, forever, [0.2]),
        (5, 5, short, []),
    ],
)
def test_of_nested_limits_the_first_to_end_fires_and_ends_its_own_block(outer, inner, act, ended):
    started = time.monotonic()
    for found in anywhere(lambda: outcome(outer, inner, act)):
        assert found == ended or (outer == inner and found == [0.2, 0.2])
    assert time.monotonic() - started < 4


def test_many_limits_inside_one_another_and_in_turn():
    def run():
        ended = []
        try:
            with time_limit(0.5):
                while True:
                    try:
                        with time_limit(0.1), time_limit(3), time_limit(2):
                            forever()
                    except TimedOut as error:
                        ended.append(error.seconds)
        except TimedOut as error:
            ended.append(error.seconds)
        return ended

    for found in anywhere(run):
        assert found[-1] == 0.5 and set(found[:-1]) == {0.1} and len(found) <= 5


def test_limits_that_end_as_their_blocks_do_leave_nothing_behind():
    """The alarm may come while a limit is entered or left, which must not leak out of its block."""

    def run():
        late = 0
        for count in range(300):
            try:
                with time_limit(0.5), time_limit(count * 2e-6 + 1e-6):
                    pass
            except TimedOut:
                late += 1
        short()
        return late <= 300

    assert anywhere(run) == (True, True)


def test_a_limit_that_is_late_to_name_the_module_stays_in_its_block(monkeypatch):
    """In a large model that takes a while, in which the block may come to its end."""

    def slow(module, frame):
        time.sleep(0.02)
        return ""

    monkeypatch.setattr(watchdog, "working_module", slow)

    def run():
        leaks = []
        for count in range(60):
            try:
                with time_limit(0.005):
                    end = time.perf_counter() + 0.005 + 0.0005 * count
                    while time.perf_counter() < end:
                        pass
            except TimedOut:
                continue
            except BaseException as error:
                leaks.append(type(error).__name__)
        return leaks, watchdog.limited(), len(watchdog._PENDING)

    assert in_thread(run, 60) == ([], False, 0)


def test_an_interruption_that_arrives_on_the_way_out_ends_its_own_block(monkeypatch):
    """The thread may have left the block between the look at it and the exception."""
    stop, left = watchdog._Asynchronous._stop, []

    def late(limit):
        if not left:
            left.append(1)
            raise limit._kind
        stop(limit)

    def run():
        try:
            with time_limit(5):
                pass
        except TimedOut as error:
            return error.seconds, watchdog.limited()
        return None

    monkeypatch.setattr(watchdog._Asynchronous, "_stop", late)
    assert in_thread(run) == (5, False)


def test_a_limit_that_cannot_be_set_counts_for_nothing(monkeypatch):
    def run():
        with contextlib.suppress(RuntimeError), time_limit(5):
            pass
        return watchdog.limited()

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    thread = threading.Thread(target=lambda: answers.append(run()))
    answers = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda made: start(made) if made is thread else refuse(made))
    thread.start()
    thread.join(20)
    assert answers == [False]


def test_limits_of_two_threads_do_not_meet():
    answers = []

    def run(outer, inner):
        answers.append(outcome(outer, inner, forever))

    threads = [threading.Thread(target=run, args=limits) for limits in ((0.3, 5), (0.6, 0.3))]
    for thread in threads:
        thread.start()
    ended = outcome(0.2, 5, forever)
    for thread in threads:
        thread.join(10)
    assert (ended, sorted(answers)) == ([0.2], [[0.3], [0.3, 0.6]])


@pytest.mark.parametrize("interval", [0, 0.1])
def test_an_outer_alarm_rings_during_an_inner_limit(interval):
    rung = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    started = time.monotonic()
    left = signal.setitimer(signal.ITIMER_REAL, 0.1, interval)
    try:
        with pytest.raises(TimedOut), time_limit(0.45):
            forever()
        assert rung[0] - started < 0.3
        assert len(rung) == 1 if interval == 0 else len(rung) >= 2
        assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == bool(interval)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, previous)


def test_an_outer_alarm_that_raises_ends_the_block():
    def ring(*_):
        raise KeyError("the caller's own")

    previous = signal.signal(signal.SIGALRM, ring)
    left = signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyError, match="own"), time_limit(5):
            forever()
        assert signal.getsignal(signal.SIGALRM) is ring
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, previous)


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
