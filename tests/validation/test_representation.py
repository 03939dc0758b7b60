"""How much of its width a layer uses: which modules are measured, and the largest rank that each can have."""

import pytest
import torch
from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.tier2_advanced_analysis import TIER2
from utils.validation.representation import largest_rank
from utils.validation.runner import run_check

CHECK = next(check for check in TIER2 if check.id == "representation")


def measured(model, examples=None):
    torch.manual_seed(0)
    return run_check(ModelAdapter(model.eval(), spec=ModelSpec(example_inputs=examples)), CHECK, 3.0)


@pytest.mark.parametrize(
    ("layer", "width", "largest"),
    [
        (nn.Linear(8, 64), 64, 8),
        (nn.Linear(64, 8), 8, 8),
        (nn.Conv2d(1, 16, 3), 16, 9),
        (nn.Conv2d(4, 8, 1, groups=4), 8, 4),
        (nn.Conv1d(2, 40, 3), 40, 6),
        (nn.Conv2d(3, 8, 1, groups=1), 8, 3),
        (nn.LayerNorm(8), 8, 8),
    ],
)
def test_the_largest_rank_is_what_the_layer_can_reach(layer, width, largest):
    """Random inputs reach it, and no more; few vectors lower it."""
    assert largest_rank(layer, width, 1000) == largest
    assert largest_rank(layer, width, 4) == min(largest, 3)
    shape = {nn.Conv2d: (40, getattr(layer, "in_channels", 0), 6, 6), nn.Conv1d: (40, 2, 9)}.get(
        type(layer), (400, getattr(layer, "in_features", 8))
    )
    with torch.no_grad():
        output = layer.double()(torch.randn(shape, dtype=torch.float64)).movedim(1, -1).reshape(-1, width)
    rank = int(torch.linalg.matrix_rank(output - output.mean(0)))
    assert rank == largest or isinstance(layer, nn.LayerNorm)


def test_a_layer_of_another_kind_has_no_smaller_limit():
    """What only derives from a linear layer need not be linear."""

    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    assert largest_rank(Squared(2, 16), 16, 1000) == 16


class Parts(nn.Module):
    """Blocks that are dicts of layers, never called themselves."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(16, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.inner(x)
        for block in self.blocks:
            x = x + block["b"](block["a"](x).tanh())
        return self.head(x)


def test_blocks_that_are_not_called_are_followed_by_their_layers():
    """And no layer outside of them."""
    found = measured(Parts()).details["layers"]
    assert list(found) == ["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"]
    assert all(row["used"] <= 1 and row["limit"] <= row["width"] for row in found.values())
    assert found["blocks.0.a"]["limit"] == 8


def test_covariances_that_would_fill_memory_are_thinned_out(monkeypatch):
    """Some layers of all, and the report says so."""
    monkeypatch.setattr("utils.validation.representation.LARGEST_SUMS", 2 * 16**2)
    found = measured(Parts())
    assert list(found.details["layers"]) == ["blocks.0.a", "blocks.1.a", "blocks.1.b"]
    assert found.details["reduced"] == ["about 2 of 4 layers"]


def test_convolutions_over_time_are_vectors_of_channels():
    """Not of places."""
    model = nn.Sequential(nn.Conv1d(2, 12, 3), nn.ReLU(), nn.Conv1d(12, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    found = measured(model, {"input": torch.randn(4, 2, 20)}).details["layers"]
    assert {name: row["width"] for name, row in found.items()} == {"0": 12, "2": 4} and found["0"]["limit"] == 6
