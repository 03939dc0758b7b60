"""Shared tensors and repeated blocks."""

from typing import Any

from torch import nn

from utils.adapters.structure import blocks, tied_parameters


def test_ties(small: Any) -> None:
    assert tied_parameters(small.Nano()) == [("wte.weight", "head.weight")]
    assert tied_parameters(nn.Linear(2, 2)) == []


def test_blocks() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
    found = blocks(nn.ModuleDict({"layers": layers, "head": nn.Linear(4, 2)}))
    assert found.value == ["layers.0", "layers.1", "layers.2"]
    assert found.reason == "3 children of `layers` have the same parameter shapes"
    assert blocks(nn.Linear(2, 2)).value == []
    assert "no container" in blocks(nn.Linear(2, 2)).reason
