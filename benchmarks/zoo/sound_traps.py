"""Sound models that look broken at first sight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import initialised, sinusoids, sound
from benchmarks.zoo.families import Bert, ConvLm, Gpt, Mlp, ResNet, Vit
from benchmarks.zoo.parts import FeedForward, FusedBidirectional, ResidualConv


def frozen_table() -> nn.Module:
    """Pretrained word vectors are kept as they are, as the user says."""
    model = Bert(labels=4)
    model.tokens.weight.requires_grad_(False)
    return model


def frozen_backbone() -> nn.Module:
    """Transfer learning: only the head trains."""
    model = ResNet()
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    return model


class OneExpert(nn.Module):
    """Switch routing: one of eight experts per token, so that a batch leaves some out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 8, bias=False)
        self.experts = nn.ModuleList(FeedForward(width) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        share, index = self.router(x).softmax(-1).max(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = index == number
            if rows.any():
                result[rows] = expert(x[rows]) * share[rows][:, None]
        return result


class ConvolvedVit(Vit):
    """Positions come from a depthwise convolution (Chu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        del self.positions, self.cls
        self.place = nn.Conv2d(48, 48, 3, padding=1, groups=48)

    def embed(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        return (x + self.place(x)).flatten(2).transpose(1, 2)


class FixedSinusoids(Bert):
    """Sinusoids over tokens of their own scale."""

    def __init__(self) -> None:
        super().__init__(FusedBidirectional)
        del self.positions
        nn.init.normal_(self.tokens.weight, std=0.7)
        self.register_buffer("table", sinusoids(64, 48))

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.table[: input_ids.shape[1]]


class Quantiser(nn.Module):
    """Vector quantisation with a straight-through gradient; the codebook is a moving average in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 8), nn.Linear(8, 16)
        self.register_buffer("codes", torch.randn(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        index = torch.cdist(z.detach(), self.codes).argmin(-1)
        code = self.codes[index]
        if self.training:
            with torch.no_grad():
                self.codes.index_copy_(0, index, 0.9 * self.codes[index] + 0.1 * z.detach())
        return self.decoder(z + (code - z).detach())


class Teacher(nn.Module):
    """A student beside a slow copy of itself, whose parameters are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.teacher = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).requires_grad_(False)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            target = self.teacher(x)
        return self.head(self.student(x)), target


class FrozenNorm(ResidualConv):
    """Batch norm as constants: buffers, no parameters, equal in both modes."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bn1, self.bn2 = (nn.BatchNorm2d(width, affine=False).eval() for _ in range(2))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.bn1.eval(), self.bn2.eval()
        return self


class HeadlessEncoder(nn.Module):
    """Returns hidden states, as an embedding model does."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(90, 32), nn.LayerNorm(32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.places = nn.Parameter(torch.randn(64, 32) * 0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.encoder(self.words(input_ids) + self.places[: input_ids.shape[1]]))


class PaddedBag(nn.Module):
    """A bag of words whose pad row is zero and never learns; order is not meant to matter."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(80, 24, mode="sum", padding_idx=0)
        self.head = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids))


class InPlaceInside(Mlp):
    """Rectifies in place what is its own."""

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = F.relu_(layer(x))
        return self.head(x)


class Probabilities(nn.Module):
    """Mixture weights inside the model are a softmax; the output is not."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.parts = nn.Linear(12, 3), nn.ModuleList(nn.Linear(12, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.gate(x).softmax(-1)[:, None] * torch.stack([part(x) for part in self.parts], -1)).sum(-1)


class LastLayerNorm(Gpt):
    """Deep-norm style: residual branches of the output layers drawn smaller by depth."""

    def __init__(self) -> None:
        super().__init__(depth=4)
        for block in self.blocks:
            nn.init.normal_(block.attention.out.weight, std=0.02 / 8**0.5)
            nn.init.normal_(block.feed.down.weight, std=0.02 / 8**0.5)


class PrefixLm(nn.Module):
    """Tokens through a causal depthwise convolution and a gate; positions from the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvLm()

    def forward(self, input_ids: Tensor) -> Any:
        return {"logits": self.body(input_ids)}


class LogProbabilities(Mlp):
    """Returns logarithms of probabilities, which cross entropy takes as they are."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).log_softmax(-1)


class Perceiver(nn.Module):
    """Learned latents attend to patches, which have positions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.3)
        self.latents = nn.Parameter(torch.randn(1, 6, width) * 0.5)
        self.cross = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions
        latents = self.latents.expand(x.shape[0], -1, -1)
        return self.head(self.norm(latents + self.cross(latents, x, x, need_weights=False)[0]).mean(1))


def stacked() -> nn.Module:
    """A plain sequence of layers over one embedding."""
    return initialised(nn.Sequential(nn.Embedding(70, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 70)), 0.1)


ENTRIES = [
    sound("frozen word vectors", frozen_table, frozen=("tokens",), task="text_classification"),
    sound("frozen backbone", frozen_backbone, frozen=("stem", "stages")),
    sound("switch experts", lambda: Gpt(feed=OneExpert), task="causal_lm"),
    sound("convolved positions", lambda: initialised(ConvolvedVit())), sound("sinusoids", FixedSinusoids, task="masked_lm"),
    sound("quantiser", Quantiser, task="regression"), sound("teacher", Teacher, frozen=("teacher",), task="regression"),
    sound("frozen norm", lambda: ResNet(FrozenNorm)), sound("headless encoder", HeadlessEncoder, task="embedding"),
    sound("bag of words", PaddedBag, pad_token_id=0, task="text_classification"),
    sound("in place inside", InPlaceInside), sound("mixture of linear models", Probabilities),
    sound("output layers drawn smaller", LastLayerNorm, task="causal_lm"), sound("convolutional decoder", PrefixLm, task="causal_lm"),
    sound("log probabilities", LogProbabilities), sound("perceiver", Perceiver),
    sound("bigram", stacked, task="causal_lm"),
]  # fmt: skip
