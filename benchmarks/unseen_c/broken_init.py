"""Broken models: how they start."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, gauss, token_ids
from benchmarks.zoo.entry import broken, sinusoids


class DeepTabular(nn.Module):
    """The hidden biases begin at -8, so that no unit ever fires."""

    def __init__(self, n_in=16, width=64, n_out=4):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(n_in, width), nn.Linear(width, width), nn.Linear(width, n_out)
        nn.init.constant_(self.fc2.bias, -8.0)

    def forward(self, x):
        h = F.relu(self.fc1(x))
        return self.fc3(h + F.relu(self.fc2(h)))


class NegativeConv(nn.Module):
    """Non-negative maps times negative weights: the second ReLU is silent."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.fc = nn.Linear(48, classes)
        with torch.no_grad():
            self.conv2.weight.copy_(-self.conv2.weight.abs())
            self.conv2.bias.fill_(-0.1)

    def forward(self, img):
        low = F.relu(self.conv1(img))
        high = F.relu(self.conv2(low))
        return self.fc(torch.cat([low.mean((2, 3)), high.mean((2, 3))], 1))


class ConstantMLP(nn.Module):
    """All weights are equal, so all units of a layer stay equal."""

    def __init__(self, n_in=12, hidden=48, classes=3):
        super().__init__()
        self.hidden1, self.hidden2 = nn.Linear(n_in, hidden), nn.Linear(hidden, hidden)
        self.logits = nn.Linear(hidden, classes)
        for layer in (self.hidden1, self.hidden2):
            nn.init.constant_(layer.weight, 0.05)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.logits(torch.tanh(self.hidden2(torch.tanh(self.hidden1(x)))))


class EqualFilters(nn.Module):
    """Every parameter is 0.02: each layer is one filter many times."""

    def __init__(self, classes=6):
        super().__init__()
        self.conv1 = nn.Conv1d(4, 32, 7, 2, 3)
        self.conv2 = nn.Conv1d(32, 32, 5, 2, 2)
        self.fc = nn.Linear(32, classes)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.02)

    def forward(self, ecg):
        x = F.gelu(self.conv2(F.gelu(self.conv1(ecg))))
        return self.fc(x.mean(-1))


class ZeroLora(nn.Module):
    """Both factors start at zero, so neither ever gets a gradient."""

    def __init__(self, n_in, n_out, rank=4):
        super().__init__()
        self.base = nn.Linear(n_in, n_out)
        self.down, self.up = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class LowRankNet(nn.Module):
    def __init__(self, n_in=18, classes=4):
        super().__init__()
        self.first, self.second = ZeroLora(n_in, 64), nn.Linear(64, classes)

    def forward(self, features):
        return self.second(F.relu(self.first(features)))


class SilentMLP(nn.Module):
    """Two layers in a row at zero."""

    def __init__(self, n_in=10, width=48):
        super().__init__()
        self.inp, self.mid, self.out = nn.Linear(n_in, width), nn.Linear(width, width), nn.Linear(width, 2)
        for layer in (self.mid, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.out(F.relu(self.mid(F.relu(self.inp(x)))))


class UnitNormalGPT(nn.Module):
    """nn.init.normal_ without a standard deviation, on every matrix."""

    def __init__(self, vocab_size=100, dim=64, block_size=64):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab_size, dim), nn.Embedding(block_size, dim)
        self.blocks = nn.ModuleList(Block(dim, 4, causal=True) for _ in range(3))
        self.ln_f = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight)

    def forward(self, idx):
        x = self.tok(idx) + self.pos(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


class GainNet(nn.Module):
    """Kaiming with the gain squared by mistake: six layers multiply."""

    def __init__(self, classes=10):
        super().__init__()
        sizes = [3, 16, 16, 32, 32, 48]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in itertools.pairwise(sizes))
        self.fc = nn.Linear(48, classes)
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.6)
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = F.relu(conv(x))
            if i % 2:
                x = F.max_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))


class FaintMLP(nn.Module):
    """Standard deviation 1e-3 in five layers: the signal is gone."""

    def __init__(self, n_in=20, width=64, n_out=5, depth=5):
        super().__init__()
        sizes = [n_in] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.out = nn.Linear(width, n_out, bias=False)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.out(x)


class FaintConvNet(nn.Module):
    """Convolutions drawn at 1e-3."""

    def __init__(self, classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1),
            nn.Tanh(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.Tanh(),
            nn.Conv2d(32, 32, 3, 2, 1),
            nn.Tanh(),
        )
        self.classifier = nn.Linear(32, classes, bias=False)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=1e-3)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class LoudPositions(nn.Module):
    """Learned positions keep the default N(0, 1) over tokens at 0.02."""

    def __init__(self, vocab_size=100, n_embd=64, block_size=64):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.h = nn.ModuleList(Block(n_embd, 4, causal=True) for _ in range(2))
        self.ln_f = nn.LayerNorm(n_embd)

    def forward(self, input_ids):
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


class LoudSinusoids(nn.Module):
    """Sinusoids of amplitude one over tokens at 0.02, without the factor sqrt(d)."""

    def __init__(self, vocab_size=120, d_model=64, max_len=64):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.register_buffer("pe", sinusoids(max_len, d_model))
        self.layers = nn.ModuleList(Block(d_model, 4, causal=True) for _ in range(2))
        self.norm, self.to_logits = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.pe[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.to_logits(self.norm(x))


class LoudSegments(nn.Module):
    """Segment embeddings at N(0, 1) over words and places at 0.02."""

    def __init__(self, vocab_size=110, dim=64):
        super().__init__()
        self.word, self.place, self.segment = nn.Embedding(vocab_size, dim), nn.Embedding(64, dim), nn.Embedding(2, dim)
        nn.init.normal_(self.word.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.encoder = nn.ModuleList(Block(dim, 4) for _ in range(2))
        self.norm, self.decoder = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, input_ids, token_type_ids):
        x = self.word(input_ids) + self.place(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = x + self.segment(token_type_ids)
        for block in self.encoder:
            x = block(x)
        return self.decoder(self.norm(x))


PAIR = {"input_ids": token_ids(2, 12), "token_type_ids": torch.tensor([[0] * 6 + [1] * 6] * 2)}
ENTRIES = [
    broken("dead_relu", "bias at minus eight", DeepTabular, ("fc2", "fc2.*")),
    broken("dead_relu", "negative filters", NegativeConv, ("conv2", "conv2.*")),
    broken("symmetric_init", "constant weights", ConstantMLP, ("hidden1*", "hidden2*")),
    broken(
        "symmetric_init",
        "every parameter equal",
        EqualFilters,
        ("", "conv1*", "conv2*", "fc*"),
        example_inputs={"ecg": gauss(3, 4, 64)},
    ),
    broken(
        "zero_init", "both factors zero", LowRankNet, ("first", "first.*"), example_inputs={"features": gauss(4, 18)}
    ),
    broken("zero_init", "two layers zero", SilentMLP, ("mid*", "out*", "")),
    broken("exploding_init", "matrices at one", UnitNormalGPT, ("", "head*", "blocks*", "ln_f")),
    broken("exploding_init", "filters at 0.6", GainNet, ("", "convs*", "fc*")),
    broken("vanishing_init", "five faint layers", FaintMLP, ("", "layers*"), ("vanishing_gradient",)),
    broken("vanishing_init", "faint convolutions", FaintConvNet, ("", "features*"), ("vanishing_gradient",)),
    broken("embedding_scale", "loud positions", LoudPositions, ("wpe", "wpe.*")),
    broken("embedding_scale", "loud sinusoids", LoudSinusoids, ("pe", "embedding", "embedding.*", "")),
    broken(
        "embedding_scale",
        "loud segments",
        LoudSegments,
        ("segment", "segment.*"),
        task="masked_lm",
        example_inputs=PAIR,
    ),
]
