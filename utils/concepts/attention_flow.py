"""How attention carries what was read from place to place, over all layers.

Attention rollout: Abnar & Zuidema 2020, "Quantifying attention flow in transformers" (ACL, arXiv:2005.00928), section
3: each layer's weights, the mean over heads, are mixed half and half with the identity, for the residual stream, and
multiplied from the first layer to the last. It says where something could have come from, not that it did.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.attention import AttentionCall, record_attention
from utils.adapters.structure import block_stacks, lone_blocks


@dataclass(frozen=True, eq=False)
class FlowReading:
    """Attention rollout of one sample."""

    modules: tuple[str, ...]
    """The attentions that were seen and used, in order of execution."""
    unseen: tuple[str, ...]
    """Blocks in which no attention was seen: what they move from place to place is missing."""
    rollout: Tensor | None
    """float32 ``(positions, positions)``, rows of sum 1: how much of each place came from which; None without any."""
    reason: str
    """What was seen and what was not."""


def attention_flow(adapter: ModelAdapter, call: Callable[[], Any]) -> FlowReading:
    """Record every attention of a forward pass and join them; the caller isolates the model.

    Args:
        adapter: The model.
        call: Runs the model on one sample, for example ``lambda: adapter.logits(inputs)``.
    """
    found: list[tuple[str, Tensor]] = []
    left_out = 0

    def keep(attention: AttentionCall) -> None:
        nonlocal left_out
        weights = attention.weights.detach().float().cpu()
        if len(weights) == 1 and weights.shape[-1] == weights.shape[-2] and bool(torch.isfinite(weights).all()):
            found.append((attention.where, weights[0].mean(0)))
        else:
            left_out += 1

    record_attention(adapter.module, call, keep)
    # Of encoders and decoders, or windows and patches, the last attention's places are those of the answer.
    size = found[-1][1].shape[0] if found else 0
    used = [(where, weights) for where, weights in found if len(weights) == size]
    left_out += len(found) - len(used)
    blocks = [name for stack in block_stacks(adapter.module).value for name in stack] or lone_blocks(adapter.module)[:1]
    unseen = tuple(name for name in blocks if not any(_inside(where, name) for where, _ in used))
    if not used:
        why = "no attention was seen: nothing weights values by a softmax of queries times keys"
        return FlowReading((), unseen, None, f"{why}, place by place" if left_out else why)
    rollout = torch.eye(size)
    for _, weights in used:
        step = 0.5 * weights + 0.5 * torch.eye(size)
        rollout = (step / step.sum(-1, keepdim=True).clamp_min(1e-12)) @ rollout
    told = [f"{len(used)} attentions joined by rollout"]
    if left_out:
        told.append(f"{left_out} left out, because they do not go from these places to the same places")
    if unseen:
        told.append(f"no attention was seen in {', '.join(unseen[:4])}{' and more' if len(unseen) > 4 else ''}")
    return FlowReading(tuple(where or adapter.name for where, _ in used), unseen, rollout, "; ".join(told))


def _inside(where: str, block: str) -> bool:
    return where == block or where.startswith(f"{block}.")
