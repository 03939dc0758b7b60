"""New experts that no token reaches yet are let in, a little at each step.

What `utils.growth.operators.expert` adds is held back by a number beside the router's scores: exact, but without a
gradient. Here that number rises until the expert takes part as any other. It begins as high as it can be while the
answer to an example stays as it is, which is found by halving, and ends at the mean of the other experts' numbers.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.growth.edits import Plan
from utils.growth.operators.expert import CLOSED, opening
from utils.growth.scratch import changed_by
from utils.growth.surgery import tensor_of
from utils.training.state import ModelChange, Undo

STEPS = 100
"""Steps over which a number rises."""
HALVINGS = 12
"""Trials of where it begins."""
UNCHANGED = 1e-3
"""Change of the answer, as a share of its size, below which no token counts as having arrived."""


class Openings:
    """The numbers that still rise.

    Attributes:
        rising: For each: the tensor, its first and last new entry, the rise per step, and the steps that are left.
    """

    def __init__(self) -> None:
        """Start with none."""
        self.rising: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return them as plain values."""
        return {"rising": [dict(entry) for entry in self.rising]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rising = [dict(entry) for entry in state["rising"]]

    @torch.no_grad()
    def begin(self, adapter: ModelAdapter, plan: Plan) -> None:
        """Let the experts of an event begin to open, if it had any.

        Args:
            adapter: The model, grown.
            plan: What was done.
        """
        places = [(name, first, tensor_of(adapter.module, name).data) for name, first in opening(plan)]
        if not places:
            return
        ends = [self._of_the_open(name, first, tensor) for name, first, tensor in places]

        def held_back(by: float) -> Tensor:
            for (_, first, tensor), end in zip(places, ends, strict=True):
                tensor[first:] = end - by
            with adapter.isolated():
                return adapter.logits(adapter.example_inputs()).clone()

        closed = held_back(-CLOSED)
        near, far = 1e-3, -CLOSED
        for _ in range(HALVINGS):
            middle = math.sqrt(near * far)
            if changed_by(closed, held_back(middle)) > UNCHANGED:
                near = middle
            else:
                far = middle
        # Other inputs have other scores.
        far = min(2 * far, -CLOSED)
        held_back(far)
        self.rising += [
            {"name": name, "first": first, "last": len(tensor), "by": far / STEPS, "left": STEPS}
            for name, first, tensor in places
        ]

    @torch.no_grad()
    def step(self, module: nn.Module, average: dict[str, Tensor] | None = None) -> None:
        """Let all of them rise after an optimizer step; one that has arrived is a number like any other.

        Args:
            module: The model.
            average: Averages of its tensors by name, which follow at once: they would reach such numbers never.
        """
        for entry in self.rising:
            places = slice(entry["first"], entry["last"])
            value = tensor_of(module, entry["name"]).data[places]
            value += entry["by"]
            entry["left"] -= 1
            if average is not None and entry["name"] in average:
                average[entry["name"]][places] = value
        self.rising = [entry for entry in self.rising if entry["left"] > 0]

    def _of_the_open(self, name: str, first: int, tensor: Tensor) -> float:
        """Return the mean of the numbers of the experts that take part."""
        held = torch.ones(first, dtype=torch.bool)
        for entry in self.rising:
            if entry["name"] == name:
                held[entry["first"] : entry["last"]] = False
        return float(tensor[:first][held.to(tensor.device)].mean())

    def follow(self, change: ModelChange) -> Undo:
        """Go on with the names that tensors have after another event; what is gone rises no more."""
        before = self.rising
        now = {change.of(name).source: name for name in (*change.parameters, *change.buffers)}
        self.rising = [{**entry, "name": now[entry["name"]]} for entry in before if entry["name"] in now]

        def undo() -> None:
            self.rising = before

        return undo


def is_closed(module: nn.Module, plan: Plan) -> bool:
    """Tell whether the experts that a plan added are held back as they were when it was made."""
    try:
        places = [(first, tensor_of(module, name).data) for name, first in opening(plan)]
    except AttributeError:
        # The names are others since a block was inserted in front of them.
        return False
    return bool(places) and all(
        len(tensor) > first and bool((tensor[first:] == CLOSED).all()) for first, tensor in places
    )
