"""A tiny GPT whose faults are switched on one at a time, and small sound models that look suspicious."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Self-attention with eager arithmetic, so that each step can be broken."""

    def __init__(self, width, mask="causal", bias=None):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mask, self.bias, self.heads = mask, bias, 2

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(width, dim=-1)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        position = torch.arange(length, device=x.device)
        if self.bias == "alibi":
            scores = scores - 0.5 * (position[:, None] - position[None, :]).abs()
        offset = {"causal": 1, "off_by_one": 2}.get(self.mask, length + 1)
        if self.mask == "until_32":
            offset = 1 if length <= 32 else length + 1
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(offset)
        scores = scores.masked_fill(future, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm block with optional faults."""

    def __init__(self, width, mask="causal", bias=None, fault=None):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, mask, bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.fault = fault

    def forward(self, x):
        mixed = self.attn(self.norm1(x))
        x = x + (mixed.detach() if self.fault == "detached" else mixed)
        hidden = self.mlp(self.norm2(x))
        if self.fault == "time_mean":
            hidden = hidden - hidden.mean(dim=1, keepdim=True)
        if self.fault == "nan_long" and x.shape[1] > 40:
            hidden = hidden * float("nan")
        if self.fault == "nan":
            hidden = torch.log(hidden)
        return x + hidden


class TinyGPT(nn.Module):
    """Token ids ``(batch, seq)`` in, logits ``(batch, seq, vocab)`` out."""

    def __init__(self, vocab=50, width=16, layers=2, longest=64, fault=None, fault_at=1, mask="causal", bias=None,
                 tied=False, head_width=None):  # fmt: skip
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(
            Block(width, mask if i == fault_at else "causal", bias, fault if i == fault_at else None)
            for i in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, head_width or vocab, bias=False)
        for embedding in (self.tok, self.pos):
            nn.init.normal_(embedding.weight, std=0.02)
        if tied:
            self.head.weight = self.tok.weight
        self.fault = fault
        if fault == "unused":
            self.extra = nn.Linear(width, width)
        if fault == "crash":
            self.norm = nn.LayerNorm(width + 1)
        self.config = {"vocab_size": vocab, "max_position_embeddings": longest}

    def forward(self, input_ids):
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        if self.fault == "squeeze":
            x = x.squeeze(0)
        if self.fault == "in_place":
            gate = torch.exp(x)
            x = x + gate * gate
            gate.zero_()
        if self.fault == "loop":
            x = torch.stack([x[:, i] * 1.0 + 0.0 for i in range(x.shape[1])], dim=1)
        return self.head(self.norm(x))


class Experts(nn.Module):
    """A classifier that routes everything to the first of its experts."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.leave = nn.Linear(16, 4)

    def forward(self, x):
        return self.leave(self.experts[0](self.enter(x)).relu())


class LSTMLanguageModel(nn.Module):
    """Recurrent, unidirectional."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(50, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 50)

    def forward(self, input_ids):
        return self.head(self.rnn(self.embed(input_ids))[0])


class ConvLanguageModel(nn.Module):
    """Positions come from a convolution; causal when padded on the left only."""

    def __init__(self, causal=True):
        super().__init__()
        self.embed, self.conv, self.head = nn.Embedding(50, 16), nn.Conv1d(16, 16, 3), nn.Linear(16, 50)
        self.padding = (2, 0) if causal else (1, 1)

    def forward(self, input_ids):
        x = self.embed(input_ids).transpose(1, 2)
        return self.head(self.conv(functional.pad(x, self.padding)).relu().transpose(1, 2))


class ConvNet(nn.Module):
    """An image classifier with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values):
        return self.head(self.body(pixel_values).mean(dim=(2, 3)))


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """Make timing and weights the same everywhere."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    """The model classes above."""
    return SimpleNamespace(
        GPT=TinyGPT, Experts=Experts, LSTM=LSTMLanguageModel, Conv=ConvLanguageModel, ConvNet=ConvNet,
        broken=lambda: TinyGPT(fault="crash"), MLP=lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)),
    )  # fmt: skip
