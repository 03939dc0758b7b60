"""Corrections of low rank beside frozen matrices, on every layer of a model, and what only looks like one."""

import pytest
from torch import nn

from utils.adapters import ModelAdapter
from utils.validation.check import Check
from utils.validation.gradient_flow import check_gradient_flow
from utils.validation.runner import run_check


class Corrected(nn.Module):
    """A frozen layer and two matrices whose product may be added to it."""

    def __init__(self, base, inner, outer):
        super().__init__()
        self.base, self.inner, self.outer = base.requires_grad_(False), inner, outer

    def forward(self, x):
        return self.base(x) + self.outer(self.inner(x))


def corrected(wide, narrow, rank=4):
    """Return a correction of a frozen layer."""
    inner, outer = nn.Linear(wide, rank, bias=False), nn.Linear(rank, narrow, bias=False)
    nn.init.zeros_(outer.weight)
    return Corrected(nn.Linear(wide, narrow), inner, outer)


class Beside(nn.Module):
    """A frozen layer whose neighbour is as wide as it is."""

    def __init__(self):
        super().__init__()
        self.base, self.other = nn.Linear(48, 64).requires_grad_(False), nn.Linear(40, 48)

    def forward(self, x):
        return self.base(self.other(x).relu())


@pytest.mark.parametrize(
    ("build", "codes"),
    [
        (lambda: nn.Sequential(corrected(12, 32), nn.ReLU(), corrected(32, 3)), []),
        (lambda: nn.Sequential(Beside(), nn.ReLU(), nn.Linear(64, 3)), ["frozen_parameter"]),
    ],
)
def test_low_rank_on_every_layer(build, codes):
    """The last layer has fewer outputs than the correction has ranks; a product of its shape is one all the same."""
    result = run_check(ModelAdapter(build()), Check("check", 1, "?", check_gradient_flow), 10.0)
    assert [finding.code for finding in result.findings] == codes
