"""Models in which a position, a sample, the padding or the order has an influence that it must not have, or none."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import broken, initialised, sinusoids
from benchmarks.zoo.families import (
    Bert,
    ConvLm,
    Gpt,
    LstmLm,
    ResNet,
    Seq2Seq,
    SsmLm,
    Tabular,
    TorchEncoder,
    Vit,
    pair_example,
    table_example,
)  # fmt: skip
from benchmarks.zoo.parts import (
    Attention,
    Bidirectional,
    Block,
    FeedForward,
    FusedAttention,
    FusedBidirectional,
    StateSpace,
)  # fmt: skip


class OneAhead(Attention):
    def allowed(self, length: int, device: torch.device) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool, device=device).tril(1)


class NoCausalFlag(FusedAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class MaskAfterSoftmax(Attention):
    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1) * self.allowed(scores.shape[-1], scores.device)


class ShortMask(Attention):
    """The stored mask covers 16 positions; later ones see everything."""

    def allowed(self, length: int, device: torch.device) -> Tensor:
        allowed = torch.ones(length, length, dtype=torch.bool, device=device)
        n = min(length, 16)
        allowed[:n] = allowed[:n].tril()
        return allowed


class OneFreeHead(Attention):
    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        allowed = self.allowed(scores.shape[-1], scores.device).repeat(self.heads, 1, 1)
        allowed[-1] = True
        return scores.masked_fill(~allowed, float("-inf"))


class TimeNormBlock(Block):
    """Normalises over time as well as width."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(F.layer_norm(x, x.shape[1:]), mask)
        return x + self.feed(self.norm2(x))


class CentredConv(nn.Module):
    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, dilation=dilation, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class TwoSidedDecay(StateSpace):
    def mix(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        gap = (steps[:, None] - steps[None, :]).abs().to(x.dtype)
        return torch.einsum("tsd,bsd->btd", torch.exp(gap[..., None] * F.logsigmoid(self.decay)), x)


class SentenceGpt(Gpt):
    """Adds the mean of the whole text to each position."""

    def features(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        x = x + x.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class OpenDecoder(Seq2Seq):
    def tgt_mask(self, tgt: Tensor) -> Tensor | None:
        return None


class ExpertChoice(nn.Module):
    """Each expert picks the half of the tokens that it likes best, over the whole text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 2)
        self.experts = nn.ModuleList(FeedForward(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share, index = shares[..., number].topk(max(1, x.shape[1] // 2), dim=1)
            index = index[..., None].expand(-1, -1, x.shape[-1])
            result = result.scatter_add(1, index, expert(x.gather(1, index)) * share[..., None])
        return result


class LowerIsHidden(TorchEncoder):
    """Hides the past and shows the future: the triangle is the other one."""

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        return torch.ones(length, length, dtype=torch.bool, device=device).tril(-1)


FUTURE = [
    broken("future_leakage", "gpt mask off by one", lambda: Gpt(OneAhead), "blocks.*.attention", task="causal_lm"),
    broken("future_leakage", "sdpa without is_causal", lambda: Gpt(NoCausalFlag), "blocks.*.attention", task="causal_lm"),
    broken("future_leakage", "mask after softmax", lambda: Gpt(MaskAfterSoftmax), "blocks.*.attention", task="causal_lm"),
    broken("future_leakage", "mask shorter than text", lambda: Gpt(ShortMask), "blocks.*.attention", task="causal_lm"),
    broken("future_leakage", "one head unmasked", lambda: Gpt(OneFreeHead), "blocks.*.attention", task="causal_lm"),
    broken("future_leakage", "norm over time", lambda: Gpt(block=TimeNormBlock), "blocks.?", task="causal_lm"),
    broken("future_leakage", "centred convolution", lambda: ConvLm(CentredConv), "convs.*", task="causal_lm"),
    broken("future_leakage", "two-sided state space", lambda: SsmLm(TwoSidedDecay), "mixers.?", task="causal_lm"),
    broken("future_leakage", "mean of the text", SentenceGpt, "", task="causal_lm"),
    broken("future_leakage", "seq2seq decoder", OpenDecoder, ("", "transformer*"), example_inputs=pair_example(), task="seq2seq"),
    broken("future_leakage", "expert choice", lambda: Gpt(feed=ExpertChoice), "blocks.*.feed*", task="causal_lm"),
    broken("future_leakage", "torch encoder wrong triangle", LowerIsHidden, ("", "encoder*"), task="causal_lm"),
    broken("future_leakage", "bidirectional lstm", lambda: LstmLm(bidirectional=True), "rnn", task="causal_lm"),
]  # fmt: skip


class BatchNormNoStats(nn.Module):
    """Keeps no running statistics, so that evaluation uses the batch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.bn(self.conv(x)))


class CentredTabular(Tabular):
    def join(self, categories: Tensor, numbers: Tensor) -> Tensor:
        return super().join(categories, (numbers - numbers.mean(0)) / (numbers.std(0, unbiased=False) + 1e-5))


class BatchSoftmax(nn.Module):
    """Attention pooling whose weights sum to one over the batch."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.query = nn.Linear(width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, _ = self.rnn(self.embedding(input_ids))
        return self.head((x * self.query(x).softmax(0)).sum(1))


class WrongReshape(Bidirectional):
    """Lets heads and samples mix in a view that should have been a transpose."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.transpose(0, 1).reshape(batch, length, width) for t in (q, k, v))
        y = (self.scores(q, k).softmax(-1) @ v).reshape(length, batch, width).transpose(0, 1)
        return self.out(y)


class TimeFirstLstm(LstmLm):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(48, 48, num_layers=2)


class ForgottenBatchFirst(TorchEncoder):
    def __init__(self) -> None:
        super().__init__(batch_first=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.proj(self.encoder(self.embed(input_ids) + self.pos[: input_ids.shape[1]]))


class CapacityExperts(nn.Module):
    """Routes tokens of the whole batch into experts with room for few, so that early samples crowd out late ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 2, bias=False)
        self.experts = nn.ModuleList(FeedForward(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        choice = self.router(flat).argmax(-1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero()[: max(1, flat.shape[0] // 4), 0]
            result = result.index_copy(0, rows, expert(flat[rows]))
        return (result + 0.0 * self.router(flat).sum(-1, keepdim=True)).view_as(x)


BATCH = [
    broken("batch_leakage", "batch norm without statistics", lambda: ResNet(BatchNormNoStats), ("stages.?", "stages.*.bn")),
    broken("batch_leakage", "tabular centred by the batch", CentredTabular, "", example_inputs=table_example()),
    broken("batch_leakage", "softmax over the batch", BatchSoftmax, "", ("wrong_softmax_dim",)),
    broken("batch_leakage", "reshape across samples", lambda: Bert(WrongReshape), "layers.*.attention"),
    broken("batch_leakage", "lstm without batch_first", TimeFirstLstm, ("rnn", "")),
    broken("batch_leakage", "torch encoder without batch_first", ForgottenBatchFirst, ("", "encoder*")),
    broken("batch_leakage", "expert capacity", lambda: Bert(feed=CapacityExperts), "layers.*.feed"),
]  # fmt: skip


class IgnoresMask(Bidirectional):
    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores


class InvertedMask(FusedBidirectional):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = None if mask is None else (mask == 0)[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class WrongPaddingSense(TorchEncoder):
    """Passes 1 for real where torch wants True for padding."""

    def hide(self, attention_mask: Tensor | None) -> Tensor | None:
        return None if attention_mask is None else attention_mask.bool()


class MeanOverPadding(Bert):
    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x.mean(1)


class SecondLayerForgets(Bert):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.norm(self.embed(input_ids))
        x = self.layers[0](x, attention_mask)
        for layer in self.layers[1:]:
            x = layer(x)
        return self.head(self.final(x))


class TimidMask(Bidirectional):
    """Adds -1 where it should hide."""

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores if mask is None else scores - (1.0 - mask.to(scores.dtype))[:, None, None, :]


class PaddedGruClassifier(nn.Module):
    """Takes the last state of padded text; the mask is accepted and used for nothing but the embedding."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None].to(x.dtype)
        return self.head(self.rnn(x)[0][:, -1])


PADDING = [
    broken("padding_leakage", "mask ignored in attention", lambda: Bert(IgnoresMask), "layers.*.attention", task="masked_lm"),
    broken("padding_leakage", "mask inverted for sdpa", lambda: Bert(InvertedMask), "layers.*.attention", task="masked_lm"),
    broken("padding_leakage", "torch encoder mask inverted", WrongPaddingSense, ("", "encoder*"), task="masked_lm"),
    broken("padding_leakage", "mean over padding", lambda: MeanOverPadding(labels=4), "", task="text_classification", num_labels=4),
    broken("padding_leakage", "second layer gets no mask", SecondLayerForgets, ("", "layers.1*"), task="masked_lm"),
    broken("padding_leakage", "mask too weak", lambda: Bert(TimidMask), "layers.*.attention", task="masked_lm"),
    broken("padding_leakage", "gru reads padding", PaddedGruClassifier, ("", "rnn"), task="text_classification"),
]  # fmt: skip


class NoPositions(Bert):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        del self.positions

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)


class ZeroPositions(Bert):
    """Looks up position 0 everywhere."""

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.positions(torch.zeros_like(input_ids))


class LostPositions(nn.Module):
    """Computes sinusoids and forgets to add them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, width)
        self.register_buffer("table", sinusoids(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 6)

    def add_positions(self, x: Tensor) -> None:
        x = x + self.table[: x.shape[1]]

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        self.add_positions(x)
        return self.head(self.encoder(x).mean(1))


class PatchBag(Vit):
    def embed(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.positions[:, :1]


class WordBag(nn.Module):
    """A language model of running means: the order of the past is lost."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, width)
        self.layers = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, width))
        self.head = nn.Linear(width, 80)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        past = x.cumsum(1) / count
        return self.head(past + self.layers(past))


class SameRotation(Bidirectional):
    """Turns queries and keys by the angle of the head, not of the position."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        angle = torch.arange(q.shape[1], device=q.device, dtype=q.dtype)[:, None, None]
        a, b = q.chunk(2, -1)
        c, d = k.chunk(2, -1)
        q = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
        k = torch.cat((c * angle.cos() - d * angle.sin(), c * angle.sin() + d * angle.cos()), -1)
        return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


POSITION = [
    broken("position_absent", "bert without positions", NoPositions, "", task="masked_lm"),
    broken("position_absent", "positions all zero", ZeroPositions, ("", "positions"), task="masked_lm"),
    broken("position_absent", "positions not added", LostPositions, "", task="text_classification"),
    broken("position_absent", "vit one position for all", PatchBag, ""),
    broken("position_absent", "running mean of words", WordBag, "", task="causal_lm"),
    broken("position_absent", "rotation by head", lambda: initialised(NoPositions(attention=SameRotation)), ("", "layers.*.attention"), task="masked_lm"),
]  # fmt: skip

ENTRIES = FUTURE + BATCH + PADDING + POSITION
