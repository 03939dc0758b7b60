"""Parameters that hold other values for a while, without their own tensors being touched."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter

FAINT = 0.01
"""Largest gain that counts as small."""


@contextmanager
def parameters_as(adapter: ModelAdapter, names: Iterable[str], make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let parameters hold ``make(parameter)`` inside the block; a tensor used in several places changes in all.

    Args:
        adapter: The model.
        names: Which parameters.
        make: Gets a parameter, detached, and returns what stands in for it.
    """
    wanted = {id(adapter.module.get_parameter(name)) for name in names}
    made: dict[int, nn.Parameter] = {}
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in adapter.module.modules():
            for key, parameter in module._parameters.items():
                if parameter is None or id(parameter) not in wanted:
                    continue
                if id(parameter) not in made:
                    value = make(parameter.detach()).to(parameter.dtype)
                    made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                swapped.append((module._parameters, key, parameter))
                module._parameters[key] = made[id(parameter)]
        with refreshed(adapter.module):
            yield
    finally:
        for owner, key, parameter in swapped:
            owner[key] = parameter


@contextmanager
def refreshed(module: nn.Module) -> Iterator[None]:
    """Let recurrent layers, which keep a list of their weights, see those that stand in at the moment."""
    recurrent = [(child, child._flat_weights) for child in module.modules() if isinstance(child, nn.RNNBase)]
    for child, _ in recurrent:
        child._flat_weights = [getattr(child, name, None) for name in child._flat_weights_names]
    try:
        yield
    finally:
        for child, kept in recurrent:
            child._flat_weights = kept


def faint_gains(adapter: ModelAdapter) -> list[str]:
    """Return the names of learned gains that all start at one small number.

    CaiT's LayerScale lets branches grow from 1e-5 on; what comes through them is faint at first and not lost.
    """
    names = []
    for name, parameter in adapter.module.named_parameters():
        if (
            parameter.requires_grad
            and parameter.is_floating_point()
            and parameter.numel() > 1 >= parameter.squeeze().dim()
        ):
            first = float(parameter.detach().flatten()[0])
            if 0 < abs(first) <= FAINT and bool((parameter.detach() == first).all()):
                names.append(name)
    return names


def zero(parameter: Tensor) -> Tensor:
    """Return zeros in the shape of a parameter; those of a matrix take the memory of one number."""
    if parameter.dim() != 2:
        return torch.zeros_like(parameter)
    return torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def noise(parameter: Tensor) -> Tensor:
    """Return small noise in the shape of a parameter."""
    return torch.randn_like(parameter) * 0.1
