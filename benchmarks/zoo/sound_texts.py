"""Sound models of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import initialised, sinusoids, sound
from benchmarks.zoo.families import (
    Bert,
    ConvLm,
    Gpt,
    GptWithLabels,
    GptWithLoss,
    LstmLm,
    Seq2Seq,
    SsmLm,
    TorchEncoder,
    pair_example,
)  # fmt: skip
from benchmarks.zoo.parts import (
    Attention,
    Bidirectional,
    Block,
    Experts,
    FusedAttention,
    FusedBidirectional,
    RmsNorm,
    SwiGlu,
)  # fmt: skip


def turned(x: Tensor) -> Tensor:
    """Rotate pairs of features by their positions (Su et al. 2021)."""
    steps = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angle = steps[:, None] / 1e4 ** torch.linspace(0, 1, x.shape[-1] // 2, device=x.device)
    sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Rotary(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(turned(q), turned(k))


class Alibi(Attention):
    """Linear biases by distance (Press et al. 2022)."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        steps = torch.arange(q.shape[2], device=q.device)
        slopes = 2.0 ** (-8.0 * torch.arange(1, self.heads + 1, device=q.device) / self.heads)
        bias = slopes[:, None, None] * (steps[None, :] - steps[:, None])
        return super().scores(q, k) + bias.to(q.dtype)


class RelativeBias(Bidirectional):
    """Learned bias by clipped distance."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Embedding(33, self.heads)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        steps = torch.arange(q.shape[2], device=q.device)
        gap = (steps[None, :] - steps[:, None]).clamp(-16, 16) + 16
        return super().scores(q, k) + self.bias(gap).permute(2, 0, 1)


class QkNorm(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]))


class Cosine(Bidirectional):
    """Cosine attention with a learned temperature (Swin v2), which needs no scale."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.temperature = nn.Parameter(torch.full((self.heads, 1, 1), math.log(10.0)))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature.exp()


class Softcap(Attention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return 30.0 * torch.tanh(super().scores(q, k) / 30.0)


class MuScale(Attention):
    """The scale of maximal update parametrization: one over the width of a head."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) / q.shape[-1]


class Window(Attention):
    def allowed(self, length: int, device: torch.device) -> Tensor:
        square = torch.ones(length, length, dtype=torch.bool, device=device)
        return square.tril() & square.triu(-7)


class Grouped(nn.Module):
    """Four query heads share two key heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = width // 4
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = turned(self.q(x).unflatten(-1, (4, self.size)).transpose(1, 2))
        k, v = self.kv(x).unflatten(-1, (4, self.size)).transpose(1, 2).chunk(2, 1)
        k, v = turned(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Causal linear attention by running sums (Katharopoulos et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)) for t in (F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)))
        sums = torch.einsum("bthd,bthe->bthde", k, v).cumsum(1)
        norm = torch.einsum("bthd,bthd->bth", q, k.cumsum(1))
        return self.out((torch.einsum("bthd,bthde->bthe", q, sums) / (norm[..., None] + 1e-4)).flatten(2))


class MhaSelf(nn.Module):
    """`nn.MultiheadAttention` with a float mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        later = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.mha(x, x, x, attn_mask=later, need_weights=False)[0]


class PostNorm(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.feed(x))


class Parallel(Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        return x + self.attention(y, mask) + self.feed(self.norm2(x))


class LayerScale(Block):
    """Branches scaled by a learned 1e-5 (Touvron et al. 2021)."""

    def __init__(self, width: int, attention: type, feed: type) -> None:
        super().__init__(width, attention, feed)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((width,), 1e-5)) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.gamma1 * self.attention(self.norm1(x), mask)
        return x + self.gamma2 * self.feed(self.norm2(x))


class ReZero(Block):
    """Branches that start at zero (Bachlechner et al. 2020)."""

    def __init__(self, width: int, attention: type, feed: type) -> None:
        super().__init__(width, attention, feed)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.alpha * self.attention(self.norm1(x), mask)
        return x + self.alpha * self.feed(self.norm2(x))


class RmsBlock(Block):
    def __init__(self, width: int, attention: type, feed: type) -> None:
        super().__init__(width, attention, feed)
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)


class NoPlaces(Gpt):
    """Positions come from the attention, or from nothing but the causal mask."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        del self.positions

    def embed(self, idx: Tensor) -> Tensor:
        return self.tokens(idx)


class NoPlacesBert(Bert):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        del self.positions

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)


class Tied(GptWithLabels):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.tokens.weight


class Albert(Bert):
    """One layer three times, with a factorised table."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.tokens, self.lift = nn.Embedding(96, 16), nn.Linear(16, 48)
        initialised(self)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.lift(self.tokens(input_ids)) + self.positions(
            torch.arange(input_ids.shape[1], device=input_ids.device)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.norm(self.embed(input_ids))
        for _ in range(3):
            x = self.layers[0](x, attention_mask)
        return self.head(self.final(x))


class LowRank(nn.Module):
    """LoRA: a frozen weight and two small ones, the second zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(4, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def lora() -> nn.Module:
    """A GPT of which only low-rank additions train."""
    model = Gpt().requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv = LowRank(block.attention.qkv)
    return model


def padded_vocabulary() -> nn.Module:
    """Table and head are padded from 90 to 96 rows for speed."""
    return Gpt(vocab=96)


class GruAttention(nn.Module):
    """Recurrent encoder, attention pooling with a mask that never gives NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 32, padding_idx=0)
        self.rnn = nn.GRU(32, 24, batch_first=True, bidirectional=True)
        self.query, self.head = nn.Linear(48, 1), nn.Linear(48, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, _ = self.rnn(self.embedding(input_ids))
        return self.head((x * self.query(x).softmax(1)).sum(1))


class WordConv(nn.Module):
    """Convolutions over words (Kim 2014); positions come from the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(90, 24)
        self.convs = nn.ModuleList(nn.Conv1d(24, 16, size, padding=size // 2) for size in (3, 5))
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(32, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids).transpose(1, 2)
        return self.fc(self.drop(torch.cat([F.relu(conv(x)).amax(2) for conv in self.convs], 1)))


class SentenceEmbedding(nn.Module):
    """Unit vectors for sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Bert(FusedBidirectional)
        self.encoder.head = nn.Linear(48, 24)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.encoder(input_ids, attention_mask)
        share = torch.ones_like(x[..., :1]) if attention_mask is None else attention_mask[..., None].to(x.dtype)
        return F.normalize((x * share).sum(1) / share.sum(1).clamp(min=1), dim=-1)


@dataclass
class Answer:
    """What `DataGpt` returns."""

    logits: Tensor
    loss: Tensor | None = None


class DataGpt(GptWithLabels):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.features(input_ids))
        return Answer(logits, None if labels is None else self.loss(logits, labels))


class ListGpt(Gpt):
    def forward(self, idx: Tensor) -> Any:
        return [super().forward(idx)]


class CachedRotary(Attention):
    """Keeps a table of angles that depends on the length only, so that calls do not affect each other."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("table", sinusoids(64, width // self.heads), persistent=False)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        sin, cos = self.table[: q.shape[2]].to(q.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        q, k = (torch.cat((a * cos - b * sin, a * sin + b * cos), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        return super().scores(q, k)


class CacheGpt(Gpt):
    """Accepts and returns earlier keys, which are none by default."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        x = self.features(input_ids)
        return {"logits": self.head(x), "past_key_values": (x,) if use_cache else None}


class TwoTexts(nn.Module):
    """A siamese encoder whose towers share everything on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Bert(labels=24)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return F.cosine_similarity(self.encoder(first), self.encoder(second), dim=-1)


def two_texts() -> dict[str, Tensor]:
    return {"first": torch.arange(16).view(2, 8), "second": torch.arange(20, 36).view(2, 8)}


class SlowScan(nn.Module):
    """A recurrence that has to be a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(70, 32), nn.GRUCell(32, 32), nn.Linear(32, 70)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        state, states = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            states.append(state)
        return self.head(torch.stack(states, 1))


LM, MLM, CLASS = {"task": "causal_lm"}, {"task": "masked_lm"}, {"task": "text_classification"}
ENTRIES = [
    sound("gpt", Gpt, **LM), sound("gpt, loss from targets", GptWithLoss, **LM),
    sound("gpt, loss from labels", GptWithLabels), sound("gpt, list", ListGpt, **LM), sound("gpt, dataclass", DataGpt),
    sound("gpt, fused", lambda: Gpt(FusedAttention)), sound("gpt, multihead attention", lambda: Gpt(MhaSelf), **LM),
    sound("gpt, tied", Tied, **LM), sound("gpt, cache flag", CacheGpt, **LM),
    sound("rotary", lambda: NoPlaces(Rotary), **LM), sound("rotary from a table", lambda: NoPlaces(CachedRotary), **LM),
    sound("alibi", lambda: NoPlaces(Alibi), **LM), sound("no positions, causal", NoPlaces, **LM),
    sound("relative bias", lambda: NoPlacesBert(RelativeBias), **MLM),
    sound("qk norm", lambda: Gpt(QkNorm), **LM), sound("cosine attention", lambda: Bert(Cosine), **MLM),
    sound("softcap", lambda: Gpt(Softcap), **LM), sound("mu scale", lambda: Gpt(MuScale), **LM),
    sound("sliding window", lambda: Gpt(Window), **LM),
    sound("llama", lambda: NoPlaces(Grouped, SwiGlu, RmsBlock), **LM),
    sound("linear attention", lambda: Gpt(LinearAttention), **LM, linear_memory=True),
    sound("post norm", lambda: Bert(block=PostNorm), **MLM), sound("parallel block", lambda: Gpt(block=Parallel), **LM),
    sound("layer scale", lambda: Gpt(block=LayerScale), **LM), sound("rezero", lambda: Gpt(block=ReZero), **LM),
    sound("mixture of experts", lambda: Gpt(feed=Experts), **LM),
    sound("bert", Bert), sound("bert, fused", lambda: Bert(FusedBidirectional), **MLM),
    sound("bert classifier", lambda: Bert(labels=4), **CLASS), sound("albert", Albert, **MLM),
    sound("torch encoder", TorchEncoder, **MLM), sound("torch encoder, causal", lambda: TorchEncoder(causal=True), **LM),
    sound("torch encoder, post norm", lambda: TorchEncoder(norm_first=False), **MLM),
    sound("seq2seq", Seq2Seq, example_inputs=pair_example(), task="seq2seq"),
    sound("lora", lora, frozen=("tokens", "positions", "blocks", "norm", "head"), **LM),
    sound("padded vocabulary", padded_vocabulary, vocab_size=90, **LM),
    sound("lstm", LstmLm, **LM), sound("gru", lambda: LstmLm(kind=nn.GRU), **LM),
    sound("bidirectional lstm encoder", lambda: LstmLm(bidirectional=True), **MLM),
    sound("gru with attention pooling", GruAttention, **CLASS), sound("scan in a loop", SlowScan, **LM),
    sound("dilated convolutions", ConvLm, **LM), sound("word convolutions", WordConv, **CLASS),
    sound("state space", SsmLm, **LM), sound("sentence embedding", SentenceEmbedding, task="embedding"),
    sound("siamese", TwoTexts, example_inputs=two_texts(), task="embedding"),
]  # fmt: skip
