"""Inside the block anything may happen to the model; afterwards it is as it was."""

import pytest
import torch
from torch import nn

from utils.runtime.isolation import ModelChangedError, preserved


class Counting(nn.Module):
    """Has everything that a forward pass can disturb."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.calls = 0
        self.cache = {}
        self.history = []

    def forward(self, x):
        self.calls += 1
        self.cache["last"] = x
        self.history.append(x.sum())
        self.surprise = x
        return self.drop(self.norm(self.linear(x))) + self.frozen


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Counting()


def test_everything_is_put_back(model):
    model.linear.weight.grad = torch.ones(4, 4)
    grad = model.linear.weight.grad
    model.norm.eval()
    before, modes = snapshot(model), [child.training for child in model.modules()]
    with preserved(model, 0):
        assert model.linear.weight.grad is None
        model.train()
        model(torch.randn(3, 4)).sum().backward()
        model.frozen.requires_grad_(True)
        model.extra = nn.Linear(1, 1)
        model.register_buffer("late", torch.zeros(1))
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert [child.training for child in model.modules()] == modes
    assert model.linear.weight.grad is grad
    assert torch.equal(grad, torch.ones(4, 4))
    assert model.linear.bias.grad is None
    assert not model.frozen.requires_grad
    assert (model.calls, model.cache, model.history) == (0, {}, [])
    assert not hasattr(model, "surprise")
    assert not hasattr(model, "extra")
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_random_streams_are_the_blocks_own(model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with preserved(model, 7):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with preserved(model, 7):
        assert torch.equal(torch.rand(2), first)


def test_a_replaced_buffer_and_parameter_come_back(model):
    mean, weight = model.norm.running_mean, model.linear.weight
    with preserved(model):
        model.norm.running_mean = torch.ones(4)
        model.linear.weight = nn.Parameter(torch.zeros(4, 4))
    assert model.norm.running_mean is mean
    assert model.linear.weight is weight


def test_everything_is_put_back_after_an_error(model):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), preserved(model):
        model(torch.randn(3, 4))
        1 / 0  # noqa: B018
    assert model.calls == 0
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_training_inside_the_block_is_an_error_that_names_the_parameter(model):
    with pytest.raises(ModelChangedError) as caught, preserved(model), torch.no_grad():
        model.linear.weight.add_(1)
        model.linear.bias.add_(1)
    text = str(caught.value)
    assert "changed the values of linear.weight and 1 more parameter." in text
    assert "never its parameters" in text
    assert "in-place operations" in text


def test_one_changed_parameter_reads_as_one(model):
    with pytest.raises(ModelChangedError, match=r"the values of linear\.bias\. A model may"), preserved(model):
        model.linear.bias.data.add_(0)
        model.linear.bias.detach().add_(1)
