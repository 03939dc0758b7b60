"""Numbers that float16 or bfloat16 cannot hold, and arithmetic that can do without them."""

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter
from utils.validation.check import Check
from utils.validation.low_precision import cast, check_low_precision, relative_error
from utils.validation.runner import run_check


def check(model, config=None):
    return run_check(ModelAdapter(model, config), Check("low", 1, "?", check_low_precision), 20.0)


class Middle(nn.Module):
    """A function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def around(function):
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), Middle(function), nn.Linear(32, 4))


UNSAFE = {
    "squares": lambda x: (300 * x).square() / 300**2,
    "exp without maximum": lambda x: (8 * x).exp() / (8 * x).exp().sum(-1, keepdim=True),
    "mask of -1e9": lambda x: x.masked_fill(x > 1, -1e9).softmax(-1),
    "tiny epsilon": lambda x: x * 1e-5 / ((x * 1e-5).square().mean(-1, keepdim=True) + 1e-12).sqrt(),
    "large sums": lambda x: x + 1e-30 * (x.abs() * 3000).sum(-1, keepdim=True).square(),
    "lost digits": lambda x: (x + 4096) - 4096,
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_arithmetic(name):
    """Finite and right in float32; infinite, refused or wrong in float16."""
    torch.manual_seed(0)
    result = check(around(UNSAFE[name]))
    assert [(f.code, f.where, f.severity) for f in result.findings] == [("low_precision_unsafe", "2", "fail")]
    assert "float16" in result.why and result.findings[0].reproduction


SAFE = {
    "softmax": lambda x: (8 * x).softmax(-1),
    "lowest number in the mask": lambda x: x.masked_fill(x > 1, torch.finfo(x.dtype).min).softmax(-1),
    "float32 inside": lambda x: ((300 * x.float()).square() / 300**2).to(x.dtype),
    "root mean square": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5),
}


@pytest.mark.parametrize("name", SAFE)
def test_safe_arithmetic(name):
    """The same ideas, written for lower precision."""
    torch.manual_seed(0)
    result = check(around(SAFE[name]))
    assert result.findings == () and result.value < 0.1


def test_other_kinds_of_model(tiny):
    """Recurrent layers see the cast weights; convolutions and batch norms run."""
    for model in (tiny.GPT(), tiny.LSTM(), tiny.ConvNet()):
        result = check(model)
        assert result.status == "pass" and len(result.details["errors"]) >= 2


def test_parameter_too_large():
    """A single number beyond 65504."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    nn.init.constant_(model[0].bias, 1e6)
    result = check(model)
    assert result.findings[0].where == "0.bias" and "does not fit into float16" in result.why


def test_refusal_is_no_finding_here():
    """A dtype written into the code is another check's finding."""
    result = check(around(lambda x: x @ torch.ones(32, 32)))
    assert result.status == "skip" and "does not run in lower precision" in result.why


def test_where_it_does_not_apply():
    """Already low, without parameters, or not finite to begin with."""
    assert check(nn.Sequential(nn.Linear(8, 4)).bfloat16()).status == "skip"
    assert "not finite in float32" in check(around(lambda x: x / 0.0)).why


def test_cast_leaves_the_model_alone():
    """The very same tensors are back, also in recurrent layers."""
    model = nn.LSTM(4, 4)
    before = [id(p) for p in model.parameters()], [id(w) for w in model._flat_weights]
    with cast(model, torch.bfloat16):
        assert model._flat_weights[0].dtype == torch.bfloat16
    assert before == ([id(p) for p in model.parameters()], [id(w) for w in model._flat_weights])


def test_relative_error():
    """Against the spread of each row, and the median over rows."""
    reference = torch.tensor([[0.0, 3.0, 0.0, -3.0], [10.0, 13.0, 10.0, 7.0], [0.0, 3.0, 0.0, -3.0]])
    shifted = reference.clone()
    shifted[2] = 100
    assert relative_error(shifted, reference) == 0
    assert relative_error(reference * 1.0 + torch.tensor([1.0, 0, 0, 0]), reference) == pytest.approx(1 / 18**0.5)
