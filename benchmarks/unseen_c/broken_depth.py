"""Broken models: signal propagation, attention scale and softmax."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, SelfAttention, TextStem, gauss, token_ids
from benchmarks.zoo.entry import broken


class ChaoticMLP(nn.Module):
    """Two dozen tanh layers with weights of four times the critical scale: bounded forward, chaotic backward."""

    def __init__(self, n_in=24, width=64, depth=24, classes=4):
        super().__init__()
        self.inp = nn.Linear(n_in, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, classes)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=4 / math.sqrt(width))

    def forward(self, x):
        x = torch.tanh(self.inp(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


class CarelessSiren(nn.Module):
    """Frequencies of 30 in every layer over the default initialization of nn.Linear."""

    def __init__(self, coords=2, width=64, depth=4, channels=3):
        super().__init__()
        sizes = [coords] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.rgb = nn.Linear(width, channels)

    def forward(self, coords):
        x = coords
        for layer in self.layers:
            x = torch.sin(30.0 * layer(x))
        return self.rgb(x)


class DeepSigmoid(nn.Module):
    """Nine sigmoid layers, each at most a quarter of the gradient."""

    def __init__(self, features=16, width=48, classes=3, depth=9):
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(features if i == 0 else width, width), nn.Sigmoid()) for i in range(depth)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(width, classes)
        for block in self.body:
            nn.init.xavier_normal_(block[0].weight)

    def forward(self, x):
        return self.head(self.body(x))


class WideAndDeep(nn.Module):
    """The deep side is twelve sigmoid layers; the wide side hides that."""

    def __init__(self, features=20, width=32, depth=12):
        super().__init__()
        self.wide = nn.Linear(features, 2)
        self.first = nn.Linear(features, width)
        self.deep = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        h = torch.sigmoid(self.first(x))
        for layer in self.deep:
            h = torch.sigmoid(layer(h))
        return self.wide(x) + self.last(h)


class NoSkipBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads, causal=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = self.attn(self.ln1(x))
        return self.mlp(self.ln2(x))


class NoSkipGPT(nn.Module):
    """Ten blocks without a residual connection."""

    def __init__(self, vocab_size=90, dim=48, depth=10):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.blocks = nn.ModuleList(NoSkipBlock(dim, 4) for _ in range(depth))
        self.norm, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, idx):
        x = self.stem(idx)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class PlainEncoderLayer(nn.Module):
    def __init__(self, dim, skip):
        super().__init__()
        self.skip = skip
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, 4)
        self.ff1, self.ff2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        y = self.ff2(F.gelu(self.ff1(self.norm2(x))))
        return x + y if self.skip else y


class MostlyResidualViT(nn.Module):
    """The sum after the feed-forward is missing in all blocks."""

    def __init__(self, dim=48, depth=12, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.pos = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.layers = nn.ModuleList(PlainEncoderLayer(dim, skip=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, pixel_values):
        x = self.patch(pixel_values).flatten(2).transpose(1, 2) + self.pos
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Unscaled(nn.Module):
    """Scores of heads of 64 are not divided by 8."""

    def __init__(self, dim, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))
        for layer in (self.wq, self.wk, self.wv, self.wo):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.wq, self.wk, self.wv))
        scores = q @ k.transpose(-2, -1)
        if self.causal:
            late = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(late, torch.finfo(scores.dtype).min)
        return self.wo((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class UnscaledGPT(nn.Module):
    def __init__(self, vocab_size=90, dim=128):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.blocks = nn.Sequential(*[Block(dim, 2, attn=Unscaled(dim, 2, True)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, idx):
        return self.head(self.norm(self.blocks(self.stem(idx))))


class UnscaledViT(nn.Module):
    """scaled_dot_product_attention with scale=1."""

    def __init__(self, dim=128, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.pos = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        nn.init.normal_(self.to_qkv.weight, std=dim**-0.5)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        b, t, c = x.shape
        q, k, v = self.to_qkv(self.norm1(x)).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        x = x + self.to_out(y.transpose(1, 2).reshape(b, t, c))
        return self.head(self.norm2(x).mean(1))


class WrongAxis(nn.Module):
    def __init__(self, dim, heads, axis):
        super().__init__()
        self.heads, self.axis = heads, axis
        self.query, self.key, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(c // self.heads), dim=self.axis)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, t, c))


class QuerySoftmaxViT(nn.Module):
    """Softmax over the queries."""

    def __init__(self, dim=48, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 7, 7)
        self.pos = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.blocks = nn.Sequential(*[Block(dim, 4, attn=WrongAxis(dim, 4, -2)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.blocks(x)).mean(1))


class HeadSoftmaxEncoder(nn.Module):
    """Softmax over the heads."""

    def __init__(self, vocab_size=100, dim=48, labels=4):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.layers = nn.Sequential(*[Block(dim, 4, attn=WrongAxis(dim, 4, 1)) for _ in range(2)])
        self.norm, self.classifier = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, input_ids):
        return self.classifier(self.norm(self.layers(self.stem(input_ids))).mean(1))


class AttentivePooling(nn.Module):
    """One score per step, and softmax over that one score: every weight is 1."""

    def __init__(self, n_mels=20, hidden=48, classes=8):
        super().__init__()
        self.conv = nn.Conv1d(n_mels, hidden, 5, padding=2)
        self.score = nn.Linear(hidden, 1)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, mel):
        h = torch.tanh(self.conv(mel)).transpose(1, 2)
        weights = torch.softmax(self.score(h), dim=-1)
        return self.fc((weights * h).sum(1))


ENTRIES = [
    broken("exploding_gradient", "chaotic tanh layers", ChaoticMLP, ("", "layers*", "inp*")),
    broken(
        "exploding_gradient",
        "careless sine layers",
        CarelessSiren,
        ("", "layers*"),
        ("exploding_init",),
        example_inputs={"coords": gauss(16, 2).tanh()},
        task="regression",
    ),
    broken("vanishing_gradient", "nine sigmoids", DeepSigmoid, ("", "body*"), ("vanishing_init",)),
    broken("vanishing_gradient", "deep side of sigmoids", WideAndDeep, ("", "first*", "deep*")),
    broken("missing_residual", "ten blocks without sums", NoSkipGPT, ("", "blocks*"), ("vanishing_gradient",)),
    broken("missing_residual", "no sum after the feed-forward", MostlyResidualViT, ("", "layers*")),
    broken("missing_attention_scale", "scores not divided", UnscaledGPT, ("blocks.*.attn*", "blocks", "blocks.*")),
    broken("missing_attention_scale", "scale of one", UnscaledViT, ("", "to_qkv*")),
    broken("wrong_softmax_dim", "over the queries", QuerySoftmaxViT, ("blocks.*.attn*", "blocks", "blocks.*")),
    broken(
        "wrong_softmax_dim",
        "over the heads",
        HeadSoftmaxEncoder,
        ("layers.*.attn*", "layers", "layers.*"),
        task="text_classification",
        example_inputs={"input_ids": token_ids(2, 12)},
    ),
    broken(
        "wrong_softmax_dim",
        "over one score",
        AttentivePooling,
        ("", "score*"),
        example_inputs={"mel": gauss(3, 20, 40)},
    ),
]
