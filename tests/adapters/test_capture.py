"""Watching a model changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import first_tensor, named_tensors, observe, tensor_at, unfused_attention


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


def test_nested_tensors_are_left_out() -> None:
    """They have no shape; an observer that asks for one would raise inside the model."""

    class Ragged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nested.nested_tensor([x[0], x[1, :1]])

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ragged = Ragged()

        def forward(self, x: Tensor) -> Tensor:
            return self.ragged(x).to_padded_tensor(0.0)

    seen: dict[str, Any] = {}
    model = Padded()
    with observe(model, lambda name, child, given, output: seen.update({name: output})):
        whole = model(torch.ones(2, 3, 4))
    assert seen["ragged"] is None and seen[""] is whole
    ragged = model.ragged(torch.ones(2, 3, 4))
    assert [path for path, _ in named_tensors({"a": ragged, "b": whole})] == ["b"]
    failure = str(ModelAdapter(nn.Sequential(nn.Linear(4, 4), Ragged())).failure)
    assert "forward() of Sequential returned a nested tensor and no plain tensor" in failure


@pytest.mark.parametrize("fused", [True, False])
def test_observed_attention_runs_its_operators_one_by_one(fused: bool) -> None:
    """The answer is the same, and the user's own choice comes back."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    seen: list[str] = []
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with torch.no_grad():
            plain = model(x, src_key_padding_mask=padding)
            with observe(model, lambda name, *_: seen.append(name)):
                observed = model(x, src_key_padding_mask=padding)
            assert torch.backends.mha.get_fastpath_enabled() is fused
            with pytest.raises(ZeroDivisionError), unfused_attention():
                raise ZeroDivisionError
            assert torch.backends.mha.get_fastpath_enabled() is fused
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.allclose(plain[~padding], observed[~padding], atol=1e-5) and "layers.1.linear2" in seen
