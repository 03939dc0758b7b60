"""Rectifiers that let nothing through, by the place that calls them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.validation.check import Check
from utils.validation.gradient_flow import check_gradient_flow
from utils.validation.runner import run_check


def dead(model):
    result = run_check(ModelAdapter(model), Check("flow", 1, "?", check_gradient_flow), 20.0)
    return [(finding.where, finding.severity) for finding in result.findings if finding.code == "dead_relu"]


class Stack(nn.Module):
    """Three layers of one list with the same rectifier behind each; one layer is shifted down."""

    def __init__(self, shifted=None, shared=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32 if i else 8, 32) for i in range(3))
        self.act = nn.ReLU() if shared else functional.relu
        self.head = nn.Linear(32, 3)
        if shifted is not None:
            nn.init.constant_(self.layers[shifted].bias, -100.0)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = self.act(layer(x)) + (x if index else 0)
        return self.head(x)


@pytest.mark.parametrize("shared", [False, True])
def test_each_layer_of_a_loop_counts(shared):
    """The same call, or the same module, serves living layers as well."""
    assert dead(Stack(1, shared)) == [("layers.1", "fail")]
    assert dead(Stack(None, shared)) == []


def test_two_calls_between_layers_count_each():
    """Matrices of the module's own leave no part to tell the calls apart."""

    class Bare(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.enter, self.head = nn.Linear(8, 32), nn.Linear(32, 3)
            self.inner = nn.Parameter(torch.randn(32, 32) / 6)
            self.shift = nn.Parameter(torch.full((32,), shift))

        def forward(self, x):
            x = torch.relu(self.enter(x))
            return self.head(x + torch.relu(x @ self.inner + self.shift))

    assert dead(Bare(-50.0)) == [("shift", "fail")]
    assert dead(Bare(0.0)) == []


def test_clamp_with_a_way_around():
    """A rectifier that only cuts peaks off is zero for ordinary input, and the layer learns all the same."""

    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.head = nn.Linear(8, 32), nn.Linear(32, 3)

        def forward(self, x):
            x = self.enter(x)
            return self.head(functional.relu(x - functional.relu(x - 50)))

    assert dead(Capped()) == []


def test_loop_over_time_is_one_place():
    """A late step may be silent: the layer lives through the others."""

    class Fading(nn.Module):
        def __init__(self):
            super().__init__()
            self.again, self.head = nn.Linear(32, 32), nn.Linear(32, 3)

        def forward(self, x):
            h = x
            for _ in range(4):
                h = functional.relu(self.again(h)) * 10 - 8
            return self.head(h + functional.relu(self.again(x)))

    assert dead(Fading()) == []


class Gated(nn.Module):
    """A gate of its own, or a layer that ended before another did, behind a rectifier."""

    def __init__(self, gate=0.5, early=0.0):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 4)
        self.g = nn.Parameter(torch.full((64,), gate))
        nn.init.constant_(self.a.bias, early)

    def forward(self, x):
        first, h = self.a(x), functional.gelu(self.b(x))
        return self.head(h + functional.relu(self.g) * h + functional.relu(first))


def test_what_feeds_the_call_is_named():
    """The part that ended last may have nothing to do with what the rectifier is given."""
    assert dead(Gated(gate=-1.0)) == [("g", "fail")]
    assert dead(Gated(early=-50.0)) == [("a", "fail")]
    assert dead(Gated()) == []
