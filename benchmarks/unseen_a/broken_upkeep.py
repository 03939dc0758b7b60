"""Models that cost too much, or make trouble at save, move and cast."""

# ruff: noqa: D102, D103

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_a.broken_information import with_heads
from benchmarks.unseen_a.sound_language import CausalConvStack, Heads, Llamaish, LlamaishBlock, PocketConfig, PocketGPT
from benchmarks.unseen_a.sound_others import MeanPooled, MiniBert
from benchmarks.zoo.entry import broken, initialised


class KeepsMaps(nn.Module):
    """Collects its activations for a plot."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 24, 3, 2, 1)])
        self.fc = nn.Linear(24, 10)
        self.activations = []

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
            self.activations.append(x)
        return self.fc(x.mean((2, 3)))


class ScoreLog(PocketGPT):
    """A dictionary of statistics by call."""

    def __init__(self):
        super().__init__()
        self.stats, self.calls = {}, 0

    def forward(self, idx):
        logits = super().forward(idx)
        self.calls += 1
        self.stats[self.calls] = logits.detach().clone()
        return logits


class PairFirst(Heads):
    """Kernel attention that multiplies queries and keys first."""

    def mix(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        w = (q @ k.mT).tril()
        return (w / w.sum(-1, keepdim=True)) @ v


class Toeplitz(nn.Module):
    """A long convolution written as a square matrix."""

    def __init__(self, vocab=58, d=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.rate = nn.Parameter(torch.linspace(0.05, 0.9, d))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab)

    def forward(self, tokens):
        x = self.embed(tokens)
        at = torch.arange(x.shape[1], device=x.device)
        gap = (at[:, None] - at).clamp(min=0).to(x.dtype)
        kernel = torch.exp(-self.rate[:, None, None] * gap).tril()
        return self.head(self.norm(x + torch.einsum("dts,bsd->btd", kernel, x)))


class StepByStep(nn.Module):
    """A running mean by a loop over time and channels."""

    def __init__(self, vocab=64, d=16):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(vocab, d), nn.Linear(2 * d, d), nn.Linear(d, vocab)
        self.at = nn.Parameter(torch.randn(256, d) * 0.3)

    def forward(self, input_ids):
        x = self.embed(input_ids) + self.at[: input_ids.shape[1]]
        rows = []
        for t in range(x.shape[1]):
            rows.append(torch.stack([x[:, : t + 1, c].mean(1) for c in range(x.shape[2])], -1))
        return self.out(F.gelu(self.mix(torch.cat((x, torch.stack(rows, 1)), -1))))


class QueryByQuery(Heads):
    """Attention by loops over batch, head and query."""

    def mix(self, q, k, v):
        out = torch.zeros_like(q)
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                for t in range(q.shape[2]):
                    w = (k[b, h, : t + 1] @ q[b, h, t] / math.sqrt(q.shape[-1])).softmax(0)
                    out[b, h, t] = w @ v[b, h, : t + 1]
        return out


class PlainMask(LlamaishBlock):
    """The causal mask is a plain attribute."""

    def __init__(self, d=64):
        super().__init__(d)
        self.bias = torch.full((128, 128), float("-inf")).triu(1)

    def attend(self, x):
        b, t, d = x.shape
        q = self.q_proj(x).view(b, t, self.heads, -1).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv, -1).transpose(1, 2).repeat_interleave(2, 1)
        v = self.v_proj(x).view(b, t, self.kv, -1).transpose(1, 2).repeat_interleave(2, 1)
        w = (q @ k.mT / math.sqrt(self.hd) + self.bias[:t, :t]).softmax(-1)
        return self.o_proj((w @ v).transpose(1, 2).reshape(b, t, d))


class PlainMaskLM(Llamaish):
    """Language model of such blocks."""

    block = PlainMask


class PlainStatistics(nn.Module):
    """Mean and deviation of the pixels, kept outside of the state."""

    def __init__(self):
        super().__init__()
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(16, 10)

    def forward(self, image):
        return self.fc(self.net((image - self.mean) / self.std))


class RandomFeatures(nn.Module):
    """Its random projection is drawn anew after each load."""

    def __init__(self):
        super().__init__()
        self.omega = torch.randn(8, 64)
        self.readout = nn.Linear(64, 3)

    def forward(self, x):
        return self.readout(torch.cos(x @ self.omega.to(x)))


def one_layer_four_times():
    """List times four gives one layer four times."""
    model = initialised(PocketGPT())
    model.layers = nn.ModuleList([model.layers[0]] * 4)
    return model


def keys_are_queries():
    """The key projection was assigned, not copied, from the query projection."""
    model = initialised(MeanPooled())
    for layer in model.layers:
        layer.self_attn.key.weight = layer.self_attn.query.weight
    return model


class CpuState(nn.Module):
    """Makes its first state on the processor."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(7, 24, batch_first=True)
        self.fc = nn.Linear(24, 3)

    def forward(self, x):
        h0 = torch.zeros(1, x.size(0), 24, device="cpu", dtype=x.dtype)
        return self.fc(self.rnn(x, (h0, h0.clone()))[0][:, -1])


class CpuMask(Heads):
    """Makes the mask without saying where."""

    def mix(self, q, k, v):
        t = q.shape[2]
        bias = torch.zeros(t, t, dtype=q.dtype).masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
        return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


class FloatNorm(nn.Module):
    """Norm in float32 that never casts back."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        y = x.float()
        return self.weight.float() * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def float_norms():
    model = initialised(Llamaish())
    for b in model.blocks:
        b.in_norm = FloatNorm(64)
    return model


class FloatState(nn.Module):
    """A first state of float32 for any weights."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(9, 32)
        self.fc = nn.Linear(32, 4)

    def forward(self, frames):
        h = torch.zeros(len(frames), 32, dtype=torch.float32, device=frames.device)
        for x in frames.unbind(1):
            h = self.cell(x, h)
        return self.fc(h)


class OtherPad(MeanPooled):
    """The table zeroes id 1, the tokenizer pads with 0."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(100, 32, padding_idx=1)


class LastRowPad(CausalConvStack):
    """Minus one freezes the last, quite ordinary token."""

    def __init__(self):
        super().__init__()
        self.lookup = nn.Embedding(64, 40, padding_idx=-1)


def overwritten_pad():
    """The start drawn afterwards fills the row of padding, which then never trains."""
    model = initialised(MiniBert())
    nn.init.normal_(model.word.weight, std=0.05)
    return model


ROWS = {"x": torch.linspace(-9, 8, 32).sin().view(4, 8)}
FRAMES = {"frames": torch.linspace(-3, 3, 108).sin().view(2, 6, 9)}
ENTRIES = [
    broken("memory_growth", "maps_for_a_plot", KeepsMaps, ("", "activations")),
    broken("memory_growth", "statistics_by_call", lambda: initialised(ScoreLog()), ("", "stats")),
    broken(
        "quadratic_memory",
        "pairs_first",
        lambda: with_heads(PairFirst, cfg=PocketConfig(ctx=1024)),
        ("layers*", ""),
        linear_memory=True,
    ),
    broken("quadratic_memory", "toeplitz", Toeplitz, "", linear_memory=True),
    broken("slow_python_loop", "time_by_channel", StepByStep, ""),
    broken("slow_python_loop", "query_by_query", lambda: with_heads(QueryByQuery), ("layers*", "")),
    broken(
        "buffer_not_registered",
        "plain_mask",
        lambda: initialised(PlainMaskLM()),
        ("blocks.*", "blocks.*.bias", ""),
        also=("hardcoded_device",),
    ),
    broken(
        "buffer_not_registered",
        "pixel_statistics",
        PlainStatistics,
        ("", "mean", "std"),
        also=("hardcoded_device",),
    ),
    broken("buffer_not_registered", "random_features", RandomFeatures, ("", "omega"), example_inputs=ROWS),
    broken("shared_weight", "list_times_four", one_layer_four_times, "layers*"),
    broken("shared_weight", "keys_are_queries", keys_are_queries, "layers.*.self_attn*"),
    broken("hardcoded_device", "state_on_cpu", CpuState, ("", "rnn*")),
    broken("hardcoded_device", "mask_somewhere", lambda: with_heads(CpuMask), ("layers.*.att*", "")),
    broken("hardcoded_dtype", "norm_stays_float", float_norms, ("blocks.*", ""), also=("low_precision_unsafe",)),
    broken(
        "hardcoded_dtype",
        "float_state",
        FloatState,
        ("cell*", ""),
        also=("low_precision_unsafe",),
        example_inputs=FRAMES,
    ),
    broken("padding_idx_wrong", "one_for_zero", lambda: initialised(OtherPad()), "word*", pad_token_id=0),
    broken("padding_idx_wrong", "minus_one", LastRowPad, "lookup*", pad_token_id=0),
    broken("padding_idx_wrong", "overwritten_row", overwritten_pad, "word*", pad_token_id=0),
]
