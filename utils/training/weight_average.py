"""A moving average of the weights, which often measures better than the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.training.sharding import divided, local
from utils.training.state import ModelChange, Undo


class WeightAverage:
    """Exponential moving average of a model's floating-point state, as a part of the run.

    After step t the average is ``a = d a + (1 - d) w`` with ``d = min(decay, (1 + t) / (10 + t))``: early on it follows
    the weights closely, so that the random start is soon forgotten (as in TensorFlow's ExponentialMovingAverage).
    Averaged are the parameters and the finite numbers of persistent buffers, such as running statistics. All else is
    copied: counts, masks of minus infinity, what the model computes anew, and what it has only made since.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from a model's present weights.

        Args:
            module: The model.
            decay: Between 0 and 1; 0.999 averages over about the last 1,000 steps.
        """
        self.module, self.decay, self.updates = module, decay, 0
        self.average = {name: tensor.detach().clone() for name, tensor in self._present().items()}

    def _present(self) -> dict[str, Tensor]:
        """Return each tensor of the model once, by its first name."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def _persistent(self) -> set[str]:
        """Return the names of the buffers that belong to the model's state."""
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, child in self.module.named_modules()
            for name in child._buffers.keys() - child._non_persistent_buffers_set
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = {name: p for name, p in self.module.named_parameters() if p.is_floating_point()}
        if parameters:
            averages = [local(self.average[name]) for name in parameters]
            torch._foreach_lerp_(averages, [local(parameter) for parameter in parameters.values()], weight)
        persistent = self._persistent()
        for name, tensor in self._present().items():
            if name in parameters:
                continue
            known = self.average.get(name)
            if known is None or not _alike(known, tensor):
                self.average[name] = tensor.detach().clone()
            elif tensor.is_floating_point() and name in persistent:
                # The average between two equal infinities is no number; the present one is.
                finite = torch.isfinite(tensor) & torch.isfinite(known)
                known.copy_(torch.where(finite, torch.lerp(known, tensor, weight), tensor))
            else:
                known.copy_(tensor)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Put the average into the model while the block runs; what it does not cover stays."""
        present = {
            name: tensor
            for name, tensor in self._present().items()
            if name in self.average and _alike(self.average[name], tensor)
        }
        kept = {name: tensor.detach().clone() for name, tensor in present.items()}
        for name, tensor in present.items():
            tensor.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in present.items():
                    tensor.copy_(kept[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from an average; buffers that the model has not made again yet are kept for when it has."""
        self.updates = state["updates"]
        parameters = dict(self.module.named_parameters())
        device = next(iter(self.average.values())).device
        for name, value in state["average"].items():
            known = self.average.get(name)
            if known is not None and (name in parameters or _alike(known, value)):
                known.copy_(divided(value, known))
            else:
                self.average[name] = value.detach().clone().to(device)

    def migrate(self, change: ModelChange) -> Undo:
        """Carry the averages over; what is new begins with its present value."""
        before = self.average
        after: dict[str, Tensor] = {}
        for name, tensor in self._present().items():
            how = change.of(name)
            known = None if how.source is None else before.get(how.source)
            fits = known is not None and known.dim() == tensor.dim() and known.dtype == tensor.dtype
            moved = how.other_values(known, tensor) if known is not None and fits else None
            after[name] = moved if moved is not None and _alike(moved, tensor) else tensor.detach().clone()
        self.average = after

        def undo() -> None:
            self.average = before

        return undo


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype
