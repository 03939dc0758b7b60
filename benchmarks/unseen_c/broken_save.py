"""Broken models: what bites at save, move, cast or train."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, gauss, token_ids
from benchmarks.zoo.entry import broken, initialised, sinusoids


class FourierRegressor(nn.Module):
    """The random frequencies are a plain attribute: a loaded model has others."""

    def __init__(self, coords=2, features=32, scale=2.0):
        super().__init__()
        self.frequencies = torch.randn(coords, features) * scale
        self.net = nn.Sequential(nn.Linear(2 * features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, xy):
        angle = 2 * math.pi * xy @ self.frequencies
        return self.net(torch.cat([angle.sin(), angle.cos()], -1))


class Coupling(nn.Module):
    def __init__(self, dim, width=48):
        super().__init__()
        self.order = torch.randperm(dim)
        self.net = nn.Sequential(nn.Linear(dim // 2, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, x):
        a, b = x[:, self.order.to(x.device)].chunk(2, 1)
        log_scale, shift = self.net(a).chunk(2, 1)
        log_scale = torch.tanh(log_scale)
        return torch.cat([a, b * log_scale.exp() + shift], 1), log_scale.sum(1)


class RealNVP(nn.Module):
    """The random permutations are not saved."""

    def __init__(self, dim=8, steps=4):
        super().__init__()
        self.steps = nn.ModuleList(Coupling(dim) for _ in range(steps))

    def forward(self, x):
        total = x.new_zeros(x.shape[0])
        for step in self.steps:
            x, log_det = step(x)
            total = total + log_det
        return x, total


class PlainTable(nn.Module):
    """Sinusoids in a plain attribute do not move with the model."""

    def __init__(self, vocab_size=100, dim=48, max_len=64):
        super().__init__()
        self.dim = dim
        self.embed = nn.Embedding(vocab_size, dim)
        self.pe = sinusoids(max_len, dim)
        self.blocks = nn.Sequential(Block(dim, 4, causal=True), Block(dim, 4, causal=True))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, tokens):
        x = self.embed(tokens) + self.pe[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class RepeatedEncoder(nn.Module):
    """[block] * n is one block n times."""

    def __init__(self, dim=48, depth=4, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.pos = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.blocks = nn.ModuleList([Block(dim, 4)] * depth)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class MixerLayer(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tok = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.chan = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.tok(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.chan(self.n2(x))


def clones(module, n):
    return nn.ModuleList(copy.copy(module) for _ in range(n))


class ClonedMixer(nn.Module):
    """copy.copy shares the children of the layer."""

    def __init__(self, dim=40, classes=10):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.layers = clones(MixerLayer(64, dim), 3)
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.norm(x).mean(1))


class PositionsByDefault(nn.Module):
    """torch.arange without a device makes its positions on the CPU, always."""

    def __init__(self, vocab_size=100, dim=48, max_len=64, labels=4):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab_size, dim), nn.Embedding(max_len, dim)
        self.blocks = nn.Sequential(Block(dim, 4), Block(dim, 4))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, input_ids):
        positions = torch.arange(input_ids.size(1))
        return self.head(self.norm(self.blocks(self.tok(input_ids) + self.pos(positions))).mean(1))


DEVICE = torch.device("cpu")


class GraphConvNet(nn.Module):
    """The self loops are made on a device that the file names."""

    def __init__(self, features=7, hidden=48, classes=3):
        super().__init__()
        self.w1, self.w2 = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x, adj):
        adj = adj + torch.eye(adj.shape[-1], device=DEVICE, dtype=adj.dtype)
        adj = adj / adj.sum(-1, keepdim=True)
        h = F.relu(self.w1(adj @ x))
        h = F.relu(self.w2(adj @ h))
        return self.fc(h.mean(1))


class SeriesForecaster(nn.Module):
    """The state is float32 whatever the model is."""

    def __init__(self, channels=4, hidden=48, horizon=6):
        super().__init__()
        self.hidden = hidden
        self.gru = nn.GRU(channels, hidden, batch_first=True)
        self.out = nn.Linear(hidden, horizon)

    def forward(self, series):
        state = torch.zeros(1, series.shape[0], self.hidden, dtype=torch.float32, device=series.device)
        out, _ = self.gru(series, state)
        return self.out(out[:, -1])


class FloatNorm(nn.Module):
    """Computes in float32, which is right, and stays there, which is not."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight.float()


class RmsClassifier(nn.Module):
    def __init__(self, features=20, dim=64, classes=5):
        super().__init__()
        self.inp = nn.Linear(features, dim)
        self.norm1, self.norm2 = FloatNorm(dim), FloatNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 128), nn.SiLU(), nn.Linear(128, dim))
        self.out = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.inp(x)
        x = x + self.ff(self.norm1(x))
        return self.out(self.norm2(x))


class PaddedTagger(nn.Module):
    """pad is 0 in the mask and in the data; the table keeps its last row, a real word, at zero."""

    def __init__(self, vocab_size=100, dim=48, tags=7):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim, padding_idx=-1)
        self.pos = nn.Parameter(torch.randn(64, dim) * 0.02)
        self.block = Block(dim, 4)
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, tags)

    def forward(self, input_ids):
        keep = input_ids != 0
        x = self.embed(input_ids) + self.pos[: input_ids.shape[1]]
        return self.out(self.norm(self.block(x, keep)))


class RobertaLike(nn.Module):
    """The config says that pad is 1; row 0 is the start token."""

    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        self.word = nn.Embedding(config["vocab_size"], dim, padding_idx=0)
        self.place = nn.Embedding(64, dim)
        self.layers = nn.ModuleList(Block(dim, 4) for _ in range(2))
        self.norm, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, config["vocab_size"])

    def forward(self, input_ids, attention_mask):
        x = self.word(input_ids) + self.place((attention_mask.cumsum(1) - 1).clamp(min=0))
        for layer in self.layers:
            x = layer(x, attention_mask)
        return self.lm_head(self.norm(x))


class InplaceSoftmax(nn.Module):
    """exp keeps its result for the backward pass, which is then divided in place."""

    def __init__(self, dim=48, classes=6, features=9):
        super().__init__()
        self.inp, self.score = nn.Linear(features, dim), nn.Linear(dim, 1)
        self.out = nn.Linear(dim, classes)

    def forward(self, bag):
        h = torch.tanh(self.inp(bag))
        s = self.score(h)
        weight = (s - s.amax(1, keepdim=True)).exp()
        weight /= weight.sum(1, keepdim=True)
        return self.out((weight * h).sum(1))


class StepFunction(torch.autograd.Function):
    """Returns one gradient too few."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.clamp(1 - ctx.slope * x.abs(), min=0)


class SpikingNet(nn.Module):
    def __init__(self, n_in=16, hidden=64, classes=4):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(n_in, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        return self.fc2(StepFunction.apply(self.fc1(x), 0.5))


class GatedResidual(nn.Module):
    """The sigmoid's result is changed after the product has kept it."""

    def __init__(self, channels=24, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 5, 2, 2)
        self.gate = nn.Conv2d(channels, channels, 1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = F.relu(self.stem(x))
        gate = torch.sigmoid(self.gate(x))
        y = x * gate
        gate.mul_(-1).add_(1)
        return self.fc((y + gate).mean((2, 3)))


ROBERTA = {"vocab_size": 100, "hidden_size": 48, "pad_token_id": 1}
LONG = {"input_ids": token_ids(2, 10), "attention_mask": torch.tensor([[1] * 10, [1] * 7 + [0] * 3])}
LONG["input_ids"][1, 7:] = 1
ENTRIES = [
    broken(
        "buffer_not_registered",
        "random frequencies",
        FourierRegressor,
        ("frequencies", ""),
        example_inputs={"xy": gauss(8, 2).tanh()},
        task="regression",
    ),
    broken(
        "buffer_not_registered", "random permutations", RealNVP, ("steps.*", "steps"), example_inputs={"x": gauss(4, 8)}
    ),
    broken("buffer_not_registered", "sinusoids as attribute", PlainTable, ("pe", ""), ("hardcoded_device",)),
    broken("shared_weight", "list times four", RepeatedEncoder, ("blocks", "blocks.*")),
    broken("shared_weight", "shallow copies", ClonedMixer, ("layers", "layers.*")),
    broken("hardcoded_device", "arange without device", PositionsByDefault, ("", "pos"), task="text_classification"),
    broken(
        "hardcoded_device",
        "loops on the cpu",
        GraphConvNet,
        ("",),
        example_inputs={"x": gauss(2, 9, 7), "adj": (gauss(2, 9, 9).abs() > 0.8).float()},
    ),
    broken(
        "hardcoded_dtype",
        "state in float32",
        SeriesForecaster,
        ("", "gru"),
        example_inputs={"series": gauss(3, 20, 4)},
        task="regression",
    ),
    broken("hardcoded_dtype", "norm stays in float32", RmsClassifier, ("", "norm1", "norm2", "ff", "ff.*", "out")),
    broken(
        "padding_idx_wrong",
        "last row",
        PaddedTagger,
        ("embed", "embed.weight"),
        pad_token_id=0,
        example_inputs={"input_ids": token_ids(2, 10)},
    ),
    broken(
        "padding_idx_wrong",
        "config has another",
        lambda: initialised(RobertaLike(ROBERTA)),
        ("word", "word.weight"),
        config=ROBERTA,
        pad_token_id=1,
        task="masked_lm",
        example_inputs=LONG,
    ),
    broken("backward_crash", "softmax in place", InplaceSoftmax, ("",), example_inputs={"bag": gauss(3, 7, 9)}),
    broken(
        "backward_crash", "own function returns too little", SpikingNet, ("", "fc1"), example_inputs={"x": gauss(4, 16)}
    ),
    broken("backward_crash", "gate changed in place", GatedResidual, ("", "gate")),
]
