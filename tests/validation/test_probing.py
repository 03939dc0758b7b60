"""Who is to blame for a crash, lengths that fit the time, and classes that a model switches off."""

import time

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.capture import observe
from utils.validation import probing
from utils.validation.check import Budget, Check
from utils.validation.probing import ModelCrash, live, logits
from utils.validation.runner import run_check
from utils.validation.watching import running_modules

SPEC = ModelSpec(task="causal_lm")


class Switched(nn.Module):
    """A language model whose last three classes are switched off."""

    def __init__(self, inner, value):
        super().__init__()
        self.inner, self.value, self.config = inner, value, inner.config

    def forward(self, input_ids):
        scores = self.inner(input_ids)
        off = torch.arange(scores.shape[-1], device=scores.device) >= scores.shape[-1] - 3
        return scores.masked_fill(off, self.value)


VALUES = [float("-inf"), torch.finfo(torch.float32).min, -1e9, -1e4]
TOO_LARGE = {torch.finfo(torch.float32).min: ["low_precision_unsafe"], -1e9: ["low_precision_unsafe"]}
"""Numbers that float16 does not have: masked_fill() raises there, and that is a fault of its own."""


@pytest.mark.parametrize("value", VALUES)
def test_a_leak_behind_switched_off_classes_is_found(tiny, value):
    """Beside minus infinity, or a huge number, every real difference would pass for rounding."""
    report = utils.validate(Switched(tiny.GPT(mask="none"), value), spec=SPEC, progress=False)
    codes = [finding.code for finding in report.findings if finding.severity == "fail"]
    assert codes == ["future_leakage", *TOO_LARGE.get(value, [])]


@pytest.mark.parametrize("value", VALUES)
def test_a_sound_model_with_switched_off_classes_has_no_fault(tiny, value):
    """No label is drawn from them, and no type is too small for them."""
    report = utils.validate(Switched(tiny.GPT(), value), spec=SPEC, progress=False)
    assert [finding.code for finding in report.findings] == TOO_LARGE.get(value, []), report.text()


def test_dropout_behind_switched_off_classes_is_found(tiny):
    """The comparison of calls takes no measure from what is infinite."""
    model = Switched(tiny.GPT(), float("-inf"))
    model.inner.norm.register_forward_hook(lambda _, __, output: nn.functional.dropout(output, 0.5, True))
    report = utils.validate(model, spec=SPEC, progress=False)
    assert "dropout_in_eval" in [finding.code for finding in report.findings]


def test_live_classes_are_settled_once(tiny):
    """The same columns go in every call; what has no such column stays whole."""
    adapter = ModelAdapter(Switched(tiny.GPT(), -1e9), spec=SPEC)
    inputs = adapter.example_inputs(2)
    assert logits(adapter, inputs).shape[-1] == 47 and logits(adapter, inputs, whole=True).shape[-1] == 50
    plain = ModelAdapter(tiny.GPT(), spec=SPEC)
    whole = torch.randn(2, 5)
    assert live(plain, whole, "other") is whole


class Masked(nn.Module):
    """torch's own encoder with a padding mask made from the ids; in eval mode it works on nested tensors inside."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(40, 16, padding_idx=0), nn.Parameter(torch.randn(64, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, input_ids):
        padding = input_ids.eq(0) & ~input_ids.eq(0).all(1, keepdim=True)
        hidden = self.embed(input_ids) + self.position[: input_ids.shape[1]]
        hidden = self.encoder(hidden, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * kept).sum(1) / kept.sum(1))


def test_nested_tensors_inside_a_sound_model_are_no_fault():
    report = utils.validate(Masked(), progress=False)
    assert not [f for f in report.findings if f.severity == "fail"] and not report.incomplete, report.text()


FUNCTION = "__torch_function__"
LOUD = """
def run(self, func, types, args=(), kwargs=None):
    if func is torch.tanh: raise RuntimeError("own")
    return func(*args, **(kwargs or {}))
"""
"""What fails as a mode of this package might: at what a model does without harm."""


def test_what_an_observer_raises_is_no_crash_of_the_model():
    """The same pass without it runs, so the model is not to blame, and no check says so."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    adapter = ModelAdapter(model)
    inputs = adapter.example_inputs()

    def fragile(name, child, given, output):
        output.no_such_attribute  # noqa: B018

    with pytest.raises(AttributeError, match="no_such_attribute"), observe(model, fragile):
        logits(adapter, inputs)
    # A mode is told by the module of its code.
    space = {"__name__": "utils.validation.loud", "torch": torch}
    exec(LOUD, space)
    with pytest.raises(RuntimeError, match="own"), type("Loud", (TorchFunctionMode,), {FUNCTION: space["run"]})():
        logits(adapter, inputs)

    def observed(adapter, budget):
        with observe(model, fragile):
            logits(adapter, inputs)

    result = run_check(adapter, Check("x", 1, "?", observed), 5.0)
    assert result.could_not_run and not result.findings and "AttributeError" in result.why
    assert not any(child._forward_hooks for child in model.modules())


def test_a_crash_of_the_model_stays_one_under_an_observer():
    """It crashes without the observer too; hooks that were there come back in their order."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    adapter = ModelAdapter(model)
    inputs = {adapter.main_input: torch.randn(2, 7)}
    mine = model[0].register_forward_pre_hook(lambda *_: None)
    with observe(model, lambda *_: None):
        before = [list(child._forward_hooks) for child in model.modules()]
        with pytest.raises(ModelCrash) as caught, running_modules(model):
            logits(adapter, inputs)
        assert [list(child._forward_hooks) for child in model.modules()] == before
    assert caught.value.where == "0" and list(model[0]._forward_pre_hooks) == [mine.id]


def test_a_crash_that_does_not_come_again_is_the_models_where_nobody_watched():
    """Chance and state make such crashes; only code of an observer in between is a reason to doubt."""

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.armed = nn.Linear(8, 4), False

        def forward(self, x):
            if self.armed:
                self.armed = False
                raise ValueError("once")
            return self.layer(x)

    adapter = ModelAdapter(Once())
    adapter.module.armed = True
    with pytest.raises(ModelCrash) as caught:
        logits(adapter, adapter.example_inputs())
    assert caught.value.where == "Once"


@pytest.mark.parametrize(("power", "expected"), [(1.0, 512), (2.0, 256)])
def test_the_longest_length_that_fits_follows_the_measured_growth(tiny, monkeypatch, power, expected):
    """Ten passes of 512 tokens take a second where time grows evenly, and four where it grows with every pair."""
    adapter = ModelAdapter(tiny.GPT(longest=512), spec=SPEC)
    taken = {n: 0.1 * (n / 512) if power == 1 else 0.4 * (n / 512) ** 2 for n in (32, 128)}
    monkeypatch.setattr(probing, "forward_seconds", lambda adapter, length, batch_size=1: taken[length])
    assert probing.longest_length(adapter, Budget(1.5), passes=10) == expected


def test_no_pass_is_measured_where_no_time_is_left(tiny, monkeypatch):
    adapter = ModelAdapter(tiny.GPT(longest=512), spec=SPEC)
    monkeypatch.setattr(probing, "forward_seconds", lambda *_: pytest.fail("measured"))
    budget = Budget(0)
    assert probing.longest_length(adapter, budget, passes=1) == 64
    assert budget.reduced == ["length 64 stands for the maximum of 512"]


@pytest.mark.parametrize(("seconds", "passes"), [(0.0, 2), (0.1, 1)])
def test_a_long_pass_is_measured_once(monkeypatch, seconds, passes):
    """The first of quick ones takes time for what is made once."""
    adapter = ModelAdapter(nn.Linear(8, 4))
    calls = []

    def slow(adapter, inputs):
        calls.append(time.sleep(seconds))

    monkeypatch.setattr(probing, "logits", slow)
    monkeypatch.setattr(probing, "LONG_PASS", 0.05 if seconds else 1e9)
    assert probing.forward_seconds(adapter, None) >= seconds and len(calls) == passes
