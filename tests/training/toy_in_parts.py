"""A model with everything that is hard to cut in parts, apart from the tests: processes import it without the rest."""

import torch
from torch import nn

from utils.training import TrainingConfig

CONFIG = TrainingConfig(devices=2, strategy="fsdp")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Toy(nn.Module):
    """Tied, partly frozen, with axes that no two devices share evenly, and with buffers."""

    def __init__(self, skipped=0.0, twice=False, tie_blocks=False, peek=False):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.gain = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(5), persistent=False)
        self.skipped, self.twice, self.peek = skipped, twice, peek
        if tie_blocks:
            self.blocks[2].linear.weight = self.blocks[0].linear.weight

    def forward(self, input_ids):
        x = self.embed(input_ids) + self.shift
        for block in self.blocks:
            if not self.training or float(torch.rand(())) >= self.skipped:
                x = block(x)
        if self.twice:
            x = self.blocks[0](x)
        if self.peek:
            x = nn.functional.linear(x, self.blocks[1].linear.weight)
        return self.head(x * self.gain)


def tensors(state):
    """What an optimizer or an average holds."""
    return state["state"] if "state" in state else state["average"]
