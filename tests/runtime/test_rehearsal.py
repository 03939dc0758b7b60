"""Models are rehearsed in a copy of the process before their first passes in this one."""

import ctypes
import gc
import os
import sys
import time
import types
import weakref

import pytest
import torch
from torch import nn

import utils
from utils import ModelSpec
from utils.adapters import ModelAdapter
from utils.runtime import rehearsal
from utils.runtime.errors import AdapterError
from utils.runtime.watchdog import time_limit


def forever():
    while True:
        pass


class Counted(nn.Module):
    """Leaves a mark in a file for every process that calls it, and then does something."""

    def __init__(self, path, act=lambda: None):
        super().__init__()
        self.net, self.path, self.act = nn.Linear(4, 2), path, act

    def forward(self, x):
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")
        self.act()
        return self.net(x)


def processes(path):
    return set(path.read_text().split())


def test_an_adapter_made_by_hand_is_rehearsed_once(tmp_path):
    path = tmp_path / "calls"
    model = Counted(path)
    adapter = ModelAdapter(model)
    assert len(processes(path)) == 2
    ModelAdapter(adapter)
    ModelAdapter(model)
    assert len(processes(path)) == 2
    ModelAdapter(Counted(path))
    assert len(processes(path)) == 3


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: os._exit(3), "was ended with exit status 3"),
        (lambda: ctypes.string_at(0), "died with signal 11"),
        (lambda: sys.exit(1), r"was ended by SystemExit\(1\)"),
        (forever, "gave no answer within 0.5 s"),
        (lambda: time.sleep(100), "gave no answer within 0.5 s"),
    ],
)
def test_an_adapter_of_a_fatal_model_is_an_error(act, words, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "ONCE_SECONDS", 0.5)
    monkeypatch.setattr(rehearsal, "CONFIRMING_SECONDS", 0.2)
    path = tmp_path / "calls"
    model = Counted(path, act)
    for _ in range(2):
        with pytest.raises(AdapterError, match=words):
            ModelAdapter(model)
    assert len(processes(path)) <= 3


def test_waiting_in_the_copy_alone_is_no_fault_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "ONCE_SECONDS", 0.5)
    parent = os.getpid()
    model = Counted(tmp_path / "calls", lambda: os.getpid() == parent or time.sleep(100))
    assert ModelAdapter(model).failure is None


def test_no_rehearsal_inside_a_limit(tmp_path):
    path = tmp_path / "calls"
    with time_limit(20):
        ModelAdapter(Counted(path))
    assert processes(path) == {str(os.getpid())}


def test_validation_rehearses_once_itself(tmp_path):
    path = tmp_path / "calls"
    utils.validate(Counted(path), progress=False, time_budget=1)
    assert len(processes(path)) == 2


@pytest.mark.parametrize("fatal", [1, 100])
def test_lengths_are_rehearsed_too(fatal):
    class Picky(nn.Module):
        """Ends the process at lengths of one token, or of many."""

        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

        def forward(self, input_ids):
            if input_ids.shape[1] == 1 == fatal or input_ids.shape[1] >= fatal > 1:
                os._exit(4)
            return self.head(self.embed(input_ids))

    report = utils.validate(Picky(), progress=False)
    assert [f.code for f in report.findings] == ["process_died"]
    assert "exit status 4 in a forward pass at another length" in report.findings[0].message


def test_a_model_that_was_refused_gets_another_chance(tmp_path, monkeypatch):
    """After it was mended, the same object is run."""
    monkeypatch.setattr(rehearsal, "ONCE_SECONDS", 0.5)
    model = Counted(tmp_path / "calls", forever)
    with pytest.raises(AdapterError, match="gave no answer"):
        ModelAdapter(model)
    model.act = lambda: None
    assert ModelAdapter(model).failure is None


class Halving(nn.Module):
    """Ends for inputs of one sign."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 4)

    def forward(self, x):
        while bool((x < 0).any()):
            x = x * 2
        return self.net(x)


def test_inputs_that_hang_say_nothing_of_others(monkeypatch):
    monkeypatch.setattr(rehearsal, "ONCE_SECONDS", 0.5)
    model = Halving()
    with pytest.raises(AdapterError, match="gave no answer"):
        ModelAdapter(model)
    spec = ModelSpec(example_inputs={"x": torch.rand(2, 16)})
    assert ModelAdapter(model, spec=spec).failure is None
    with pytest.raises(AdapterError, match="gave no answer"):
        ModelAdapter(model)


def test_what_changes_the_call_is_rehearsed_again(tmp_path, monkeypatch):
    count = []
    monkeypatch.setattr(rehearsal, "rehearse", lambda *given: count.append(1) or rehearsal.Rehearsal("survived"))
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    spec = ModelSpec(example_inputs={"input": torch.randn(2, 4)})
    adapter = ModelAdapter(model, spec=spec)
    for again in (
        lambda: ModelAdapter(adapter),
        lambda: ModelAdapter(model, spec=spec),
        lambda: ModelAdapter(model, spec=ModelSpec(example_inputs=spec.example_inputs)),
    ):
        again()
        assert len(count) == 1
    plain = ModelAdapter(model)
    assert len(count) == 2
    ModelAdapter(plain)
    ModelAdapter(model, spec=ModelSpec())
    assert len(count) == 2
    part = model[1]
    part.forward = types.MethodType(lambda own, x: x * 2, part)
    ModelAdapter(model)
    assert len(count) == 3
    monkeypatch.setattr(nn.Linear, "forward", lambda own, x: x @ own.weight)
    ModelAdapter(model)
    assert len(count) == 4


def test_what_is_remembered_of_a_rehearsal_keeps_no_model_alive():
    model = nn.Sequential(nn.Linear(4, 4))
    model.forward = types.MethodType(lambda own, x: own[0](x), model)
    spec = ModelSpec(factory=lambda kept=model: kept)
    ModelAdapter(model, spec=spec)
    key, watched = id(model), weakref.ref(model)
    assert key in rehearsal._SURVIVED
    del model, spec
    gc.collect()
    assert watched() is None and key not in rehearsal._SURVIVED


@pytest.mark.slow
def test_a_large_process_still_tells_waiting_from_work(run_python):
    """Being the child of a large process costs processor time of its own, which is no sign of work."""
    run_python(
        """
        ballast = [bytearray(b"x" * 10_000_000) for _ in range(250)]
        objects = [{number: str(number)} for number in range(3_000_000)]
        import time
        import torch
        from utils.runtime import rehearsal
        from utils.runtime.rehearsal import rehearse

        waited = rehearse(lambda notes: time.sleep(100), 0.5, torch.nn.Linear(2, 2))
        assert waited.outcome == "timed_out" and not waited.busy, waited

        def loop(notes):
            while True:
                pass

        worked = rehearse(loop, 1.0, torch.nn.Linear(2, 2))
        assert worked.outcome == "timed_out" and worked.busy, worked
        """
    )
