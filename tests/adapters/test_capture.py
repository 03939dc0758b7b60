"""Watching a model changes nothing."""

import pytest
import torch
from torch import nn

from utils.adapters.capture import first_tensor, named_tensors, observe, tensor_at


def test_observe_sees_every_submodule_in_order_and_leaves() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    seen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    with observe(model, lambda name, child, inputs, output: seen.append((name, inputs[0].shape, output.shape))):
        model(torch.rand(2, 3))
    assert seen == [("0", (2, 3), (2, 4)), ("1", (2, 4), (2, 4)), ("", (2, 3), (2, 4))]
    with pytest.raises(RuntimeError), observe(model, lambda *_: None):
        model(torch.rand(2, 9))
    assert not any(child._forward_hooks for child in model.modules())


def test_tensors_by_path() -> None:
    tensor = torch.ones(1)
    value = {"a": [None, (tensor, 3)], "b": torch.zeros(1)}
    assert [path for path, _ in named_tensors(value)] == ["a.1.0", "b"]
    assert tensor_at(value, "a.1.0") is tensor
    assert first_tensor(value) is tensor
    assert first_tensor([None, "text"]) is None
    with pytest.raises(KeyError):
        tensor_at(value, "a")
