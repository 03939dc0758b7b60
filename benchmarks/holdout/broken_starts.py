"""Weights that begin in the wrong place, and signals that die or explode on their way."""
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.holdout.bodies_pictures import Mixer, Mobile, Unet
from benchmarks.holdout.bodies_readers import MaskedReader
from benchmarks.holdout.bodies_tables import Forecaster, Tabular, TwoTower
from benchmarks.holdout.bodies_text import FusedGpt, WaveLm
from benchmarks.holdout.broken_information import PAIR
from benchmarks.holdout.samples import ids, noise
from benchmarks.zoo.entry import broken, sinusoids

NODES = {"nodes": noise(3, 6, 7), "adjacency": noise(3, 6, 6).abs()}
BYTES = {"byte_ids": ids(3, 20, high=250)}
ROWS = {"rows": noise(6, 16)}


def changed(build: Callable[[], nn.Module], *names: str, by: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    """Return a builder that changes some parameters in place after the model's own initialization."""

    def made() -> nn.Module:
        model = build()
        with torch.no_grad():
            for name in names:
                by(model.get_parameter(name))
        return model

    return made


class NegativeRelu(TwoTower):
    """Similarity features are made negative before a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(10, 48), nn.LogSigmoid(), nn.ReLU(), nn.Linear(48, 24))


class ThresholdUnet(Unet):
    """A bottleneck with a high fixed threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(), nn.Conv2d(24, 24, 1))
        nn.init.constant_(self.mid[1].bias, -12.0)


class LowRank(nn.Module):
    """Recommender whose only interaction is a product of two factors that are both zero."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(64, 16), nn.Embedding(64, 16)
        nn.init.zeros_(self.user.weight)
        nn.init.zeros_(self.item.weight)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(-1)


class AdapterMixer(Mixer):
    """A low-rank adapter on the head with zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Parameter(torch.zeros(24, 4)), nn.Parameter(torch.zeros(4, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i in range(self.depth):
            x = x + (F.gelu(self.ln[2 * i](x).mT @ self.time_in[i]) @ self.time_out[i]).mT
            x = x + F.gelu(self.ln[2 * i + 1](x) @ self.chan_in[i]) @ self.chan_out[i]
        pooled = self.ln[-1](x).mean(1)
        return self.head(pooled) + pooled @ self.lora_a @ self.lora_b


class TiedLarge(nn.Module):
    """LSTM language model whose head is the N(0, 1) table, over a widened state."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 96)
        self.lstm = nn.LSTM(96, 96, batch_first=True)
        self.norm = nn.LayerNorm(96)
        self.decoder = nn.Linear(96, 100, bias=False)
        self.decoder.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.decoder(self.norm(self.lstm(self.table(input_ids))[0]))


class QuietWords(nn.Module):
    """Decoder of the library's layers; sinusoids of amplitude one over words at 0.02."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.word = nn.Embedding(100, width)
        nn.init.normal_(self.word.weight, std=0.02)
        self.register_buffer("wave", sinusoids(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        n = input_ids.shape[1]
        x = self.word(input_ids) + self.wave[:n]
        future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        return self.head(self.body(x, mask=future))


class UnscaledMatrices(nn.Module):
    """Text classifier of matrices drawn as N(0, 1) whatever their size."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(30, 64)), nn.Parameter(torch.randn(64, 64))
        self.w3, self.w4 = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        for w in (self.w1, self.w2, self.w3):
            x = F.relu(x @ w)
        return x @ self.w4


class Plain(nn.Module):
    """Plain deep net; gain, activation and depth as given."""

    def __init__(self, act: Callable[[Tensor], Tensor], gain: float, depth: int = 10, width: int = 48) -> None:
        super().__init__()
        self.act = act
        self.inp = nn.Linear(16, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, 4)
        for layer in self.hidden:
            nn.init.normal_(layer.weight, std=gain * width**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer in self.hidden:
            x = self.act(layer(x))
        return self.out(x)


class TinyConvs(nn.Module):
    """Deep convolutions drawn with a standard deviation of a thousandth, no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *[m for i in range(5) for m in (nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1), nn.ReLU())]
        )
        self.fc = nn.Linear(16, 10)
        for m in self.convs:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=1e-3)
                nn.init.zeros_(m.bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.convs(image).amax((2, 3)))


class FanTwice(Plain):
    """Divides by the width where its root was meant."""

    def __init__(self) -> None:
        super().__init__(F.relu, 48**-0.5, depth=5)


def fill(value: float) -> Callable[[Tensor], Any]:
    """Return a function that fills."""
    return lambda p: p.fill_(value)


def loud(p: Tensor) -> Tensor:
    """Draw from N(0, 1)."""
    return p.normal_(0, 1)


def constant_forecaster() -> nn.Module:
    """Return a forecaster all of whose parameters are 0.05."""
    model = Forecaster()
    for p in model.parameters():
        nn.init.constant_(p, 0.05)
    return model


HIDDEN = ("", "hidden*", "inp*")
FC = ("fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias")
CONVS = ("convs.1.weight", "convs.1.bias", "mixes.1.weight")
SERIES = {"series": noise(4, 10, 5)}
ENTRIES = [
    broken("dead_relu", "bias of a tabular layer", changed(Tabular, "fc2.bias", by=fill(-9.0)), ("", "fc1*", "fc2*")),
    broken("dead_relu", "negative before relu", NegativeRelu, ("", "query*"), ("ignored_input",), example_inputs=PAIR),
    broken(
        "dead_relu",
        "threshold in bottleneck",
        ThresholdUnet,
        ("", "mid*"),
        example_inputs={"image": noise(2, 3, 32, 32)},
    ),
    broken("dead_relu", "stem of mobile net", changed(Mobile, "features.1.1.bias", by=fill(-8.0)), ("features.1*",)),
    broken("symmetric_init", "two constant layers", changed(Tabular, *FC, by=fill(0.02)), ("", "fc2*", "fc3*")),
    broken("symmetric_init", "constant convolutions", changed(WaveLm, *CONVS, by=fill(0.05)), ("convs.1*", "mixes.1*")),
    broken(
        "symmetric_init", "one number everywhere", constant_forecaster, ("", "cell*", "read*"), example_inputs=SERIES
    ),
    broken(
        "zero_init",
        "both factors",
        LowRank,
        ("", "user*", "item*"),
        ("constant_output", "ignored_input"),
        example_inputs={"user": ids(5), "item": ids(5, low=6)},
    ),
    broken("zero_init", "both sides of an adapter", AdapterMixer, ("lora*",)),
    broken(
        "zero_init",
        "two layers in a row",
        changed(Tabular, "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias", by=fill(0.0)),
        ("", "fc2*", "fc3*"),
        ("dead_relu", "constant_output", "symmetric_init"),
    ),
    broken("exploding_init", "tied table of unit variance", TiedLarge, ("", "table*", "decoder*"), task="causal_lm"),
    broken(
        "exploding_init",
        "unscaled matrices",
        UnscaledMatrices,
        ("", "w?"),
        ("exploding_gradient",),
        example_inputs={"x": noise(5, 30)},
    ),
    broken(
        "exploding_init",
        "loud head",
        changed(lambda: MaskedReader(width=64), "decoder.weight", by=loud),
        ("", "decoder*"),
        task="masked_lm",
    ),
    broken(
        "vanishing_init",
        "thousandths",
        TinyConvs,
        ("", "convs*"),
        ("vanishing_gradient", "constant_output", "ignored_input"),
    ),
    broken("vanishing_init", "divided by the fan", FanTwice, HIDDEN, ("vanishing_gradient",)),
    broken("vanishing_init", "quiet tanh", lambda: Plain(torch.tanh, 0.15, depth=6), HIDDEN, ("vanishing_gradient",)),
    broken("embedding_scale", "loud positions in gpt", changed(FusedGpt, "pos.weight", by=loud), ("pos*", "tok*", "")),
    broken(
        "embedding_scale",
        "loud positions in masked model",
        changed(MaskedReader, "position_embeddings.weight", by=loud),
        ("position_embeddings*", "token_embeddings*", ""),
        task="masked_lm",
    ),
    broken("embedding_scale", "sinusoids over quiet words", QuietWords, ("", "word*", "wave"), task="causal_lm"),
]
