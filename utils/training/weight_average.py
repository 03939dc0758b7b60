"""A moving average of the weights, which often measures better than the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.training.state import MigrationError, ModelChange


class WeightAverage:
    """Exponential moving average of a model's floating-point state, as a part of the run.

    After step t the average is ``a = d a + (1 - d) w`` with ``d = min(decay, (1 + t) / (10 + t))``: early on it follows
    the weights closely, so that the random start is soon forgotten (as in TensorFlow's ExponentialMovingAverage).
    Buffers are averaged like weights when they are floating-point, and copied when they are not.
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

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        present = self._present()
        names = [name for name, tensor in present.items() if tensor.is_floating_point()]
        if names:
            torch._foreach_lerp_([self.average[name] for name in names], [present[name] for name in names], weight)
        for name, tensor in present.items():
            if not tensor.is_floating_point():
                self.average[name].copy_(tensor)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Put the average into the model while the block runs."""
        present = self._present()
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
        """Continue from an average."""
        self.updates = state["updates"]
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])

    def migrate(self, change: ModelChange) -> None:
        """Refuse: this version knows no operator that changes a model."""
        raise MigrationError("the average of the weights cannot follow a changed model in this version")
