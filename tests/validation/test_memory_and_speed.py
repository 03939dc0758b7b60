"""Memory: exact bytes against a hand count. Speed: loops found by counting, fused recurrence left alone."""

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter
from utils.test_functions import check_inference_speed, check_memory_footprint
from utils.validation import inference_speed, memory_footprint
from utils.validation.check import Budget
from utils.validation.memory_footprint import _quadratic, saved_bytes


class Tanh(nn.Module):
    """Two layers whose saved tensors can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16, bias=False), nn.Linear(16, 3, bias=False)

    def forward(self, x):
        return self.leave(torch.tanh(self.enter(x)))


def test_activations_by_hand():
    """Saved per sample: the input 8, the tanh output 16 once for two uses, log-probabilities 3, a label."""
    adapter = ModelAdapter(Tanh())
    per_sample = saved_bytes(adapter, 3) - saved_bytes(adapter, 2)
    assert per_sample == 4 * (8 + 16 + 3) + 8


def test_weights_gradients_and_optimizer(tiny):
    """Tied weights count once; frozen ones need no gradient and no moments."""
    model = tiny.GPT(tied=True)
    details = check_memory_footprint(model).details
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert (details["weights"], details["gradients"], details["adamw_state"]) == (4 * numbers, 4 * numbers, 8 * numbers)
    model.blocks.requires_grad_(False)
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert check_memory_footprint(model).details["gradients"] == 4 * (numbers - blocks)
    assert details["length"] == 64 and details["activations_how"] == "measured"


def test_measured_peak_of_a_training_step_by_hand():
    """At the end of the backward pass: weights, both gradients; before it, everything that was saved."""
    details = check_memory_footprint(Tanh()).details
    weights = 4 * (8 * 16 + 16 * 3)
    # Weights, their gradients, the gradient of tanh's output and of its input, and what the loss still holds.
    assert weights + weights <= details["measured_peak"] <= 2 * weights + 4 * (2 * 16 + 8 * 3) + 64
    assert details["measured_peak_length"] is None


def test_breakdown_as_a_picture(tiny):
    """Four bars with their sizes."""
    picture = check_memory_footprint(tiny.GPT()).pictures[0].html()
    assert all(part in picture for part in ("weights", "gradients", "AdamW moments", "activations"))


def test_quadratic_extension_is_exact(tiny):
    """Attention's memory is a quadratic of the length, so three lengths give every other."""
    adapter = ModelAdapter(tiny.GPT())
    sizes = [saved_bytes(adapter, 1, n) for n in (8, 16, 32)]
    assert abs(_quadratic([8, 16, 32], sizes, 64) / saved_bytes(adapter, 1, 64) - 1) < 0.01


def test_device_too_small(tiny, monkeypatch):
    """Weights beyond the device fail, training beyond it warns."""
    monkeypatch.setattr("utils.validation.memory_footprint.device_memory", lambda device: 100)
    result = check_memory_footprint(tiny.GPT())
    assert result.status == "fail" and "the weights take" in result.why
    monkeypatch.setattr("utils.validation.memory_footprint.device_memory", lambda device: 60_000)
    result = check_memory_footprint(tiny.GPT())
    assert result.status == "warn" and "training at batch size 1 takes" in result.why


def test_loop_over_positions(tiny):
    """A Python loop over the sequence grows with it."""
    result = check_inference_speed(tiny.GPT(fault="loop"))
    assert result.status == "warn" and result.findings[0].code == "slow_python_loop"
    assert "per position" in result.why


def test_loop_over_samples():
    """A Python loop over the batch."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x):
            return torch.stack([self.layer(row).relu() for row in x])

    assert "per sample" in check_inference_speed(Loop()).why


def test_fused_recurrence_and_batched_models_pass(tiny):
    """An LSTM's loop is inside its kernel."""
    for model in (tiny.LSTM(), tiny.GPT(), tiny.ConvNet()):
        result = check_inference_speed(model)
        assert result.status == "pass", result.why
        assert result.value > 0 and result.details["iqr_seconds"] >= 0 and result.details["repeats"] >= 3


def test_two_passes_are_timed_where_no_time_is_left(tiny):
    """They say what was left out; with time there are three at least."""
    budget = Budget(0)
    details = inference_speed.check_inference_speed(ModelAdapter(tiny.MLP()), budget).details
    assert details["repeats"] == 2 and budget.reduced == ["2 timed passes, the first of this size among them"]
    assert inference_speed.check_inference_speed(ModelAdapter(tiny.MLP()), Budget(5)).details["repeats"] >= 3


def test_the_peak_is_not_measured_where_no_time_is_left(tiny, monkeypatch):
    monkeypatch.setattr(memory_footprint, "forward_seconds", lambda *_: pytest.fail("measured"))
    budget = Budget(0)
    outcome = memory_footprint.check_memory_footprint(ModelAdapter(tiny.MLP()), budget)
    assert "measured_peak" not in outcome.details
    assert budget.reduced == ["the peak of a training step was not measured"]
