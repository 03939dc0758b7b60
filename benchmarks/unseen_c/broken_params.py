"""Broken models: parts that never train."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, TextStem, gauss
from benchmarks.zoo.entry import broken, initialised


class CodebookAutoencoder(nn.Module):
    """No straight-through estimator: the encoder gets no gradient from the decoder."""

    def __init__(self, codes=32, dim=16):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, dim, 4, 2, 1))
        self.codebook = nn.Embedding(codes, dim)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(dim, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)
        )

    def forward(self, x):
        z = self.encoder(x).permute(0, 2, 3, 1)
        distance = (z.unsqueeze(-2) - self.codebook.weight).pow(2).sum(-1)
        return self.decoder(self.codebook(distance.argmin(-1)).permute(0, 3, 1, 2))


class PyramidSegmenter(nn.Module):
    """The lateral features were detached while debugging memory."""

    def __init__(self, classes=5):
        super().__init__()
        self.c1 = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.c2 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.lat1, self.lat2 = nn.Conv2d(16, 24, 1), nn.Conv2d(32, 24, 1)
        self.head = nn.Conv2d(24, classes, 3, padding=1)

    def forward(self, x):
        f1 = self.c1(x)
        f2 = self.c2(f1)
        f1, f2 = (f.detach() for f in (f1, f2))
        top = F.interpolate(self.lat2(f2), size=f1.shape[-2:], mode="nearest")
        return F.interpolate(self.head(F.relu(self.lat1(f1) + top)), size=x.shape[-2:], mode="bilinear")


class RelationTagger(nn.Module):
    """The recurrent features are computed under no_grad."""

    def __init__(self, vocab_size=120, dim=40, tags=9):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.rnn = nn.GRU(dim, dim, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(3 * dim, dim)
        self.tagger = nn.Linear(dim, tags)

    def forward(self, input_ids):
        e = self.embedding(input_ids)
        with torch.no_grad():
            context = self.rnn(e)[0]
        return self.tagger(F.relu(self.hidden(torch.cat([e, context], -1))))


class HalfFrozen(nn.Module):
    """Meant to freeze nothing in the end, but block 1 was left frozen; nothing here is pretrained."""

    def __init__(self, vocab_size=100, dim=48):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.blocks = nn.ModuleList(Block(dim, 4, causal=True) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)
        for parameter in self.parameters():
            parameter.requires_grad = False
        for part in (self.stem, self.blocks[0], self.blocks[2], self.norm, self.head):
            for parameter in part.parameters():
                parameter.requires_grad = True

    def forward(self, idx):
        x = self.stem(idx)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class DuelingDQN(nn.Module):
    """The advantage layer is a copy of a frozen target, random and never trained."""

    def __init__(self, obs=6, actions=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(obs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.value = nn.Linear(64, 1)
        template = nn.Linear(64, actions).requires_grad_(False)
        self.advantage = copy.deepcopy(template)

    def forward(self, obs):
        h = self.body(obs)
        a = self.advantage(h)
        return self.value(h) + a - a.mean(1, keepdim=True)


class ForgottenSkip(nn.Module):
    """The projection of the shortcut is made and never called."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(24), nn.BatchNorm2d(24)
        self.shortcut = nn.Conv2d(24, 24, 1)
        self.fc = nn.Linear(24, classes)

    def forward(self, x):
        x = F.relu(self.stem(x))
        h = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(h)) + x)
        return self.fc(x.mean((2, 3)))


class TwiceFirst(nn.Module):
    """fc1 is called where fc2 was meant."""

    def __init__(self, n_in=20, width=64, n_out=3):
        super().__init__()
        self.inp = nn.Linear(n_in, width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, n_out)

    def forward(self, x):
        h = F.gelu(self.inp(x))
        h = h + F.gelu(self.fc1(h))
        h = h + F.gelu(self.fc1(h))
        return self.out(h)


class Expert(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)))


class SoftMoE(nn.Module):
    """The experts are in a plain list."""

    def __init__(self, features=16, dim=48, n_experts=4, classes=6):
        super().__init__()
        self.inp = nn.Linear(features, dim)
        self.gate = nn.Linear(dim, n_experts)
        self.experts = [Expert(dim) for _ in range(n_experts)]
        self.out = nn.Linear(dim, classes)

    def forward(self, x):
        h = F.relu(self.inp(x))
        weight = self.gate(h).softmax(-1)
        y = torch.stack([expert(h) for expert in self.experts], 1)
        return self.out(h + (weight.unsqueeze(-1) * y).sum(1))


class LoraLinear(nn.Module):
    """The two factors are plain tensors with requires_grad."""

    def __init__(self, n_in, n_out, rank=4):
        super().__init__()
        self.base = nn.Linear(n_in, n_out)
        self.lora_a = (torch.randn(rank, n_in) * 0.1).requires_grad_()
        self.lora_b = (torch.randn(n_out, rank) * 0.1).requires_grad_()

    def forward(self, x):
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T


class AdaptedClassifier(nn.Module):
    def __init__(self, n_in=24, classes=5):
        super().__init__()
        self.proj1, self.proj2 = LoraLinear(n_in, 64), LoraLinear(64, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(F.relu(self.proj2(F.relu(self.proj1(x)))))


class MultiTask(nn.Module):
    """The heads are in a plain dict."""

    def __init__(self, tasks=("age", "sex", "smile")):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.shared = nn.Linear(32, 32)
        self.heads = {task: nn.Linear(32, 4) for task in tasks}

    def forward(self, image):
        h = F.relu(self.shared(self.features(image).mean((2, 3))))
        return {task: head(h) for task, head in self.heads.items()}


class LateHead(nn.Module):
    """The head is made by the first forward pass, after the optimizer."""

    def __init__(self, n_classes=7):
        super().__init__()
        self.n_classes = n_classes
        self.conv = nn.Sequential(
            nn.Conv1d(8, 32, 7, 2, 3), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 32, 5, 2, 2), nn.ReLU()
        )
        self.head = None

    def forward(self, signal):
        h = self.conv(signal).mean(-1)
        if self.head is None:
            self.head = nn.Linear(h.shape[1], self.n_classes).to(h.device)
        return self.head(h)


class LatePositions(nn.Module):
    """The positions become a parameter at the first call."""

    def __init__(self, vocab_size=100, dim=48):
        super().__init__()
        self.tok = nn.Embedding(vocab_size, dim)
        self.blocks = nn.Sequential(Block(dim, 4, causal=True), Block(dim, 4, causal=True))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, input_ids):
        x = self.tok(input_ids)
        if not hasattr(self, "pos"):
            self.pos = nn.Parameter(torch.randn(1, 128, x.shape[-1], device=x.device, dtype=x.dtype) * 0.02)
        return self.head(self.norm(self.blocks(x + self.pos[:, : x.shape[1]])))


ENTRIES = [
    broken(
        "detached_submodule",
        "codes without straight-through",
        CodebookAutoencoder,
        ("encoder", "encoder.*"),
        example_inputs={"x": gauss(2, 1, 28, 28)},
    ),
    broken("detached_submodule", "pyramid detached", PyramidSegmenter, ("c1", "c1.*", "c2", "c2.*")),
    broken("detached_submodule", "recurrent part under no_grad", RelationTagger, ("rnn", "rnn.*")),
    broken("frozen_parameter", "one block of three", lambda: initialised(HalfFrozen()), ("blocks.1", "blocks.1.*")),
    broken(
        "frozen_parameter",
        "random advantage layer",
        DuelingDQN,
        ("advantage", "advantage.*"),
        example_inputs={"obs": gauss(4, 6)},
    ),
    broken("unused_parameter", "shortcut never called", ForgottenSkip, ("shortcut", "shortcut.*")),
    broken("unused_parameter", "first layer twice", TwiceFirst, ("fc2", "fc2.*")),
    broken("unregistered_layer", "experts in a list", SoftMoE, ("", "experts", "experts*")),
    broken("unregistered_layer", "factors as tensors", AdaptedClassifier, ("proj1*", "proj2*", "")),
    broken(
        "unregistered_layer",
        "heads in a dict",
        MultiTask,
        ("", "heads", "heads*"),
        example_inputs={"image": gauss(2, 3, 32, 32)},
    ),
    broken(
        "lazy_parameter",
        "head at first call",
        LateHead,
        ("", "head", "head.*"),
        example_inputs={"signal": gauss(2, 8, 64)},
    ),
    broken("lazy_parameter", "positions at first call", lambda: initialised(LatePositions()), ("", "pos")),
]
