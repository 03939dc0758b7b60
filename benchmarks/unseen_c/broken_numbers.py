"""Broken models: numerics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, TextStem, gauss, token_ids
from benchmarks.zoo.entry import broken


class LogFeatures(nn.Module):
    """log1p of normalised features, which are often below -1."""

    def __init__(self, features=15, classes=4):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.net = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, x):
        return self.net(torch.log1p(self.norm(x)))


class GraphNet(nn.Module):
    """D^-1/2 without self loops: a node without neighbours gives 0 * inf."""

    def __init__(self, features=6, hidden=40, classes=3):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(features, hidden), nn.Linear(hidden, classes)

    def forward(self, x, adj):
        scale = adj.sum(-1).pow(-0.5)
        norm = scale.unsqueeze(-1) * adj * scale.unsqueeze(-2)
        h = F.relu(norm @ self.lin1(x))
        return norm @ self.lin2(h)


class MixtureDensity(nn.Module):
    """The weights of the mixture are not normalised before their logarithm."""

    def __init__(self, n_in=5, hidden=48, parts=4):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(n_in, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.weight, self.mean, self.spread = (nn.Linear(hidden, parts) for _ in range(3))

    def forward(self, x):
        h = self.hidden(x)
        return torch.log(self.weight(h)), self.mean(h), F.softplus(self.spread(h)) + 1e-3


class DecayAttention(nn.Module):
    """Decay by division: the running product underflows after some hundred steps, then 0 / 0."""

    def __init__(self, dim):
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        keep = torch.sigmoid(self.gate(x))
        product = keep.cumprod(1)
        state = product * ((1 - keep) * self.value(x) / product).cumsum(1)
        return self.out(state)


class RecurrentLM(nn.Module):
    def __init__(self, vocab_size=90, dim=48, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.mixers = nn.ModuleList(DecayAttention(dim) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(self.norm(x))


class TimeWeighted(nn.Module):
    """Weights exp(t / 2) by hand overflow after 177 steps: inf / inf."""

    def __init__(self, channels=6, hidden=40, classes=4):
        super().__init__()
        self.conv = nn.Conv1d(channels, hidden, 5, padding=2)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, signal):
        h = F.relu(self.conv(signal))
        weight = torch.exp(torch.arange(h.shape[-1], device=h.device, dtype=h.dtype) / 2)
        return self.fc((h * weight).sum(-1) / weight.sum())


class InfMaskAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, keep):
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
        past = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~(past & keep[:, None, None, :].bool()), float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class LeftPaddedGPT(nn.Module):
    """With padding on the left the first rows have no key, and softmax of -inf only is NaN."""

    def __init__(self, vocab_size=90, dim=48):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.blocks = nn.ModuleList(Block(dim, 4, attn=InfMaskAttention(dim, 4)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, input_ids, attention_mask):
        x = self.stem(input_ids, attention_mask)
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.head(self.norm(x))


class WindowClassifier(nn.Module):
    """Attention in windows of four: a window of padding is NaN, and NaN * 0 is NaN."""

    def __init__(self, vocab_size=100, dim=48, labels=3):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mix = nn.GRU(dim, dim, batch_first=True)
        self.cls = nn.Linear(dim, labels)

    def forward(self, input_ids, attention_mask):
        x = self.stem(input_ids, attention_mask)
        b, t, c = x.shape
        extra = -t % 4
        h, keep = F.pad(self.norm(x), (0, 0, 0, extra)), F.pad(attention_mask, (0, extra))
        q, k, v = self.qkv(h).view(b, -1, 4, 3 * c).chunk(3, -1)
        scores = q @ k.transpose(-2, -1) / c**0.5
        scores = scores.masked_fill(keep.view(b, -1, 1, 4) == 0, float("-inf"))
        y = (scores.softmax(-1) @ v).reshape(b, -1, c)[:, :t]
        x = x + self.out(y)
        x = x + self.mix(x)[0]
        real = attention_mask.unsqueeze(-1).to(x.dtype)
        return self.cls((x * real).sum(1) / real.sum(1).clamp(min=1))


class BigNegative(nn.Module):
    """-1e9 is no float16."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.c_attn(x).split(c, -1))
        scores = q @ k.mT / (c // self.heads) ** 0.5
        late = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        return self.c_proj((scores.masked_fill(late, -1e9).softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class HalfUnsafeGPT(nn.Module):
    def __init__(self, vocab_size=90, n_embd=48):
        super().__init__()
        self.stem = TextStem(vocab_size, n_embd, 64)
        self.h = nn.Sequential(*[Block(n_embd, 4, attn=BigNegative(n_embd, 4)) for _ in range(2)])
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        return self.lm_head(self.ln_f(self.h(self.stem(idx))))


class SquaredNorm(nn.Module):
    """The sum of squares of a signal at its 16-bit scale passes 65504."""

    def __init__(self, samples=256, classes=5):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(samples, 64), nn.Linear(64, classes)

    def forward(self, wave):
        wave = wave * 128.0
        power = (wave * wave).sum(-1, keepdim=True)
        return self.fc2(F.relu(self.fc1(wave * 16.0 / torch.sqrt(power + 1e-3))))


class NaiveSoftmaxPool(nn.Module):
    """exp without the maximum: scores of 12 overflow float16."""

    def __init__(self, features=12, hidden=48, classes=4):
        super().__init__()
        self.embed = nn.Linear(features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.query = nn.Parameter(torch.randn(hidden) * 0.1)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, bag):
        h = self.norm(torch.tanh(self.embed(bag)))
        weight = torch.exp(12.0 + h @ self.query)
        weight = weight / weight.sum(-1, keepdim=True)
        return self.fc((weight.unsqueeze(-1) * h).sum(1))


def lonely(nodes: int = 8) -> torch.Tensor:
    ring = torch.eye(nodes).roll(1, 1)
    adj = (ring + ring.T).repeat(2, 1, 1)
    adj[0, 3], adj[0, :, 3] = 0, 0
    return adj


CLEAN = {"input_ids": token_ids(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
ENTRIES = [
    broken("nan_output", "log of normalised features", LogFeatures, ("", "net*", "norm")),
    broken(
        "nan_output",
        "node without neighbours",
        GraphNet,
        ("", "lin1", "lin2"),
        example_inputs={"x": gauss(2, 8, 6), "adj": lonely()},
    ),
    broken("nan_output", "log of a raw weight", MixtureDensity, ("", "weight"), task="regression"),
    broken("nan_long_sequence", "product of gates", RecurrentLM, ("mixers*", ""), max_length=512, task="causal_lm"),
    broken(
        "nan_long_sequence",
        "exponential weights",
        TimeWeighted,
        ("", "fc"),
        max_length=512,
        example_inputs={"signal": gauss(2, 6, 64)},
    ),
    broken("nan_padding", "rows without keys", LeftPaddedGPT, ("blocks*", ""), task="causal_lm", example_inputs=CLEAN),
    broken(
        "nan_padding",
        "windows of padding",
        WindowClassifier,
        ("", "out", "mix"),
        task="text_classification",
        example_inputs=CLEAN,
    ),
    broken("low_precision_unsafe", "minus a billion", HalfUnsafeGPT, ("h.*.attn*", "h", "h.*", "")),
    broken("low_precision_unsafe", "sum of squares", SquaredNorm, ("", "fc1"), example_inputs={"wave": gauss(3, 256)}),
    broken(
        "low_precision_unsafe",
        "exp without maximum",
        NaiveSoftmaxPool,
        ("", "fc"),
        example_inputs={"bag": gauss(3, 7, 12)},
    ),
]
