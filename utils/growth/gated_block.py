"""A block that begins as the identity, whatever it computes: y = x + g (block(x) - x) with g = 0."""

from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor


class GatedBlock(nn.Module):
    """Mixes a block's answer with its input.

    The gate gets a gradient in the first step, and the block in every step after it. The idea is ReZero's (Bachlechner
    et al., arXiv:2003.04887); here it is what makes a block exact that no zero inside of it could, such as one that
    ends in a normalization of its whole stream.
    """

    def __init__(self, block: nn.Module) -> None:
        """Wrap a block."""
        super().__init__()
        self.block = block
        like = next((p for p in block.parameters() if p.is_floating_point()), torch.zeros(()))
        self.gate = nn.Parameter(torch.zeros((), dtype=like.dtype, device=like.device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block, and mix the first tensor of its answer with the first of its arguments."""
        output = self.block(*args, **kwargs)
        given, answer = first_tensor((args, tuple(kwargs.values()))), first_tensor(output)
        if given is None or answer is None or given.shape != answer.shape:
            raise ValueError("a gated block needs an answer of the shape of its input")
        change = answer - given
        # A closed gate keeps out what is infinite too, of which zero times is no number; an open one hides nothing.
        mixed = given + self.gate * change.masked_fill(~change.isfinite() & (self.gate == 0), 0.0)
        replaced = _replaced(output, answer, mixed)
        if first_tensor(replaced) is not mixed:
            raise ValueError("a gated block needs an answer that is a tensor, or a tuple, list or dict that holds one")
        return replaced

    def __getattr__(self, name: str) -> Any:
        """Answer for the block what its surroundings ask of it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def _replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    """Return an output with one tensor in place of another, wherever it is inside."""
    if output is old:
        return new
    if isinstance(output, dict):
        made = type(output)()
        for name, value in output.items():
            made[name] = _replaced(value, old, new)
        return made
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_replaced(value, old, new) for value in output))
    if isinstance(output, (tuple, list)):
        return type(output)(_replaced(value, old, new) for value in output)
    return output
