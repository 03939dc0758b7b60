"""Where in the user's code a finding lives."""

import re

import pytest
from torch import nn

import utils
from utils.adapters.location import code_location


class Inner(nn.Module):
    """Holds one of PyTorch's own layers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


LINE = Inner.forward.__code__.co_firstlineno


@pytest.mark.parametrize("where", ["0", "0.linear", "0.linear.weight", "0.linear.nothing"])
def test_the_class_that_holds_a_layer_counts(where):
    """PyTorch's own classes are skipped; a parameter belongs to its owner."""
    model = nn.Sequential(Inner())
    assert code_location(model, where) == f"test_location.py:{LINE} (class Inner)"


def test_a_model_of_torch_layers_alone_has_no_location():
    """Nobody mends nn.Sequential."""
    assert code_location(nn.Sequential(nn.Linear(2, 2)), "0.weight") == ""


def test_a_loaded_model_names_its_own_file():
    """model.py as in the Gist, whatever it was compiled under, and the line of forward."""
    loaded = utils.load_model("example:gpt")
    found = re.fullmatch(r"model\.py:(\d+) \(class CausalAttention\)", code_location(loaded.module, "blocks.1.attn"))
    line = loaded.files["model.py"].splitlines()[int(found[1]) - 1]
    assert "def forward" in line


def test_a_class_without_forward_counts_by_its_constructor():
    """An inherited forward is somebody else's."""

    class Child(Inner):
        def __init__(self):
            super().__init__()

    assert code_location(Child(), "linear").endswith("(class Child)")
