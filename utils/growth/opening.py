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
        rising: For each: the tensor, its first and last new entry, the rise per step, and where it ends.
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
        places = [(name, first, _tensor(adapter.module, name)) for name, first in opening(plan)]
        if not places:
            return
        ends = [float(tensor[:first].mean()) for _, first, tensor in places]

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
            {"name": name, "first": first, "last": len(tensor), "by": far / STEPS, "end": end}
            for (name, first, tensor), end in zip(places, ends, strict=True)
        ]

    @torch.no_grad()
    def step(self, module: nn.Module) -> None:
        """Let all of them rise after an optimizer step; one that has arrived is a number like any other."""
        still = []
        for entry in self.rising:
            value = _tensor(module, entry["name"])[entry["first"] : entry["last"]]
            value += entry["by"]
            if float(value.min()) < entry["end"]:
                still.append(entry)
        self.rising = still

    def follow(self, change: ModelChange) -> Undo:
        """Go on with the names that tensors have after another event; what is gone rises no more."""
        before = self.rising
        now = {change.of(name).source: name for name in (*change.parameters, *change.buffers)}
        self.rising = [{**entry, "name": now[entry["name"]]} for entry in before if entry["name"] in now]

        def undo() -> None:
            self.rising = before

        return undo


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf).data
