"""From a wish to a plan: the operator that fits, tried on a copy."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from utils.adapters import ModelAdapter
from utils.adapters.structure import Structure, structure
from utils.growth.config import OPERATORS
from utils.growth.edits import GrowthRefusedError, Plan
from utils.growth.lineage import GrowthEvent
from utils.growth.operators.depth import plan_beginning, plan_depth
from utils.growth.operators.expert import plan_expert
from utils.growth.operators.feed_forward import plan_feed_forward
from utils.growth.operators.heads import plan_heads
from utils.growth.operators.vocabulary import plan_classes, plan_vocabulary
from utils.growth.operators.width import plan_channels, plan_residual
from utils.growth.request import Request
from utils.growth.scratch import ANY, Scratch
from utils.growth.surgery import Surgery
from utils.loading import LoadedModel
from utils.training.state import Undo

Planner = Callable[[Scratch, Structure, Request], Plan]
PLANNERS: Mapping[str, Planner] = {
    "depth": plan_depth,
    "feed_forward": plan_feed_forward,
    "heads": plan_heads,
    "vocabulary": plan_vocabulary,
    "classes": plan_classes,
    "expert": plan_expert,
    "channels": plan_channels,
    "residual": plan_residual,
}


def plan_growth(adapter: ModelAdapter, request: Request, found: Structure | None = None) -> Plan:
    """Find out how a model can grow as asked; the model itself is not touched.

    Args:
        adapter: The model.
        request: What is wanted.
        found: Its parts, where they are known already.

    Returns:
        A plan that was tried on a copy.

    Raises:
        GrowthRefusedError: The model cannot grow so; the message says why.
    """
    planner = PLANNERS.get(request.operator)
    if planner is None:
        raise GrowthRefusedError(
            f"There is no growth operator {request.operator!r}.", f"Expected one of {', '.join(OPERATORS)}."
        )
    found = found or structure(adapter)
    try:
        return planner(Scratch(adapter), found, request)
    except GrowthRefusedError:
        if not request.approximate:
            raise
    return replace(planner(Scratch(adapter, close=ANY), found, request), promise="approximate")


def begin_with(adapter: ModelAdapter, blocks: int) -> tuple[GrowthEvent, Undo]:
    """Take all blocks but the first ones away from a model that has not been trained.

    Returns:
        The first event of its lineage, and what takes it back.

    Raises:
        GrowthRefusedError: The model has been trained, or does not run so; it is as it was.
    """
    source = adapter.origin
    if isinstance(source, LoadedModel) and source.can_rebuild and not _is_as_built(adapter.module, source):
        raise GrowthRefusedError(
            f"begin_blocks is {blocks}, and this {adapter.name} does not have the weights that its source begins with.",
            "Expected a model that has not been trained: the blocks that are taken away would be lost.",
            "Load it anew, or leave begin_blocks at None.",
        )
    started, before = time.perf_counter(), adapter.num_parameters
    plan = plan_beginning(Scratch(adapter), structure(adapter), blocks)
    surgery = Surgery(adapter.module, plan)
    forget_sizes(adapter)
    why = f"begin_blocks is {blocks}"
    event = GrowthEvent(0, 0, plan, None, why, before, adapter.num_parameters, time.perf_counter() - started)

    def undo() -> None:
        surgery.undo()
        forget_sizes(adapter)

    return event, undo


def _is_as_built(module: nn.Module, source: LoadedModel) -> bool:
    """Tell whether a model has the weights with which its source builds it."""
    built, present = source.factory().state_dict(), module.state_dict()
    return built.keys() == present.keys() and all(
        torch.equal(value, present[name].to(value.device)) for name, value in built.items()
    )


def forget_sizes(adapter: ModelAdapter) -> None:
    """Let an adapter look up anew what it knows about the size of its model, after that has changed."""
    for name in ("num_parameters", "vocab_size", "num_labels"):
        adapter.__dict__.pop(name, None)
