"""Sound models with modes, masks, states and shapes that look wrong at first."""
# ruff: noqa: D102

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.holdout.bodies_pictures import Spectrogram, Unet
from benchmarks.holdout.bodies_readers import GruReader, HandReader, MhaReader
from benchmarks.holdout.bodies_tables import Tabular
from benchmarks.holdout.bodies_text import EinsumGpt, Fused, FusedGpt, PreNorm, Retention, RetNet
from benchmarks.holdout.samples import ids, mask, noise
from benchmarks.zoo.entry import sound

MASKED = {"input_ids": ids(4, 12), "attention_mask": mask(4, 12)}
FEATURES = {"features": noise(4, 16, 12)}


class TokenExperts(nn.Module):
    """Each token takes its best expert of eight; most experts get nothing in a small batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 8, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, width)) for _ in range(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        best, chosen = self.gate(flat).softmax(-1).max(-1)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(-1)
            if rows.numel():
                y = y.index_add(0, rows, expert(flat[rows]) * best[rows, None])
        return y.view_as(x)


class SparseBlock(PreNorm):
    """Block with such experts."""

    def __init__(self, width: int, heads: int, attention: type[nn.Module]) -> None:
        super().__init__(width, heads, attention)
        self.mlp = TokenExperts(width)


class Windowed(Fused):
    """Sees the last eight tokens only."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = torch.arange(q.shape[2], device=q.device)
        gap = t[:, None] - t
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(gap >= 0) & (gap < 8))


class NoisyTraining(GruReader):
    """Adds noise to its words while it trains."""

    def forward(self, words: Tensor) -> Tensor:
        x = self.lookup(words)
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.emit(self.drop(self.lstm(x)[0]))


class StochasticDepth(EinsumGpt):
    """Leaves out feed-forward parts in training."""

    def feed(self, i: int, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.2:
            return torch.zeros_like(x)
        return super().feed(i, x)


class NormedTable(nn.Module):
    """Table with batch norm between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm1d(20), nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class VaeOutput(NamedTuple):
    """What an autoencoder returns."""

    reconstruction: Tensor
    mean: Tensor
    log_variance: Tensor


class Vae(nn.Module):
    """Autoencoder that samples in training and takes the mean afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 16))
        self.decode = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 24))

    def forward(self, x: Tensor) -> VaeOutput:
        mean, log_variance = self.encode(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return VaeOutput(self.decode(z), mean, log_variance)


class Checkpointed(FusedGpt):
    """Computes its blocks a second time in the backward pass."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.tok(idx) + self.pos(torch.arange(idx.shape[1], device=idx.device))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.training else layer(x)
        logits = self.out(self.final(x))
        return logits if targets is None else (logits, self.loss(logits, targets))


class MaskCache(EinsumGpt):
    """Keeps the largest mask seen, which depends on nothing but the length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(1, 1, dtype=torch.bool), persistent=False)

    def visible(self, n: int, device: Any) -> Tensor:
        if self.seen.shape[0] < n or self.seen.device != device:
            self.seen = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        return self.seen[:n, :n]


class OptionalCache(nn.Module):
    """Recurrent model that returns its state and takes it back if one is given."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.gru, self.head = nn.Embedding(90, 32), nn.GRU(32, 32, batch_first=True), nn.Linear(32, 90)

    def forward(self, input_ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before = None if state is None else state.transpose(0, 1).contiguous()
        y, state = self.gru(self.emb(input_ids), before)
        return self.head(y), state.transpose(0, 1)


class FlagDropout(HandReader):
    """Functional dropout with the mode."""

    def normalise(self, scores: Tensor) -> Tensor:
        return F.dropout(super().normalise(scores), 0.1, self.training)


class PaddedUnet(Unet):
    """Pads to a multiple of four and cuts again."""

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        return super().forward(F.pad(image, (0, -w % 4, 0, -h % 4)))[..., :h, :w]


class PatchTime(nn.Module):
    """Patches of a series, filled up at its end; forecasts with a plain transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.place = nn.Linear(4 * 3, 24), nn.Parameter(torch.randn(64, 24) * 0.1)
        self.layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True, norm_first=True)
        self.read = nn.Linear(24, 3)

    def forward(self, series: Tensor) -> Tensor:
        series = F.pad(series, (0, 0, 0, -series.shape[1] % 4))
        x = self.lift(series.unflatten(1, (-1, 4)).flatten(2))
        return self.read(self.layer(x + self.place[: x.shape[1]]).mean(1))


class CausalPool(nn.Module):
    """Means over the past by a cumulative sum, in place of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(80, 32), nn.Linear(32, 80)
        self.mixes = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None].to(x.dtype)
        for mix in self.mixes:
            x = x + mix(torch.cat((x, x.cumsum(1) / count), -1))
        return self.head(x)


class Centred(Tabular):
    """Standardises by numbers from its training data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-0.1, 0.1, 20))
        self.register_buffer("scale", torch.linspace(0.9, 1.1, 20))

    def prepare(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


class CopyThenChange(Spectrogram):
    """Changes a copy of the waveform in place."""

    def picture(self, wave: Tensor) -> Tensor:
        wave = wave.clone()
        wave -= wave.mean(-1, keepdim=True)
        return super().picture(wave)


class TwoHeads(nn.Module):
    """Nested output: two heads and the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.GELU(), nn.Conv2d(12, 24, 3, 2, 1), nn.GELU())
        self.digit, self.parity = nn.Linear(24, 10), nn.Linear(24, 2)

    def forward(self, image: Tensor) -> dict[str, Any]:
        x = self.body(image).mean((2, 3))
        return {"heads": {"digit": self.digit(x), "parity": self.parity(x)}, "features": x}


class Sentences(MhaReader):
    """Unit vectors of sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(32, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return F.normalize(super().forward(input_ids, attention_mask).logits, dim=-1)


class RecurrentRetention(Retention):
    """Retention step by step, a loop that is the algorithm."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        state, steps = 0.0, []
        for t in range(x.shape[1]):
            state = state * self.decay[:, None, None].to(x.dtype) + k[:, :, t, :, None] * v[:, :, t, None]
            steps.append((q[:, :, t, None] @ state).squeeze(-2) * q.shape[-1] ** -0.5)
        return self.o(F.silu(self.g(x)) * self.norm(torch.stack(steps, 2)).transpose(1, 2).flatten(2))


class GroupedQueries(Fused):
    """Half as many keys as queries, biases at both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).split((c, c // 2, c // 2), -1)
        q = q.view(b, t, self.heads, -1).transpose(1, 2)
        k, v = (y.view(b, t, self.heads // 2, -1).transpose(1, 2).repeat_interleave(2, 1) for y in (k, v))
        return self.proj(self.mix(q, k, v).transpose(1, 2).reshape(b, t, c))


class Straight(nn.Module):
    """Vector quantisation with a straight-through gradient and codes that follow by a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(16, 8), nn.Linear(8, 16)
        self.codes = nn.Embedding(12, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        q = self.codes(torch.cdist(z.float(), self.codes.weight.float()).argmin(-1))
        commit = (q - z.detach()).pow(2).sum(-1) + 0.25 * (z - q.detach()).pow(2).sum(-1)
        return self.decode(z + (q - z).detach()), commit


ENTRIES = [
    sound("experts without tokens", lambda: FusedGpt(block=SparseBlock), task="causal_lm"),
    sound("window of eight", lambda: FusedGpt(attention=Windowed), task="causal_lm"),
    sound("grouped queries with biases", lambda: FusedGpt(attention=GroupedQueries), task="causal_lm"),
    sound("noise in training", NoisyTraining),
    sound("stochastic depth", StochasticDepth, vocab_size=97),
    sound("batch norm in a table", NormedTable),
    sound("variational autoencoder", Vae, task="regression"),
    sound("checkpointed blocks", Checkpointed, task="causal_lm"),
    sound("cached mask", MaskCache, vocab_size=97),
    sound("optional state", OptionalCache, task="causal_lm"),
    sound("dropout with the mode", FlagDropout, example_inputs=FEATURES),
    sound("padded u-net", PaddedUnet, example_inputs={"image": noise(2, 3, 30, 30)}),
    sound("patches of a series", PatchTime, example_inputs={"series": noise(4, 18, 3)}, max_length=256),
    sound("mean over the past", CausalPool, task="causal_lm"),
    sound("constants of the data", Centred, example_inputs={"x": noise(5, 20)}),
    sound("change of a copy", CopyThenChange, example_inputs={"waveform": noise(3, 1024)}),
    sound("nested heads", TwoHeads),
    sound("unit sentence vectors", Sentences, example_inputs=MASKED, task="embedding"),
    sound("recurrent retention", lambda: RetNet(depth=2, kind=RecurrentRetention), task="causal_lm"),
    sound("straight-through codes", Straight, example_inputs={"x": noise(6, 16)}, task="regression"),
]
