"""Rectifiers that let nothing through: every unit of every sample is zero, so no gradient passes either."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Finding

HINT = "Check the bias and the scale of the layer before it; initialise biases at zero, or use GELU or LeakyReLU."
RECTIFIERS = {functional.relu, functional.relu_, functional.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
FEWEST_VALUES = 32
"""Fewer values than this may all be negative by chance."""
FEWEST_UNITS = 16
"""A layer of fewer units than this may be dead by chance: samples are alike, so only units count as draws."""


class Rectified(TorchFunctionMode):
    """Notes what each rectifier lets through, by the module that called it.

    Attributes:
        alive: Whether any value of any call was above zero, by name of the module.
        units: How many units each has.
    """

    def __init__(self) -> None:
        """Start with none seen."""
        super().__init__()
        self.alive: dict[str, bool] = {}
        self.units: dict[str, int] = {}
        self.running: list[str] = [""]

    def leave(self) -> None:
        """Note that the innermost module is done."""
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call and look at the result of rectifiers."""
        # In place, the input would be gone afterwards.
        # nn.ReLU6 is a hardtanh from 0 on.
        rectifies = func in RECTIFIERS or (func is functional.hardtanh and (kwargs or {}).get("min_val") == 0)
        weighed = rectifies and args and args[0].numel() >= FEWEST_VALUES
        weighed = weighed and (args[0].requires_grad or not torch.is_grad_enabled())
        # Exact zeros come from layers that start at zero on purpose.
        weighed = weighed and bool(args[0].any())
        result = func(*args, **(kwargs or {}))
        if weighed:
            name = self.running[-1]
            self.alive[name] = self.alive.get(name, False) or bool(result.any())
            self.units[name] = args[0].shape[1 if args[0].dim() >= 4 else -1]
        return result


@contextmanager
def watch_rectifiers(module: nn.Module) -> Iterator[Rectified]:
    """Watch the rectifiers of all passes inside the block."""
    seen = Rectified()
    handles = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda *_, name=name: seen.running.append(name)))
        handles.append(child.register_forward_hook(lambda *_: seen.leave()))
    try:
        with seen:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def dead_rectifiers(adapter: ModelAdapter, seen: Rectified) -> list[Finding]:
    """Judge: a layer of many units that are all dead is a fault, one of few units worth a look if others work."""
    dead = [name for name, alive in seen.alive.items() if not alive]
    if not dead:
        return []
    wide = [name for name in dead if seen.units[name] >= FEWEST_UNITS]
    worst = (wide or dead)[0]
    severity = "fail" if wide or len(dead) == len(seen.alive) else "warn"
    message = f"{len(dead)} of {len(seen.alive)} ReLUs give zero for every unit of every sample, this one first"
    return [Finding("dead_relu", severity, worst or adapter.name, message, HINT)]
