"""Gradient flow: parts that never train, told apart; look-alikes left alone."""

import pytest
import torch
from torch import nn

from utils.adapters import ModelSpec
from utils.test_functions import check_gradient_flow


def codes(result):
    """Return (code, where) of each finding."""
    return [(finding.code, finding.where) for finding in result.findings]


def test_detached_submodule(tiny):
    """The attention's output is detached: it works and never trains."""
    result = check_gradient_flow(tiny.GPT(fault="detached"))
    assert ("detached_submodule", "blocks.1.attn") in codes(result)
    assert "get no gradient" in result.findings[0].message and result.status == "fail"


def test_unused_module(tiny):
    """A layer that forward() never calls."""
    result = check_gradient_flow(tiny.GPT(fault="unused"))
    assert codes(result) == [("unused_parameter", "extra")]
    assert result.findings[0].severity == "fail" and "never runs" in result.findings[0].message


def test_block_left_out_of_the_loop(tiny):
    """A block that is never run is no expert that was not chosen."""
    model = tiny.GPT(layers=3)
    model.forward = lambda input_ids: model.head(model.norm(model.blocks[1](model.blocks[0](model.tok(input_ids)))))
    assert ("unused_parameter", "blocks.2") in codes(check_gradient_flow(model, spec=ModelSpec(task="causal_lm")))


def test_backward_crash(tiny):
    """An in-place change of a tensor that the backward pass needs."""
    result = check_gradient_flow(tiny.GPT(fault="in_place"))
    assert codes(result) == [("backward_crash", "TinyGPT")]
    assert "modified by an inplace operation" in result.findings[0].message


def test_no_gradient_at_all(tiny):
    """The whole forward runs under no_grad."""
    model = tiny.GPT()
    inner = model.forward
    model.forward = lambda input_ids: torch.no_grad()(inner)(input_ids)
    result = check_gradient_flow(model)
    assert codes(result) == [("detached_submodule", "TinyGPT")]


def test_exploding_gradient(tiny):
    """Weights far too large."""
    model = tiny.GPT()
    with torch.no_grad():
        model.head.weight.mul_(1e8)
    result = check_gradient_flow(model)
    assert [finding.code for finding in result.findings] == ["exploding_gradient"] and result.status == "fail"


def test_gradient_that_is_not_finite(tiny):
    """the norm of zero has no slope: the loss is fine, the gradient is not."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            x = self.enter(x)
            return self.leave(x) + (x - x.detach()).square().sum(-1, keepdim=True).sqrt()

    result = check_gradient_flow(Root())
    assert codes(result) == [("exploding_gradient", "enter.bias")]
    assert "not finite" in result.findings[0].message


def test_stray_frozen_parameter(tiny):
    """One matrix in the middle is frozen: unusual."""
    model = tiny.GPT()
    model.blocks[1].mlp[0].weight.requires_grad_(False)
    result = check_gradient_flow(model)
    assert result.status == "warn" and codes(result) == [("frozen_parameter", "blocks.1.mlp.0.weight")]
    assert check_gradient_flow(model, spec=ModelSpec(frozen=("blocks.1.mlp",))).status == "pass"


@pytest.mark.parametrize("purpose", ["embedding", "first_blocks", "all_but_head"])
def test_frozen_on_purpose(tiny, purpose):
    """Whole parts frozen together are a plan, not an accident."""
    model = tiny.GPT()
    parts = {"embedding": model.tok, "first_blocks": model.blocks[0], "all_but_head": model.blocks}
    parts[purpose].requires_grad_(False)
    if purpose == "all_but_head":
        model.tok.requires_grad_(False)
    assert check_gradient_flow(model).findings == ()


def test_expert_not_routed(tiny):
    """Experts that this batch did not choose are no fault."""
    assert check_gradient_flow(tiny.Experts()).findings == ()


def test_zero_gradients_are_no_fault(tiny):
    """Key biases and parts behind a zero-initialised projection have gradients of exactly zero."""
    model = tiny.GPT()
    nn.init.zeros_(model.blocks[0].attn.proj.weight)
    result = check_gradient_flow(model)
    assert result.status == "pass" and "blocks.0.attn.qkv.weight" in result.details["zero_gradient"]


def test_batchnorm_and_tied_weights(tiny):
    """Sound models of other kinds."""
    assert check_gradient_flow(tiny.ConvNet()).status == "pass"
    assert check_gradient_flow(tiny.GPT(tied=True)).status == "pass"


def test_auxiliary_head_in_training_only():
    """A head that runs in train mode only is used."""

    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.side = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            x = self.body(x)
            return (self.head(x), self.side(x)) if self.training else self.head(x)

    assert check_gradient_flow(Auxiliary()).findings == ()


def test_no_parameters():
    """Nothing to check is a skip with a reason."""
    result = check_gradient_flow(nn.Softmax(dim=-1))
    assert result.status == "skip" and result.why == "the model has no parameters"
