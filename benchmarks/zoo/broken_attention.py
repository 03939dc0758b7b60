"""Models whose attention, skip connections or embeddings are put together wrongly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import broken, initialised, sinusoids
from benchmarks.zoo.families import Bert, Gpt, ResNet, SsmLm, Vit
from benchmarks.zoo.parts import Attention, Bidirectional, Block, FusedAttention, FusedBidirectional, ResidualConv


class NoSkipAttention(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.attention(self.norm1(x), mask)
        return x + self.feed(self.norm2(x))


class NoSkipFeed(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return self.feed(self.norm2(x))


class NoSkipAtAll(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.attention(self.norm1(x), mask)
        return self.feed(self.norm2(x))


class NoSkipConv(ResidualConv):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class PlainMixers(SsmLm):
    """The second mixer replaces its input."""

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        for number, (mixer, norm) in enumerate(zip(self.mixers, self.norms, strict=True)):
            x = mixer(norm(x)) + (x if number != 1 else 0)
        return self.lm_head(self.norm_f(x))


class ShadowedSkip(Block):
    """Saves the input for the skip after it was already overwritten by the norm's output, and drops the sum."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        residual = x
        x = self.attention(self.norm1(x), mask)
        x = x + residual
        y = self.feed(self.norm2(x))
        _ = x + y
        return y


def with_block(model: nn.Module, holder: str, number: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Replace one block of a model."""
    getattr(model, holder)[number] = make()
    return model


RESIDUAL = [
    broken("missing_residual", "attention of one gpt block", lambda: with_block(Gpt(depth=4), "blocks", 2, lambda: initialised(NoSkipAttention(48))), ("blocks.2*",), task="causal_lm"),
    broken("missing_residual", "feed-forward of every bert layer", lambda: Bert(block=NoSkipFeed, depth=4), ("layers.*",), task="masked_lm"),
    broken("missing_residual", "one vit block", lambda: with_block(Vit(depth=4), "blocks", 1, lambda: initialised(NoSkipAtAll(48, Bidirectional))), ("blocks.1*",)),
    broken("missing_residual", "one stage of a resnet", lambda: with_block(ResNet(depth=4), "stages", 2, lambda: NoSkipConv(24)), ("stages.2*",)),
    broken("missing_residual", "state-space mixer", PlainMixers, ("", "mixers.1*"), task="causal_lm"),
    broken("missing_residual", "sum computed and dropped", lambda: Gpt(block=ShadowedSkip, depth=4), ("blocks.*",), task="causal_lm"),
]  # fmt: skip


class Unscaled(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1)


class UnscaledBoth(Bidirectional):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bhid,bhjd->bhij", q, k)


class FusedUnscaled(FusedAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


class Multiplied(FusedBidirectional):
    """Multiplies by the root instead of dividing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-2, -1) * math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v


class CrossBlind(nn.Module):
    """Pools pictures with learned queries and plain dot products, single-headed, of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, stride=4)
        self.queries = nn.Parameter(torch.randn(4, 64))
        self.key, self.value = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(256, 10)
        self.positions = nn.Parameter(torch.randn(64, 64) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2) + self.positions)
        weights = torch.matmul(self.queries, self.key(x).transpose(1, 2)).softmax(-1)
        return self.head(torch.matmul(weights, self.value(x)).flatten(1))


SCALE = [
    broken("missing_attention_scale", "gpt", lambda: Gpt(Unscaled, width=64), "blocks.*.attention", task="causal_lm"),
    broken("missing_attention_scale", "bert with einsum", lambda: Bert(UnscaledBoth, width=64), "layers.*.attention", task="masked_lm"),
    broken("missing_attention_scale", "sdpa with scale one", lambda: Gpt(FusedUnscaled, width=64), "blocks.*.attention", task="causal_lm"),
    broken("missing_attention_scale", "multiplied by the root", lambda: Vit(Multiplied, width=64), "blocks.*.attention"),
    broken("missing_attention_scale", "pooling of patches", CrossBlind, ""),
]  # fmt: skip


class OverQueries(Bidirectional):
    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-2)


class OverHeads(Attention):
    def weights(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, dim=1)


class OverQueriesCausal(Attention):
    """With the default axis of an old call: the third of four."""

    def weights(self, scores: Tensor) -> Tensor:
        return nn.functional.softmax(scores, dim=2)


class PoolOverWidth(nn.Module):
    """Attention pooling of audio frames whose scores are normalised over the single score, not over time."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(16, 32, batch_first=True)
        self.score = nn.Linear(32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(x)
        return self.head((x * torch.softmax(self.score(x), dim=-1)).mean(1))


class CrossOverQueries(nn.Module):
    """Two texts, the second attends to the first; the weights sum to one over the second."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(64, width), nn.Embedding(32, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 64)
        initialised(self)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        a, b = (self.words(t) + self.places(torch.arange(t.shape[1], device=t.device)) for t in (src, tgt))
        scores = self.q(b) @ self.k(a).transpose(1, 2) / b.shape[-1] ** 0.5
        return self.head(self.norm(b + torch.softmax(scores, 1) @ self.v(a)))


def two_texts() -> dict[str, Tensor]:
    return {"src": torch.arange(18).view(2, 9), "tgt": torch.arange(14).view(2, 7)}


AXIS = [
    broken("wrong_softmax_dim", "bert over queries", lambda: Bert(OverQueries), "layers.*.attention", task="masked_lm"),
    broken("wrong_softmax_dim", "gpt over heads", lambda: Gpt(OverHeads), "blocks.*.attention", ("future_leakage",), task="causal_lm"),
    broken("wrong_softmax_dim", "gpt over queries", lambda: Gpt(OverQueriesCausal), "blocks.*.attention", ("future_leakage",), task="causal_lm"),
    broken("wrong_softmax_dim", "vit over queries", lambda: Vit(OverQueries), "blocks.*.attention"),
    broken("wrong_softmax_dim", "pooling over one score", PoolOverWidth, ("", "score*"), ("unused_parameter", "detached_submodule", "zero_init")),
    broken("wrong_softmax_dim", "cross attention over queries", CrossOverQueries, "", ("future_leakage",), example_inputs=two_texts()),
]  # fmt: skip


class LoudPositions(Gpt):
    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.positions.weight, std=1.0)


class LoudSinusoids(Bert):
    """Sinusoids over tokens drawn with 0.01."""

    def __init__(self) -> None:
        super().__init__()
        del self.positions
        nn.init.normal_(self.tokens.weight, std=0.01)
        self.register_buffer("table", sinusoids(64, 48))

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.table[: input_ids.shape[1]]


class LoudTypes(Bert):
    """Segments drawn with the default N(0, 1) over tokens at 0.02."""

    def __init__(self) -> None:
        super().__init__()
        self.types = nn.Embedding(2, 48)

    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids) + self.types(torch.zeros_like(input_ids))


class LoudParameter(nn.Module):
    """`nn.TransformerEncoder` with positions from `torch.randn` and tied quiet tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.wte = nn.Embedding(80, width)
        nn.init.normal_(self.wte.weight, std=0.02)
        self.wpe = nn.Parameter(torch.randn(1, 64, width) * 2)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 80)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=input_ids.device)
        x = self.encoder(self.wte(input_ids) + self.wpe[:, :length], mask=mask, is_causal=True)
        return self.head(self.norm(x))


LOUD = [
    broken("embedding_scale", "gpt positions at N(0, 1)", LoudPositions, ("positions*", "tokens*", ""), task="causal_lm"),
    broken("embedding_scale", "bert sinusoids over quiet tokens", LoudSinusoids, ("table", "tokens*", ""), task="masked_lm"),
    broken("embedding_scale", "bert segments at N(0, 1)", LoudTypes, ("types*", "tokens*", ""), task="masked_lm"),
    broken("embedding_scale", "positions from randn", LoudParameter, ("wpe", "wte*", ""), task="causal_lm"),
]  # fmt: skip

ENTRIES = RESIDUAL + SCALE + AXIS + LOUD
