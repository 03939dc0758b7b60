"""A gated block returns its input at zero, its block's answer at one, whatever the answer is wrapped in."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from utils.growth.gated_block import GatedBlock

Answer = namedtuple("Answer", ["stream", "extra"])
WRAPPED = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, None),
    "list": lambda y: [y, 3],
    "dict": lambda y: {"stream": y, "extra": 4},
    "ordered": lambda y: OrderedDict(stream=y),
    "named": lambda y: Answer(y, "more"),
    "nested": lambda y: ((y, None), 1),
}


class Inner(nn.Module):
    """Doubles its input."""

    def __init__(self, wrap=lambda y: y, kind="sliding"):
        super().__init__()
        self.scale, self.wrap, self.attention_type = nn.Parameter(torch.tensor(2.0)), wrap, kind

    def forward(self, x, mask=None):
        return self.wrap(x * self.scale)


def stream_of(output):
    if isinstance(output, torch.Tensor):
        return output
    return next(iter(output.values())) if isinstance(output, dict) else stream_of(output[0])


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_zero_is_the_identity_one_is_the_block_and_half_the_mean(wrap):
    block, x = GatedBlock(Inner(wrap)), torch.randn(3, 4)
    for gate, expected in ((0.0, x), (0.5, 1.5 * x), (1.0, 2 * x)):
        block.gate.data.fill_(gate)
        output = block(x)
        assert type(output) is type(wrap(x))
        assert torch.allclose(stream_of(output), expected)
    assert torch.equal(stream_of(GatedBlock(Inner(wrap))(x)), x)


def test_what_comes_beside_the_stream_stays():
    output = GatedBlock(Inner(WRAPPED["dict"]))(torch.ones(2))
    assert output["extra"] == 4
    assert GatedBlock(Inner(WRAPPED["named"]))(torch.ones(2)).extra == "more"


def test_arguments_by_name_are_understood():
    x = torch.randn(3, 4)
    assert torch.equal(GatedBlock(Inner())(x=x, mask=None), x)


def test_the_gate_learns_first_and_the_block_after_it():
    block, x = GatedBlock(Inner()), torch.ones(4)
    block(x).sum().backward()
    assert block.gate.grad == 4
    assert block.block.scale.grad == 0
    block.gate.data.fill_(0.5)
    block(x).sum().backward()
    assert block.block.scale.grad == 2


def test_surroundings_find_the_blocks_attributes():
    block = GatedBlock(Inner(kind="full"))
    assert block.attention_type == "full"
    assert block.scale is block.block.scale
    with pytest.raises(AttributeError):
        block.nothing  # noqa: B018


def test_the_gate_has_the_precision_of_the_block():
    assert GatedBlock(Inner().to(torch.bfloat16)).gate.dtype == torch.bfloat16
    assert GatedBlock(nn.ReLU()).gate.dtype == torch.float32


@pytest.mark.parametrize("wrap", [lambda y: y[:, :2], lambda y: None, lambda y: {1, 2}])
def test_an_answer_of_another_shape_is_refused(wrap):
    with pytest.raises(ValueError, match="an answer of the shape of its input"):
        GatedBlock(Inner(wrap))(torch.ones(3, 4))


def test_an_answer_in_a_container_of_its_own_is_refused():
    with pytest.raises(ValueError, match="a tuple, list or dict that holds one"):
        GatedBlock(Inner(Held))(torch.ones(3, 4))


@dataclass
class Held:
    """A container of its own."""

    stream: torch.Tensor


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_a_closed_gate_keeps_out_what_is_infinite_and_learns_from_the_rest(value):
    x = torch.tensor([1.0, -3e38, 3.0])
    given = x.clone().requires_grad_()
    block = GatedBlock(Inner(lambda y: torch.cat([torch.tensor([5.0, value]), y[2:]])))
    output = block(given)
    assert torch.equal(output, x)
    output.sum().backward()
    assert block.gate.grad == (5.0 - 1.0) + (6.0 - 3.0)
    assert torch.equal(given.grad, torch.ones(3))
    block.gate.data.fill_(0.5)
    assert bool(block(x).isfinite()[1]) is False
