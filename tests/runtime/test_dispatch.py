"""Modules built without memory have the shapes of real ones, and torch's compiler is not imported for it."""

import json

import pytest
import torch
from torch import nn

from utils.runtime.dispatch import LARGEST, weightless


def decorated(size):
    """Return a module with what constructors do: initial values, masks, waves, rescaled weights."""
    module = nn.Module()
    module.layers = nn.Sequential(
        nn.Embedding(50, size), nn.Linear(size, size), nn.LayerNorm(size), nn.LSTM(size, size)
    )
    nn.init.trunc_normal_(module.layers[0].weight, std=0.02)
    nn.init.orthogonal_(module.layers[1].weight)
    angles = torch.outer(torch.arange(20), 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size))
    module.register_buffer("waves", torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))
    module.register_buffer("mask", torch.triu(torch.ones(20, 20, dtype=torch.bool), diagonal=1))
    module.register_buffer("order", torch.randint(0, 9, (5, 4)).repeat(1, 3).clamp(min=2))
    module.steps = nn.Parameter(torch.linspace(0, 1, size).log1p() * torch.randn(3, 1, dtype=torch.float64))
    module.cubes = nn.ParameterList(torch.randn(4, 4).tril() ** 3 for _ in range(2))
    return module


def test_shapes_and_dtypes_are_those_of_a_real_module():
    with weightless():
        empty = decorated(8)
    real = decorated(8).state_dict()
    assert {name: (value.shape, value.dtype) for name, value in empty.state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in real.items()
    }
    assert all(value.device.type == "meta" for value in empty.state_dict().values())


def test_large_results_take_no_memory():
    with weightless():
        table = nn.Linear(10**6, 10**6)
        pairs = torch.ones(10**6, 1) * torch.ones(1, 10**6)
        copies = torch.ones(4).repeat(LARGEST).clone()
        inverse = torch.linalg.inv(torch.ones(9, 9))
    assert table.weight.shape == pairs.shape == (10**6, 10**6) and pairs.device.type == "meta"
    assert copies.shape == (4 * LARGEST,) and inverse.shape == (9, 9) and inverse.device.type == "meta"


def test_values_and_other_devices_are_refused_as_on_the_meta_device():
    with weightless():
        numbers = torch.ones(3)
        for ask in (lambda: numbers.sum().item(), lambda: numbers.tolist(), lambda: numbers.to("cpu")):
            with pytest.raises((RuntimeError, NotImplementedError)):
                ask()
        assert numbers.unsqueeze_(0).shape == (1, 3)
        assert torch.zeros(2, device="cpu").add_(1).tolist() == [1, 1]


def test_the_compiler_is_not_imported(run_python):
    result = run_python(
        """
        import json, sys
        import torch
        from torch import nn
        from utils.runtime.dispatch import weightless

        with weightless():
            module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.TransformerEncoderLayer(8, 2))
            nn.init.normal_(module[0].weight * 2)
            torch.arange(0, 8, 2).float() ** 2
        print(json.dumps([name for name in ("torch._dynamo", "sympy", "onnx") if name in sys.modules]))
        """
    )
    assert json.loads(result.stdout.splitlines()[-1]) == []
