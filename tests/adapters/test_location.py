"""Where in the user's code a finding lives."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import utils
from utils.adapters.location import code_location, crash_location


class Inner(nn.Module):
    """Holds one of PyTorch's own layers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


class Outer(nn.Module):
    """Makes and calls parts in every usual way."""

    def __init__(self, wide=False):
        super().__init__()
        self.first, self.second = Inner(), nn.ReLU()
        self.gate: nn.Parameter = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.zeros(2))
        self.twice = nn.Linear(2, 2)
        if wide:
            self.twice = nn.Linear(2, 2)

    def forward(self, x):
        x = self.twice(self.first(x)) + self.gate
        return self.twice(self.second(x + self.table))


LINES = Path(__file__).read_text().splitlines()


def text_at(location):
    """Return the line that a location names."""
    return LINES[int(re.fullmatch(r"test_location.py:(\d+) \(.*\)", location)[1]) - 1].strip()


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("0", "def forward(self, x):"),
        ("0.linear", "self.linear = nn.Linear(2, 2)"),
        ("0.linear.weight", "self.linear = nn.Linear(2, 2)"),
        ("0.linear.nothing", "self.linear = nn.Linear(2, 2)"),
        ("0.absent", "def forward(self, x):"),
    ],
)
def test_the_class_that_holds_a_layer_counts(where, line):
    """PyTorch's own classes are skipped: what counts is the line that makes them in their owner."""
    location = code_location(nn.Sequential(Inner()), where)
    assert text_at(location) == line and location.endswith("(class Inner)")


@pytest.mark.parametrize(
    ("where", "at", "line"),
    [
        ("first", "made", "self.first, self.second = Inner(), nn.ReLU()"),
        ("first", "called", "x = self.twice(self.first(x)) + self.gate"),
        ("first", "inside", "def forward(self, x):"),
        ("first.linear", "called", "return self.linear(x)"),
        ("second", "called", "return self.twice(self.second(x + self.table))"),
        ("gate", "made", "self.gate: nn.Parameter = nn.Parameter(torch.ones(2))"),
        ("gate", "called", "self.gate: nn.Parameter = nn.Parameter(torch.ones(2))"),
        ("table", "inside", 'self.register_buffer("table", torch.zeros(2))'),
        ("twice", "made", "def forward(self, x):"),
        ("twice", "called", "def forward(self, x):"),
        ("Outer", "made", "def forward(self, x):"),
    ],
)
def test_the_line_that_makes_or_calls_a_part(where, at, line):
    """One candidate is the line; two say nothing, and ``forward`` it is."""
    assert text_at(code_location(Outer(), where, at)) == line


def test_the_line_that_raised():
    """The innermost line of the model's own code, not torch's below it."""
    with pytest.raises(RuntimeError) as caught:
        Outer()(torch.ones(1, 3))
    location = crash_location(Outer(), caught.value)
    assert text_at(location) == "return self.linear(x)" and location.endswith("(class Inner)")
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 2)(torch.ones(1, 3))
    assert crash_location(nn.Linear(2, 2), caught.value) == ""


def test_a_model_of_torch_layers_alone_has_no_location():
    """Nobody mends nn.Sequential."""
    assert code_location(nn.Sequential(nn.Linear(2, 2)), "0.weight") == ""


def test_a_loaded_model_names_its_own_file():
    """model.py as in the Gist, whatever it was compiled under, and the line of forward."""
    loaded = utils.load_model("example:gpt")
    found = re.fullmatch(r"model\.py:(\d+) \(class CausalAttention\)", code_location(loaded.module, "blocks.1.attn"))
    line = loaded.files["model.py"].splitlines()[int(found[1]) - 1]
    assert "def forward" in line


def test_what_is_inherited_is_where_it_is_written():
    """A class that changes one method counts by that; one that changes nothing by its parent's forward."""

    class Child(Inner):
        def helper(self):
            return self.linear

    class Same(Inner):
        """Adds nothing."""

    assert text_at(code_location(Child(), "linear")) == "self.linear = nn.Linear(2, 2)"
    assert text_at(code_location(Child(), "Child")) == "def helper(self):"
    assert code_location(Same(), "Same").endswith("(class Inner)")
