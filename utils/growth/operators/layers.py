"""Insert layers into a plain chain: linear layers and convolutions that begin as the identity.

Behind an activation that changes nothing the second time, such as ReLU, a layer with the identity as its matrix and
the same activation behind it return what they are given, bit for bit (Net2DeeperNet, Chen et al., arXiv:1511.05641).
Whether an activation is one shows by applying it twice; behind others, such as GELU or tanh, a chain cannot grow so.
"""

from dataclasses import dataclass

import torch
from torch import nn

from utils.adapters.capture import first_tensor, observe
from utils.growth.edits import GrowthRefusedError, InsertLayer, Plan
from utils.growth.request import Request
from utils.growth.scratch import Scratch

KERNEL = 3
"""Extent of a new convolution where the chain has none to go by."""


@dataclass(frozen=True)
class Chain:
    """An activation in a numbered container behind which layers can be inserted."""

    container: str
    """Name of the container."""
    place: int
    """Place of the activation in it."""
    width: int
    """Features or channels."""
    axes: int
    """Axes of space: 0 for a linear layer."""
    layers: int
    """Layers with weights in the container."""


def plan_layers(scratch: Scratch, request: Request) -> Plan:
    """Plan more layers in a chain.

    Args:
        scratch: A copy of the model.
        request: How many, and behind which activation; None takes the last.

    Raises:
        GrowthRefusedError: There is no such place, or the function would change.
    """
    chains = _chains(scratch)
    if request.where is not None:
        chains = [
            chain
            for chain in chains
            if request.where in (chain.container, f"{chain.container}.{chain.place}".lstrip("."))
        ]
    if not chains:
        raise GrowthRefusedError(
            "There is no activation in an nn.Sequential or nn.ModuleList behind which a layer could be inserted.",
            "Expected one that changes nothing when it is applied twice, such as ReLU, in a numbered container.",
            "Grow the width instead.",
        )
    chain = chains[-1]
    added = request.added(chain.layers, "layers")
    made = [f"{chain.container}.{chain.place + 1 + 2 * number}".lstrip(".") for number in range(added)]
    edits = tuple(
        InsertLayer(chain.container, chain.place + 1, chain.place, chain.width, chain.axes, KERNEL)
        for _ in range(added)
    )
    reason = f"{chain.container or 'the model'}.{chain.place} changes nothing when it is applied twice"
    plan = Plan("depth", tuple(made), edits, chain.layers, chain.layers + added, "exact", None, (reason,))
    trial = scratch.attempt(plan, must_run=made)
    if trial.problem is not None:
        raise GrowthRefusedError(
            f"No layer can be inserted behind {chain.container}.{chain.place}: {trial.problem}.",
            "Expected code that calls what the container holds, one after the other.",
            "Grow the width instead.",
        )
    return plan


def _chains(scratch: Scratch) -> list[Chain]:
    """Return the places in the order of execution."""
    found: list[Chain] = []
    modules = dict(scratch.module.named_modules())

    def note(name: str, child: nn.Module, given: tuple[object, ...], output: object) -> None:
        answer = first_tensor(output)
        container, _, key = name.rpartition(".")
        table = modules[container]._modules
        numbered = list(table) == [str(number) for number in range(len(table))]
        if not (key.isdigit() and numbered and answer is not None and answer.dim() >= 2) or any(
            True for _ in (*child.parameters(), *child.buffers(), *child.children())
        ):
            return
        argument = first_tensor(given)
        if argument is None or not _is_idempotent(child, argument, answer):
            return
        axes = answer.dim() - 2 if answer.dim() > 3 else 0
        width = answer.shape[1] if axes else answer.shape[-1]
        layers = sum("weight" in part._parameters for part in table.values() if part is not None)
        if layers:
            found.append(Chain(container, int(key), width, axes, layers))

    with torch.no_grad(), observe(scratch.module, note):
        scratch.adapter.logits(scratch.inputs)
    return found


def _is_idempotent(child: nn.Module, argument: torch.Tensor, answer: torch.Tensor) -> bool:
    """Tell whether a module changes its input, entry by entry, and its own answer no more."""
    if argument.shape != answer.shape or torch.equal(argument, answer):
        return False
    again = child.forward(answer.clone())
    halves = [child.forward(part.clone()) for part in (argument[..., :1], argument[..., 1:])]
    alone = torch.cat(halves, -1) if argument.shape[-1] > 1 else answer
    return torch.equal(again, answer) and torch.equal(alone, answer)
