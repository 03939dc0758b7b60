"""Parameters that hold other values for a while."""

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter
from utils.validation.substitution import parameters_as, zero


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def test_parameters_hold_what_was_made_inside_the_block_only(model):
    adapter, before = ModelAdapter(model), list(model.parameters())
    values = [parameter.clone() for parameter in before]
    with parameters_as(adapter, ["0.weight"], zero):
        assert not model[0].weight.any() and model[2].weight is before[2]
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), values, strict=True))


def test_a_value_that_cannot_be_made_leaves_none_behind(model):
    """The first was swapped when the second failed."""
    adapter, before, divisors = ModelAdapter(model), list(model.parameters()), [2.0]
    with (
        pytest.raises(IndexError),
        parameters_as(adapter, ["0.weight", "2.weight"], lambda parameter: parameter / divisors.pop()),
    ):
        pass
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
