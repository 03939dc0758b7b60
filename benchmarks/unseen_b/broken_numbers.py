"""Models that fail with numbers: NaN, low precision, devices, dtypes, what a checkpoint keeps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entry import broken, initialised


class StdPool(nn.Module):
    """Unbiased deviation over one position is NaN, and the pooling leaves one."""

    def __init__(self, classes=6):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(1, 16, 9, 4), nn.ReLU(), nn.Conv1d(16, 24, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1)
        )
        self.fc = nn.Linear(48, classes)

    def forward(self, audio):
        h = self.conv(audio)
        return self.fc(torch.cat([h.mean(-1), h.std(-1)], dim=1))


class LogOfLinear(nn.Module):
    """Square root of a difference which may be negative."""

    def __init__(self, n=14, classes=3):
        super().__init__()
        self.enc, self.cls = nn.Linear(n, 32), nn.Linear(32, classes)

    def forward(self, x):
        z = self.enc(x)
        return self.cls(torch.sqrt(z) + torch.log1p(z.abs()))


class EmptyMean(nn.Module):
    """Causal mask with diagonal=-1 has a first row that may look at nothing."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.mha, self.norm, self.out = (
            nn.MultiheadAttention(d, 4, batch_first=True),
            nn.LayerNorm(d),
            nn.Linear(d, vocab),
        )

    def forward(self, tokens):
        t = tokens.size(1)
        x = self.emb(tokens) + self.pos.weight[:t]
        allowed = torch.ones(t, t, device=tokens.device).tril(diagonal=-1).bool()
        y = self.norm(x)
        return self.out(x + self.mha(y, y, y, attn_mask=~allowed, need_weights=False)[0])


class LongDecay(nn.Module):
    """Linear attention which divides by a cumulative product; it underflows after some hundred steps."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.emb, self.to_v, self.to_g = nn.Embedding(vocab, d), nn.Linear(d, d), nn.Linear(d, d)
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, vocab)

    def forward(self, input_ids):
        x = self.emb(input_ids)
        g = torch.sigmoid(self.to_g(x))
        decay = torch.cumprod(g, dim=1)
        state = decay * torch.cumsum((1 - g) * self.to_v(x) / decay, dim=1)
        return self.out(self.norm(x + state))


class GrowingExp(nn.Module):
    """Unnormalised exp of a sum over time."""

    def __init__(self, vocab=72, d=32, classes=4):
        super().__init__()
        self.emb, self.rnn = nn.Embedding(vocab, d), nn.GRU(d, d, batch_first=True)
        self.rate, self.out = nn.Linear(d, d), nn.Linear(d, classes)

    def forward(self, input_ids):
        h, _ = self.rnn(self.emb(input_ids))
        w = torch.exp(torch.cumsum(F.softplus(self.rate(h)), dim=1))
        return self.out((w * h).sum(1) / w.sum(1))


class HalfNorm(nn.Module):
    """Own RMS norm whose epsilon is nothing in half precision, over features of large scale."""

    def __init__(self, n=40, d=64, classes=5):
        super().__init__()
        self.inp, self.out = nn.Linear(n, d), nn.Linear(d, classes)
        self.g = nn.Parameter(torch.ones(d))

    def forward(self, x):
        h = self.inp(x) * 200.0
        h = h / (h.pow(2).sum(-1, keepdim=True) / h.size(-1)).sqrt() * self.g
        return self.out(F.gelu(h))


class MinusMask(nn.Module):
    """Mask value of -1e9, cast to the dtype of the scores: an overflow in float16."""

    def __init__(self, vocab=80, d=32):
        super().__init__()
        self.t, self.p = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.ln, self.qkv, self.o = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.head = nn.Linear(d, vocab)
        initialised(self)

    def forward(self, idx):
        n = idx.size(1)
        x = self.t(idx) + self.p.weight[:n]
        q, k, v = self.qkv(self.ln(x)).chunk(3, -1)
        s = q @ k.mT / math.sqrt(q.size(-1))
        s = s.masked_fill(torch.ones(n, n, dtype=torch.bool, device=idx.device).triu(1), -1e9)
        return self.head(x + self.o(s.softmax(-1) @ v))


class ExpFeature(nn.Module):
    """Softmax by hand, without subtracting the maximum, over scores of order twenty."""

    def __init__(self, n=24, slots=16, classes=4):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(slots, n))
        self.values, self.cls = nn.Parameter(torch.randn(slots, 32)), nn.Linear(32, classes)

    def forward(self, x):
        s = torch.exp(4.0 * x @ self.keys.t() / 24**0.5 + 8.0)
        return self.cls((s / s.sum(1, keepdim=True)) @ self.values)


class CpuMask(nn.Module):
    """The causal mask is made on the CPU, whatever the input is on."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.block = nn.TransformerEncoderLayer(d, 4, 64, batch_first=True, norm_first=True)
        self.head = nn.Linear(d, vocab)
        initialised(self)

    def forward(self, idx):
        n = idx.size(1)
        positions = torch.arange(0, n, dtype=torch.long)
        mask = torch.triu(torch.ones(n, n) * float("-inf"), diagonal=1)
        return self.head(self.block(self.emb(idx) + self.pos(positions.to("cpu")), src_mask=mask))


class CpuHidden(nn.Module):
    def __init__(self, n_in=10, h=32, classes=5):
        super().__init__()
        self.h = h
        self.lstm, self.fc = nn.LSTM(n_in, h, 2, batch_first=True), nn.Linear(h, classes)

    def forward(self, x):
        h0 = torch.zeros(2, x.size(0), self.h, dtype=x.dtype).to(torch.device("cpu"))
        c0 = torch.zeros(2, x.size(0), self.h, dtype=x.dtype).to(torch.device("cpu"))
        out, _ = self.lstm(x, (h0, c0))
        return self.fc(out[:, -1, :])


class PlainTensorMean(nn.Module):
    """Channel means as plain tensors: they stay behind at .to() and are nowhere in a checkpoint."""

    def __init__(self, classes=10):
        super().__init__()
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        self.conv = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, classes)

    def forward(self, image):
        return self.fc(self.conv((image - self.mean) / self.std).mean((2, 3)))


class RandomProjection(nn.Module):
    """Random Fourier features whose frequencies are a plain attribute: another draw after loading."""

    def __init__(self, n=6, features=32):
        super().__init__()
        self.B = torch.randn(n, features)
        self.mlp = nn.Sequential(nn.Linear(2 * features, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, coords):
        z = coords @ self.B
        return self.mlp(torch.cat([z.sin(), z.cos()], -1))


class PlainSinusoids(nn.Module):
    def __init__(self, vocab=76, d=32, classes=3):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        pe = torch.zeros(80, d)
        at = torch.arange(80).unsqueeze(1) * torch.exp(torch.arange(0, d, 2) * (-math.log(10000.0) / d))
        pe[:, 0::2], pe[:, 1::2] = at.sin(), at.cos()
        self.pe = pe.unsqueeze(0)
        self.enc = nn.TransformerEncoderLayer(d, 4, 64, batch_first=True)
        self.cls = nn.Linear(d, classes)

    def forward(self, input_ids):
        return self.cls(self.enc(self.emb(input_ids) + self.pe[:, : input_ids.size(1)])[:, 0])


class FloatInside(nn.Module):
    """x.float() before a layer that follows the model's dtype."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, classes)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(x.float()).mean(1))


class FloatMask(nn.Module):
    """Decays and scores in hard float32 meet values of another dtype in a matmul."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.emb, self.v, self.o = nn.Embedding(vocab, d), nn.Linear(d, d), nn.Linear(d, vocab)

    def forward(self, tokens):
        x = self.emb(tokens)
        t = torch.arange(tokens.size(1), device=x.device)
        weights = torch.pow(0.8, (t[:, None] - t[None]).to(torch.float32).clamp(min=0)).tril()
        return self.o(x + (weights / weights.sum(-1, keepdim=True)) @ self.v(x))


class FloatZeros(nn.Module):
    def __init__(self, n=12, d=32, out=2):
        super().__init__()
        self.cell, self.fc = nn.GRUCell(n, d), nn.Linear(d, out)

    def forward(self, x):
        h = torch.zeros(x.size(0), 32, dtype=torch.float32, device=x.device)
        for _ in range(3):
            h = self.cell(x, h)
        return self.fc(h)


LM = {"task": "causal_lm"}
ENTRIES = [
    broken("nan_output", "deviation_of_one_value", StdPool, ("", "conv", "conv.*", "fc")),
    broken("nan_output", "root_of_negative", LogOfLinear, ("", "enc", "cls")),
    broken("nan_output", "first_row_sees_nothing", EmptyMean, ("", "mha", "mha.*", "out"), **LM),
    broken(
        "nan_long_sequence",
        "division_by_vanishing_decay",
        LongDecay,
        ("", "to_g", "to_v", "norm", "out"),
        also=("low_precision_unsafe",),
        max_length=1024,
        **LM,
    ),
    broken(
        "nan_long_sequence",
        "exp_of_a_growing_sum",
        GrowingExp,
        ("", "rate", "out"),
        also=("low_precision_unsafe",),
        max_length=1024,
    ),
    broken("low_precision_unsafe", "squares_overflow_in_half", HalfNorm, ("", "inp", "out")),
    broken("low_precision_unsafe", "mask_value_overflows_half", MinusMask, ("", "qkv", "ln"), **LM),
    broken("low_precision_unsafe", "softmax_by_hand", ExpFeature, ("", "keys", "values", "cls")),
    broken("hardcoded_device", "mask_on_cpu", CpuMask, ("", "pos", "block", "block.*"), **LM),
    broken("hardcoded_device", "hidden_state_on_cpu", CpuHidden, ("", "lstm")),
    broken("buffer_not_registered", "channel_means", PlainTensorMean, ("", "mean", "std"), also=("hardcoded_device",)),
    broken(
        "buffer_not_registered",
        "random_frequencies",
        RandomProjection,
        ("", "B"),
        also=("hardcoded_device",),
        task="regression",
    ),
    broken("buffer_not_registered", "sinusoids", PlainSinusoids, ("", "pe"), also=("hardcoded_device",)),
    broken("hardcoded_dtype", "float_before_norm", FloatInside, ("", "norm", "head", "stem")),
    broken("hardcoded_dtype", "float32_decays", FloatMask, ("", "v", "o"), **LM),
    broken("hardcoded_dtype", "float32_state", FloatZeros, ("", "cell", "fc")),
]
