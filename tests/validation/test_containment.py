"""Models that hang, print, end the process or take all memory get a report, and the caller lives."""

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.rehearsal import Rehearsal
from utils.tier1_critical_validation import TIER1
from utils.validation import Check, Outcome, containment, run_checks, runner
from utils.validation.containment import UnusableModel, contained, open_model


class Dangerous(nn.Module):
    """Does something harmful in an inner module, at inference, in training or in the backward pass."""

    def __init__(self, act, when="always"):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(8, 16), Part(act, when), nn.Linear(16, 3)

    def forward(self, x):
        return self.leave(self.inner(self.enter(x)))


class Part(nn.Module):
    def __init__(self, act, when):
        super().__init__()
        self.act, self.when = act, when

    def forward(self, x):
        if self.when == "always" or (self.when == "train" and self.training):
            self.act()
        if self.when == "backward" and x.requires_grad:
            x.register_hook(lambda grad: self.act())
        return x.relu()


def forever():
    while True:
        pass


def grow():
    kept = []
    while True:
        kept.append(torch.ones(1 << 24))


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(containment, "REHEARSAL_SECONDS", 1.0)
    monkeypatch.setattr(containment, "CONFIRMING_SECONDS", 0.5)


FATAL = {
    "exit": (lambda: os._exit(3), "process_died", "exit status 3"),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "process_died", "signal 9 (SIGKILL)"),
    "segfault": (lambda: ctypes.string_at(0), "process_died", "signal 11 (SIGSEGV)"),
    "sys_exit": (lambda: sys.exit(4), "process_died", "SystemExit(4)"),
    "interrupt": (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "process_died", "KeyboardInterrupt"),
    "loop": (forever, "timed_out", "no answer within 1 s"),
    "sleep": (lambda: time.sleep(1e9), "timed_out", "no answer within 0.5 s"),
    "memory": (lambda: (_ for _ in ()).throw(MemoryError()), "out_of_memory", "memory ran out"),
}


@pytest.mark.parametrize("kind", FATAL)
def test_fatal_models_get_a_report(kind):
    act, code, words = FATAL[kind]
    model = Dangerous(act).train()
    started = time.monotonic()
    report = utils.validate(model, progress=False)
    assert time.monotonic() - started < 10
    assert report.verdict == "NOT READY" and model.training
    assert [(f.code, f.severity, f.where) for f in report.findings] == [(code, "fail", "inner")]
    assert words in report.findings[0].message
    assert [result.check for result in report.results] == [check.id for check in TIER1]
    assert all(result.could_not_run for result in report.results[1:])
    assert report.results[-1].why == "not run, see above"
    assert report.model == "Dangerous" and report.parameters == sum(p.numel() for p in model.parameters())
    assert "NOT READY" in report.text() and report.to_html()


@pytest.mark.parametrize(
    ("when", "stage"), [("train", "a forward pass in train mode"), ("backward", "a backward pass")]
)
def test_what_only_training_brings_out(when, stage):
    report = utils.validate(Dangerous(lambda: os._exit(1), when), progress=False)
    assert report.findings[0].code == "process_died"
    assert stage in report.findings[0].message


def test_without_isolation_python_code_is_still_interrupted(monkeypatch):
    monkeypatch.setattr(containment, "OPENING_SECONDS", 0.5)
    for kind, words in (("loop", "no answer within"), ("sys_exit", "SystemExit(4), which ends the program")):
        report = utils.validate(Dangerous(FATAL[kind][0]), progress=False, isolate=False)
        finding = report.findings[0]
        assert (finding.code, finding.where) == (FATAL[kind][1], "inner")
        assert words in finding.message


def test_waiting_only_in_the_copy_is_no_fault(tiny):
    """A thread of the parent's does not exist in the child."""
    parent = os.getpid()
    report = utils.validate(Dangerous(lambda: os.getpid() == parent or time.sleep(100)), progress=False)
    assert report.model == "Dangerous" and not any(f.code == "timed_out" for f in report.findings)
    assert len([r for r in report.results if not r.could_not_run]) > 5


def test_a_check_that_hangs_or_exits_is_its_own_result(tiny, monkeypatch):
    monkeypatch.setattr(runner, "HANGING_SECONDS", 0.3)
    monkeypatch.setattr(runner, "HANGING_AGAIN_SECONDS", 0.1)
    model = Dangerous(forever, when="never")

    def hang(adapter, budget):
        adapter.module.inner.when = "always"
        adapter.module(torch.randn(2, 8))

    def leave(adapter, budget):
        sys.exit(1)

    def fine(adapter, budget):
        print("y" * 3000)
        return Outcome(1, 1, "fine")

    checks = [Check(name, 1, "?", act) for name, act in (("a", hang), ("b", hang), ("c", leave), ("d", fine))]
    started = time.monotonic()
    report = run_checks(ModelAdapter(model), checks, time_budget=0.01, progress=False)
    assert time.monotonic() - started < 5
    assert [r.status for r in report.results] == ["fail", "fail", "fail", "pass"]
    assert [(f.code, f.where) for f in report.findings] == [("timed_out", "inner"), ("process_died", "Dangerous")]
    assert report.results[1].why == "no answer within 0.1 s"
    assert (report.results[3].details["printed"], len(report.results[3].details["printed_start"])) == (3001, 2000)
    assert model.inner.when == "never"


def test_ctrl_c_of_the_user_passes(tiny):
    def interrupted(adapter, budget):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        run_checks(ModelAdapter(tiny.MLP()), [Check("x", 1, "?", interrupted)], progress=False)
    assert sys.stdout is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_alarm_of_the_callers_own_passes_through(tiny):
    class Alarm(BaseException):
        pass

    def interrupted(adapter, budget):
        adapter.module.train()
        raise Alarm("time is up")

    model = tiny.MLP().eval()
    with pytest.raises(Alarm, match="time is up"):
        run_checks(ModelAdapter(model), [Check("x", 1, "?", interrupted)], progress=False)
    assert not model.training


def test_prints_stay_away_from_the_terminal(capfd):
    report = utils.validate(Dangerous(lambda: print("z" * 100_000)), progress=False)
    assert capfd.readouterr() == ("", "")
    assert max(result.details.get("printed", 0) for result in report.results) > 100_000


def test_opening_returns_what_is_ready_and_raises_what_cannot_be(tiny):
    adapter = ModelAdapter(tiny.MLP())
    assert open_model(adapter) is adapter
    with pytest.raises(AdapterError):
        open_model("no module")
    with pytest.raises(UnusableModel, match=r"no answer within 0\.1 s"), contained(tiny.MLP(), 0.1):
        time.sleep(5)


def test_rehearsal_is_cheap(tiny):
    """For a model of no size it costs less than a tenth of a second."""
    model, costs = tiny.GPT(), []
    for _ in range(3):
        started = time.perf_counter()
        ModelAdapter(model)
        alone = time.perf_counter() - started
        started = time.perf_counter()
        open_model(model)
        costs.append(time.perf_counter() - started - alone)
    assert min(costs) < 0.3


def test_checks_survive_a_limit_of_memory(tmp_path):
    """Under a limit that long texts exceed, every check has a result and the process ends well."""
    script = textwrap.dedent("""
        import resource, torch, utils
        from torch import nn
        from utils.adapters import ModelAdapter
        from utils.tier1_critical_validation import TIER1
        from utils.validation import run_checks

        class Wide(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Embedding(30000, 32), nn.Linear(32, 30000)
                self.config = {"vocab_size": 30000, "max_position_embeddings": 4096}

            def forward(self, input_ids):
                x = self.embed(input_ids)
                return self.head(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])

        torch.set_num_threads(1)
        model = Wide()
        utils.validate(nn.Sequential(nn.Linear(2, 2)), progress=False, time_budget=0.1)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 150_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        adapter = ModelAdapter(model)
        wanted = ("shape_robustness", "numerical_stability", "registration", "inference_speed")
        checks = [check for check in TIER1 if check.id in wanted]
        report = run_checks(adapter, checks, progress=False)
        print(len(report.results), sum("out of memory" in r.why for r in report.results))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results, hungry = map(int, done.stdout.split())
    assert results == 4
    assert 1 <= hungry <= 3


@pytest.mark.parametrize(("taken", "code"), [(9e9, "out_of_memory"), (5e8, "timed_out")])
def test_a_pass_that_only_takes_memory_is_no_loop(monkeypatch, taken, code):
    seen = Rehearsal("timed_out", "gave no answer within 15 s", "the first forward pass", taken=taken)
    monkeypatch.setattr(containment, "rehearse", lambda *_: seen)
    (finding,) = utils.validate(nn.Linear(2, 2), progress=False).findings
    assert finding.code == code and ("memory" in finding.hint or "lists that grow" in finding.hint) == (taken > 1e9)


class Recursive(nn.Module):
    """Calls itself, without end or to a depth, on what it is given or on what a layer makes of it."""

    def __init__(self, depth, first):
        super().__init__()
        self.depth, self.first, self.layer = depth, first, nn.Linear(8, 8)

    def forward(self, x, depth=0):
        return self.layer(x) if depth == self.depth else self.forward(self.first(x), depth + 1)


def test_endless_recursion_is_named():
    (finding,) = utils.validate(Recursive(-1, nn.Identity()), progress=False).findings
    assert finding.code == "shape_crash" and "RecursionError" in finding.message
    assert finding.location.startswith("test_containment.py:")
    # Where only some inputs get so far, they may be the wrong ones.
    report = utils.validate(Recursive(-1, nn.Linear(8, 8)), progress=False)
    assert report.verdict == "INCOMPLETE" and "RecursionError" in report.results[0].why
    assert not any(f.severity == "fail" for f in utils.validate(Recursive(2, nn.ReLU()), progress=False).findings)
