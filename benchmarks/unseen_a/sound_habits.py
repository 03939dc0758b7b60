"""Sound models that look as if they had a fault."""

# ruff: noqa: D102

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_a.sound_language import Heads, Layer, PocketConfig, PocketGPT
from benchmarks.zoo.entry import initialised, sinusoids, sound


@dataclass
class Prediction:
    """What the smoothed model returns."""

    scores: torch.Tensor
    loss: torch.Tensor | None = None


class Smoothed(PocketGPT):
    """Shifts inside, with smoothed labels."""

    def forward(self, idx, labels=None):
        scores = super().forward(idx)
        if labels is None:
            return Prediction(scores)
        loss = F.cross_entropy(scores[:, :-1].mT, labels[:, 1:], label_smoothing=0.05, ignore_index=-100)
        return Prediction(scores, loss)


class PromptTuned(PocketGPT):
    """A trained prompt in front of a model that stays as it is."""

    def __init__(self, n=4):
        super().__init__(PocketConfig(ctx=80))
        initialised(self).requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(1, n, 48) * 0.02)

    def forward(self, idx):
        n = self.prompt.shape[1]
        x = torch.cat((self.prompt.expand(len(idx), -1, -1), self.tok(idx)), 1)
        x = x + self.pos.weight[: x.shape[1]]
        return self.head(self.norm(self.body(x)))[:, n:]


class DropsPaths(Layer):
    """Leaves out whole branches while it trains."""

    def keep(self, y):
        if not self.training:
            return y
        return y * (torch.rand(len(y), 1, 1, device=y.device) > 0.1) / 0.9

    def forward(self, x):
        x = x + self.keep(self.att(self.n1(x)))
        return x + self.keep(self.ff(self.n2(x)))


class StochasticDepth(PocketGPT):
    """Four of these layers."""

    layer = DropsPaths


class ShowsWeights(Heads):
    """Keeps the attention of the last call only."""

    last = None

    def mix(self, q, k, v):
        t = q.shape[2]
        hide = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        p = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hide, torch.finfo(q.dtype).min).softmax(-1)
        self.last = p.detach()
        return p @ v


class ShowingLayer(Layer):
    """A layer whose attention can be looked at."""

    attention = ShowsWeights


class ShowingGPT(PocketGPT):
    """The model of such layers."""

    layer = ShowingLayer


class TokenShift(nn.Module):
    """Mixes each token with the one before, then gates."""

    def __init__(self, d=40):
        super().__init__()
        self.mix = nn.Parameter(torch.full((d,), 0.5))
        self.norm = nn.LayerNorm(d)
        self.r, self.k, self.v = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        y = self.norm(x)
        y = y + (F.pad(y, (0, 0, 1, 0))[:, :-1] - y) * self.mix
        return x + torch.sigmoid(self.r(y)) * self.v(F.relu(self.k(y)).square())


class ShiftLM(nn.Module):
    """Positions only through the shifts."""

    def __init__(self, vocab=84, d=40):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.ln0 = nn.LayerNorm(d)
        self.blocks = nn.Sequential(*[TokenShift(d) for _ in range(3)])
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, tokens):
        return self.head(self.blocks(self.ln0(self.emb(tokens))))


class PaddedLibrary(nn.Module):
    """The library's encoder with the right sense of its padding mask."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(82, 32, padding_idx=0)
        self.register_buffer("where", sinusoids(128, 32), persistent=False)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.cls = nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids) + self.where[: input_ids.shape[1]]
        if attention_mask is None:
            return self.cls(self.enc(x).mean(1))
        blocked = torch.zeros_like(x[..., 0]).masked_fill(attention_mask == 0, -1e4)
        m = attention_mask[..., None].to(x.dtype)
        return self.cls((self.enc(x, src_key_padding_mask=blocked) * m).sum(1) / m.sum(1).clamp(min=1))


class FrozenNorms(nn.Module):
    """Keeps the statistics of a pretrained norm while the rest trains."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 20, 3, 2, 1), nn.BatchNorm2d(20)
        self.head = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 6))

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class TiedAutoencoder(nn.Module):
    """Decodes by the transposed matrix of the encoder."""

    def __init__(self, n=30, z=8):
        super().__init__()
        self.W = nn.Parameter(torch.randn(z, n) / math.sqrt(n))
        self.b, self.c = nn.Parameter(torch.zeros(z)), nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.W, self.b)), self.W.t(), self.c)


class DoubleResidual(nn.Module):
    """Each block explains a part of the series and forecasts from it."""

    def __init__(self, back=24, ahead=6):
        super().__init__()
        self.bodies = nn.ModuleList(nn.Sequential(nn.Linear(back, 48), nn.ReLU()) for _ in range(3))
        self.backcasts = nn.ModuleList(nn.Linear(48, back) for _ in range(2))
        self.forecasts = nn.ModuleList(nn.Linear(48, ahead) for _ in range(3))

    def forward(self, history):
        total = 0.0
        for i, (body, ahead) in enumerate(zip(self.bodies, self.forecasts, strict=True)):
            h = body(history)
            total = total + ahead(h)
            if i < 2:
                history = history - self.backcasts[i](h)
        return total


class RevIN(nn.Module):
    """Standardises each series by itself and undoes it at the end."""

    def __init__(self, steps=16, ahead=4):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(steps, 32), nn.Linear(32, ahead)

    def forward(self, x):
        mu, sd = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-3
        return self.lin2(F.gelu(self.lin1((x - mu) / sd))) * sd + mu


class Quantiles(nn.Module):
    """Three quantiles that cannot cross."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 3))

    def forward(self, x):
        low, steps = self.net(x).split((1, 2), -1)
        return torch.cat((low, low + F.softplus(steps).cumsum(-1)), -1)


class Latents(nn.Module):
    """Learned queries read a spectrogram with positions."""

    def __init__(self, mels=20):
        super().__init__()
        self.inp = nn.Linear(mels, 32)
        self.queries = nn.Parameter(torch.randn(6, 32) * 0.2)
        self.register_buffer("pos", sinusoids(400, 32) * 0.5)
        self.read = nn.MultiheadAttention(32, 4, batch_first=True)
        self.ln = nn.LayerNorm(32)
        self.cls = nn.Linear(32 * 6, 10)

    def forward(self, spectrogram):
        x = self.inp(spectrogram) + self.pos[: spectrogram.shape[1]]
        q = self.queries.expand(len(x), -1, -1)
        return self.cls(self.ln(q + self.read(q, x, x, need_weights=False)[0]).flatten(1))


class CellByCell(nn.Module):
    """A recurrence that cannot be done at once."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(56, 24)
        self.cell = nn.GRUCell(24, 32)
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 56)

    def forward(self, idx):
        x = self.embed(idx)
        h, ys = x.new_zeros(len(x), 32), []
        for step in x.unbind(1):
            h = self.norm(self.cell(step, h))
            ys.append(h)
        return self.out(torch.stack(ys, 1))


class SparseFeatures(nn.Module):
    """Bags of ids, averaged: no order by design."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(90, 24, mode="mean")
        self.cls = nn.Linear(24, 5)

    def forward(self, input_ids):
        return self.cls(self.bag(input_ids))


class NLLTagger(nn.Module):
    """Log-probabilities out, negative log-likelihood inside."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(75, 32)
        self.gru = nn.GRU(32, 48, batch_first=True)
        self.linear = nn.Linear(48, 75)

    def forward(self, tokens, targets=None):
        logp = F.log_softmax(self.linear(self.gru(self.embedding(tokens))[0]), dim=-1)
        return logp if targets is None else (logp, F.nll_loss(logp.flatten(0, 1), targets.flatten()))


class ActorCritic(PocketGPT):
    """A second head for the value of each position."""

    def __init__(self):
        super().__init__()
        self.value = nn.Linear(48, 1)

    def forward(self, idx):
        x = self.norm(self.body(self.embed(idx)))
        return self.head(x), self.value(x).squeeze(-1)


ROWS = {"x": torch.linspace(-9, 8, 120).sin().view(4, 30)}
SPECTRA = {"spectrogram": torch.linspace(-9, 9, 1000).sin().view(2, 25, 20)}
ENTRIES = [
    sound("log_softmax_gru", NLLTagger),
    sound("value_head", lambda: initialised(ActorCritic())),
    sound("smoothed_loss_dataclass", lambda: initialised(Smoothed())),
    sound("prompt_tuned", PromptTuned, frozen=("tok", "pos", "layers", "norm", "head"), max_length=76),
    sound("stochastic_depth", lambda: initialised(StochasticDepth(PocketConfig(depth=4)))),
    sound("shows_last_attention", lambda: initialised(ShowingGPT())),
    sound("token_shift", ShiftLM),
    sound("library_padding_mask", lambda: initialised(PaddedLibrary(), 0.1)),
    sound("norm_kept_in_eval", FrozenNorms),
    sound("transposed_autoencoder", TiedAutoencoder, example_inputs=ROWS),
    sound("double_residual", DoubleResidual),
    sound("reversible_norm", RevIN),
    sound("ordered_quantiles", Quantiles, task="regression"),
    sound("latents_read_spectra", Latents, example_inputs=SPECTRA),
    sound("cell_by_cell", CellByCell),
    sound("bag_of_ids", SparseFeatures, task="text_classification"),
]
