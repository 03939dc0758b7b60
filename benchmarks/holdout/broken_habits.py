"""Modes, chance, memories, and costs."""
# ruff: noqa: D102

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.holdout.bodies_pictures import Mobile, ResNet, Spectrogram, Unet
from benchmarks.holdout.bodies_readers import GruReader, HandReader, MaskedReader
from benchmarks.holdout.bodies_tables import DeepFm, Forecaster, StateSpace, Tabular
from benchmarks.holdout.bodies_text import EinsumGpt, Fused, FusedGpt, PreNorm, RetNet, WaveLm
from benchmarks.holdout.broken_information import FEATURES
from benchmarks.holdout.samples import ids, noise
from benchmarks.zoo.entry import broken

SERIES = {"series": noise(4, 6, 5)}
SIGNAL = {"signal": noise(3, 24, 8)}


class AlwaysDrop(Fused):
    """Gives the kernel its dropout in every mode."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2)


class FunctionalDrop(Mobile):
    """Functional dropout without the mode."""

    def flat(self, x: Tensor) -> Tensor:
        return F.dropout(super().flat(x), 0.3)


class WakesUp(GruReader):
    """Switches its dropout to training before each use."""

    def forward(self, words: Tensor) -> Tensor:
        states = self.lstm(self.lookup(words))[0]
        self.drop.train()
        return self.emit(self.drop(states))


class RandomStart(Forecaster):
    """Random hidden state at the start."""

    def start(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape[0], self.width, device=x.device, dtype=x.dtype)


class NoisyFeatures(HandReader):
    """Blurs its scores with noise, also when asked for an answer."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        s = super().scores(q, k)
        return s + 0.3 * torch.randn_like(s)


class RandomSkip(EinsumGpt):
    """Skips feed-forward parts by Python's dice in every mode."""

    def feed(self, i: int, x: Tensor) -> Tensor:
        return super().feed(i, x) * (0.0 if random.random() < 0.3 else 1.0)


class ShuffledPatches(nn.Module):
    """Keeps a random half of the patches, as in pretraining, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.place = nn.Parameter(torch.randn(16, 32) * 0.02)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        self.fc = nn.Linear(32, 10)

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch(img).flatten(2).mT + self.place
        keep = torch.randperm(16, device=x.device)[:8]
        return self.fc(self.layer(x[:, keep]).mean(1))


class Stubborn(FusedGpt):
    """Its `train` does nothing, so `eval` does nothing either."""

    def train(self, mode: bool = True) -> FusedGpt:
        return self


class Reversed(Mobile):
    """Drops at inference and not in training."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(24, 8)

    def flat(self, x: Tensor) -> Tensor:
        return F.dropout(super().flat(x), 0.3, training=not self.training)


class RootOnly(MaskedReader):
    """Sets its own flag and none of its parts'."""

    def train(self, mode: bool = True) -> MaskedReader:
        self.training = mode
        return self


class KeptState(Forecaster):
    """Goes on from where the last call ended."""

    def __init__(self) -> None:
        super().__init__()
        self.h: Tensor | None = None

    def forward(self, series: Tensor) -> Tensor:
        h = self.start(series) if self.h is None or self.h.shape[0] != series.shape[0] else self.h
        for step in series.unbind(1):
            h = self.cell(step, h)
        self.h = h.detach()
        return self.read(h)


class CreepingMean(Tabular):
    """Updates its running mean at inference too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(20))

    def prepare(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean += 0.1 * (x.mean(0) - self.mean)
        return x - self.mean


class Cooling(Unet):
    """Sharpens its answer a little with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(image) * (1 + 0.05 * self.calls)


class InPlaceScale(Spectrogram):
    """Removes the mean of the caller's waveform in place."""

    def picture(self, wave: Tensor) -> Tensor:
        wave -= wave.mean(-1, keepdim=True)
        return super().picture(wave)


class MasksIds(MaskedReader):
    """Replaces the last ids in the caller's tensor."""

    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids.masked_fill_(input_ids % 7 == 0, 3))


class ClipsNumbers(DeepFm):
    """Clips the caller's numbers."""

    def fields(self, user_id: Tensor, ad_id: Tensor, numbers: Tensor) -> Tensor:
        return super().fields(user_id, ad_id, numbers.clamp_(-0.5, 0.5))


class Historian(HandReader):
    """Keeps the attention of every call for later pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def normalise(self, scores: Tensor) -> Tensor:
        weights = super().normalise(scores)
        self.maps.append(weights.detach())
        return weights


class CachedByIdentity(WaveLm):
    """Caches embeddings under a key that never comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Tensor] = {}

    def forward(self, chars: Tensor) -> Tensor:
        self.cache[len(self.cache)] = self.chars(chars)
        return super().forward(chars)


class GrowingLog(ResNet):
    """Appends pooled features to one tensor for a later analysis."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(0, 32)

    def pool(self, x: Tensor) -> Tensor:
        y = super().pool(x)
        self.seen = torch.cat((self.seen.to(y), y.detach()))
        return y


class PairwiseSpace(StateSpace):
    """Writes the convolution as one matrix per channel."""

    def scan(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1], device=x.device)
        gap = (t[:, None] - t).clamp(min=0)[..., None]
        kernel = torch.exp(-self.log_decay.exp() * gap) * self.b * (t[:, None] >= t)[..., None].to(x.dtype)
        return torch.einsum("qkc,bkc->bqc", kernel.to(x.dtype), x)


class LinearOnPaper(nn.Module):
    """Linear attention that multiplies queries and keys first."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.qkv, self.out = nn.Linear(12, 32), nn.Linear(32, 96), nn.Linear(32, 4)

    def forward(self, features: Tensor) -> Tensor:
        x = self.inp(features)
        x = x + torch.cumsum(x, 1) / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        a = torch.einsum("bqd,bkd->bqk", q, k)
        return self.out((x + a @ v / a.sum(-1, keepdim=True)).mean(1))


class LoopedLinear(PreNorm):
    """Feeds the tokens one by one through its feed-forward part."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_a(x))
        h = self.ln_m(x)
        rows = [torch.stack([self.mlp(h[b, t]) for t in range(h.shape[1])]) for b in range(h.shape[0])]
        return x + torch.stack(rows)


class LoopedLookup(HandReader):
    """Fills the attention matrix entry by entry."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        rows = []
        for i in range(q.shape[2]):
            rows.append(torch.stack([(q[:, :, i] * k[:, :, j]).sum(-1) for j in range(k.shape[2])], -1))
        return torch.stack(rows, -2) * q.shape[-1] ** -0.5


class LoopedConv(WaveLm):
    """Writes its causal convolution as a loop over time."""

    def __init__(self) -> None:
        super().__init__(dilations=(1, 2))

    def forward(self, chars: Tensor) -> Tensor:
        x = self.chars(chars).transpose(1, 2)
        for i, (conv, mix) in enumerate(zip(self.convs, self.mixes, strict=True)):
            wide, d = self.pad(i, x), self.dilations[i]
            steps = []
            for t in range(x.shape[2]):
                window = wide[:, :, t : t + 2 * d + 1 : d]
                y = (window.unsqueeze(1) * conv.weight).sum((2, 3)) + conv.bias
                a, b = y.chunk(2, 1)
                steps.append(torch.tanh(a) * torch.sigmoid(b))
            x = x + mix(torch.stack(steps, 2))
        return self.head(x).transpose(1, 2)


ENTRIES = [
    broken(
        "dropout_in_eval",
        "in the kernel",
        lambda: FusedGpt(attention=AlwaysDrop),
        ("*attn*",),
        ("nondeterministic_forward",),
    ),
    broken("dropout_in_eval", "functional", FunctionalDrop, ("", "classifier*"), ("nondeterministic_forward",)),
    broken(
        "dropout_in_eval", "woken before use", WakesUp, ("", "drop"), ("nondeterministic_forward", "train_eval_ignored")
    ),
    broken("nondeterministic_forward", "random start", RandomStart, ("", "cell"), example_inputs=SERIES),
    broken(
        "nondeterministic_forward",
        "noise on scores",
        NoisyFeatures,
        ("", "to_*"),
        ("dropout_in_eval",),
        example_inputs=FEATURES,
    ),
    broken(
        "nondeterministic_forward",
        "random skips",
        RandomSkip,
        ("", "up*", "down*"),
        ("dropout_in_eval",),
        vocab_size=97,
    ),
    broken("nondeterministic_forward", "random patches", ShuffledPatches, ("", "layer*"), ("dropout_in_eval",)),
    broken(
        "train_eval_ignored", "train does nothing", Stubborn, ("",), ("dropout_in_eval", "nondeterministic_forward")
    ),
    broken(
        "train_eval_ignored",
        "the other way round",
        Reversed,
        ("", "classifier*"),
        ("dropout_in_eval", "nondeterministic_forward"),
    ),
    broken(
        "train_eval_ignored",
        "root only",
        RootOnly,
        ("", "encoder*"),
        ("dropout_in_eval", "nondeterministic_forward"),
        task="masked_lm",
    ),
    broken("state_across_calls", "kept hidden state", KeptState, ("", "cell", "h"), example_inputs=SERIES),
    broken("state_across_calls", "running mean", CreepingMean, ("", "mean"), ("batch_leakage",)),
    broken("state_across_calls", "cooling", Cooling, ("", "calls"), example_inputs={"image": noise(2, 3, 32, 32)}),
    broken(
        "input_mutation",
        "mean of the waveform",
        InPlaceScale,
        ("", "waveform"),
        example_inputs={"waveform": noise(3, 1024) + 1},
    ),
    broken("input_mutation", "ids", MasksIds, ("", "input_ids"), task="masked_lm"),
    broken(
        "input_mutation",
        "clipped numbers",
        ClipsNumbers,
        ("", "numbers"),
        example_inputs={"user_id": ids(6), "ad_id": ids(6, low=5), "numbers": noise(6, 6)},
    ),
    broken("memory_growth", "attention maps", Historian, ("", "maps"), example_inputs=FEATURES),
    broken("memory_growth", "cache", CachedByIdentity, ("", "cache", "chars"), task="causal_lm"),
    broken("memory_growth", "log of features", GrowingLog, ("", "seen"), ("state_across_calls",)),
    broken(
        "quadratic_memory",
        "state space as matrix",
        PairwiseSpace,
        ("", "mix", "norm"),
        example_inputs=SIGNAL,
        linear_memory=True,
    ),
    broken(
        "quadratic_memory",
        "linear attention on paper",
        LinearOnPaper,
        ("", "qkv"),
        example_inputs={"features": noise(3, 24, 12)},
        linear_memory=True,
    ),
    broken("quadratic_memory", "parallel retention", RetNet, ("", "ret*"), task="causal_lm", linear_memory=True),
    broken("slow_python_loop", "tokens one by one", lambda: FusedGpt(block=LoopedLinear), ("", "layers*")),
    broken("slow_python_loop", "scores one by one", LoopedLookup, ("", "to_*"), example_inputs=FEATURES),
    broken("slow_python_loop", "convolution by hand", LoopedConv, ("", "convs*", "mixes*"), task="causal_lm"),
]
