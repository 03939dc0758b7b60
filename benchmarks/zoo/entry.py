"""One model of the zoo with the answer that a validator should give."""

from __future__ import annotations

import fnmatch
import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

FIRST = (nn.Embedding, nn.Conv2d, nn.Conv1d, nn.RNNBase, nn.Linear, nn.LayerNorm, nn.BatchNorm1d)
WARNED = ("memory_growth", "quadratic_memory", "slow_python_loop")


@dataclass(frozen=True)
class Entry:
    """A model and what is right to say about it."""

    name: str
    """Unique, of the form ``code/what``; sound models are ``sound/what``."""
    build: Callable[[], nn.Module]
    """Makes the model; `make` seeds it."""
    codes: tuple[str, ...] = ()
    """Codes accepted as right, the primary first; empty for a sound model."""
    where: tuple[str, ...] = ()
    """Accepted names of modules and parameters as `fnmatch` patterns; empty accepts the model as a whole only."""
    severity: str = "fail"
    """Severity that a finding must have at least."""
    spec: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `utils.ModelSpec`: what a user would say."""
    config: dict[str, Any] | None = None
    """Settings that come with the model."""
    source: str = ""
    """Address of the public thread, for a bug that was really made."""

    def make(self, seed: int = 0) -> nn.Module:
        """Return the model with weights drawn from `seed`."""
        random.seed(seed)
        torch.manual_seed(seed)
        return self.build()

    def names(self, where: str, root: str) -> bool:
        """Tell whether `where` names the faulty part of a model of class `root`."""
        if any(fnmatch.fnmatchcase(where, pattern) for pattern in self.where):
            return True
        return (not self.where or "" in self.where) and where in ("", root)


def broken(
    code: str,
    what: str,
    build: Callable[[], nn.Module],
    where: str | tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
    source: str = "",
    **spec: Any,
) -> Entry:
    """Describe a broken model; `where` is as in `Entry`, with ``""`` for the model as a whole."""
    places = (where,) if isinstance(where, str) else where
    severity = "warn" if code in WARNED else "fail"
    return Entry(f"{code}/{what}", build, (code, *also), places, severity, spec, config, source)


def sound(what: str, build: Callable[[], nn.Module], config: dict[str, Any] | None = None, **spec: Any) -> Entry:
    """Describe a sound model."""
    return Entry(f"sound/{what}", build, spec=spec, config=config)


def initialised(model: nn.Module, std: float = 0.02) -> nn.Module:
    """Draw the matrices and tables of a model as GPT-2 does, set its biases to zero, and return it."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
    return model


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Return the table ``(length, width)`` of Vaswani et al. 2017, section 3.5."""
    steps = torch.arange(length)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    return torch.stack((steps.sin(), steps.cos()), -1).flatten(1)


def plain_inputs(entry: Entry, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return arguments for a forward pass of a zoo model, a batch of two unless the entry has its own.

    Token ids stay below 50, which each vocabulary of the zoo has.
    """
    if "example_inputs" in entry.spec:
        return {name: value.clone() for name, value in entry.spec["example_inputs"].items()}
    made = torch.Generator().manual_seed(1)
    name = next(iter(inspect.signature(model.forward).parameters))
    shape: tuple[int, ...] = (2, 3, 32, 32)
    first = next((m for m in model.modules() if isinstance(m, FIRST)), None)
    if name in ("idx", "tokens", "input_ids") or isinstance(first, nn.Embedding):
        return {name: torch.randint(4, 50, (2, 12), generator=made)}
    if isinstance(first, nn.Conv2d):
        shape = (2, first.in_channels, 28, 28) if first.in_channels == 1 else shape
    elif isinstance(first, nn.Conv1d):
        shape = (2, first.in_channels, 64)
    elif isinstance(first, nn.RNNBase):
        shape = (2, 12, first.input_size)
    elif isinstance(first, nn.Linear):
        shape = (2, first.in_features)
    elif isinstance(first, nn.LayerNorm):
        shape = (2, first.normalized_shape[0])
    elif isinstance(first, nn.BatchNorm1d):
        shape = (2, first.num_features)
    return {name: torch.randn(shape, generator=made)}
