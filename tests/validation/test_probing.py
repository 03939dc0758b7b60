"""Classes that a model switches off hide no fault and make none."""

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.probing import live, logits

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
