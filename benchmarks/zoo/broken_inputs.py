"""Models whose answer ignores what they are given, or that break on legal ids, batches, lengths and pictures."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import broken
from benchmarks.zoo.families import (
    Bert,
    Gpt,
    LstmLm,
    Mlp,
    ResNet,
    Seq2Seq,
    SsmLm,
    Tabular,
    TorchEncoder,
    Vit,
    pair_example,
    table_example,
)  # fmt: skip


class OneClassSoftmax(nn.Module):
    """Softmax over a single output is always one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).softmax(-1)


class NormedScalar(nn.Module):
    """Layer norm over one number leaves only its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(10, 24, batch_first=True)
        self.out = nn.Linear(24, 1)
        self.norm = nn.LayerNorm(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.out(self.rnn(x)[0][:, -1]))


class BiasOnlyVit(Vit):
    """Returns the head of the class token as it was before the blocks."""

    def forward(self, pixel_values: Tensor) -> Any:
        x = self.embed(pixel_values)
        first = x[:, 0]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(first))


class ClampedNet(ResNet):
    """Pictures are clamped to an empty range on the way in."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.clamp(1.0, 1.0))


class OverwrittenGpt(Gpt):
    """The blocks run on the positions because the sum was misspelled."""

    def embed(self, idx: Tensor) -> Tensor:
        tokens = self.tokens(idx)
        return torch.zeros_like(tokens) + self.positions(torch.arange(idx.shape[1], device=idx.device))


class IntegerDivision(LstmLm):
    """Divides ids by the vocabulary to scale them, in whole numbers."""

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens // 96)


CONSTANT = [
    broken("constant_output", "softmax over one class", OneClassSoftmax, "", ("ignored_input", "double_softmax"), task="regression"),
    broken("constant_output", "layer norm over one number", NormedScalar, ("", "norm"), ("ignored_input",), task="regression"),
    broken("constant_output", "class token before the blocks", BiasOnlyVit, "", ("ignored_input",)),
    broken("constant_output", "pictures clamped to nothing", ClampedNet, "", ("ignored_input",)),
    broken("constant_output", "tokens replaced by zeros", OverwrittenGpt, "", ("ignored_input",), task="causal_lm"),
    broken("constant_output", "ids divided away", IntegerDivision, "", ("ignored_input",), task="causal_lm"),
]  # fmt: skip


class SourceBlind(Seq2Seq):
    """The decoder attends to its own input instead of the encoder's output."""

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        _ = self.transformer.encoder(self.place(self.source(src)))
        y = self.place(self.target(tgt))
        mask = self.tgt_mask(tgt)
        out = self.transformer.decoder(y, y, tgt_mask=mask, memory_mask=mask)
        return self.generator(out)


class NumbersLost(Tabular):
    def join(self, categories: Tensor, numbers: Tensor) -> Tensor:
        return super().join(categories, torch.zeros_like(numbers))


class SegmentsUnused(Bert):
    """Takes token types and embeds the ids of the tokens' rows instead."""

    def __init__(self) -> None:
        super().__init__()
        self.types = nn.Embedding(2, 48)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Any:
        x = self.norm(self.embed(input_ids) + self.types(torch.zeros_like(input_ids)))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final(x))


class TextAndPicture(nn.Module):
    """Fuses two towers, but concatenates the picture's twice."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.EmbeddingBag(50, 16)
        self.picture = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(32, 4)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        words, view = self.text(input_ids), self.picture(pixel_values)
        words = view
        return self.head(torch.cat((words, view), -1))


class CategoriesLost(Tabular):
    def join(self, categories: Tensor, numbers: Tensor) -> Tensor:
        return super().join(categories * 0, numbers)


def segment_example() -> dict[str, Tensor]:
    ids = torch.arange(16).view(2, 8)
    return {"input_ids": ids, "token_type_ids": (ids % 8 > 3).long()}


def picture_example() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(16).view(2, 8), "pixel_values": torch.arange(2 * 768.0).sin().view(2, 3, 16, 16)}


IGNORED = [
    broken("ignored_input", "seq2seq ignores its source", SourceBlind, "", ("detached_submodule", "unused_parameter"), example_inputs=pair_example(), task="seq2seq"),
    broken("ignored_input", "tabular ignores numbers", NumbersLost, "", example_inputs=table_example()),
    broken("ignored_input", "tabular ignores categories", CategoriesLost, "", example_inputs=table_example()),
    broken("ignored_input", "bert ignores segments", SegmentsUnused, "", example_inputs=segment_example()),
    broken("ignored_input", "two towers, one read", TextAndPicture, "", ("unused_parameter", "detached_submodule"), example_inputs=picture_example()),
]  # fmt: skip


class NarrowHead(Gpt):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 95, bias=False)


class WideHead(TorchEncoder):
    def __init__(self) -> None:
        super().__init__(causal=True)
        self.proj = nn.Linear(32, 192)


class SmallTable(LstmLm):
    """The tokenizer has one id more than the table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(95, 48)


class WidthHead(SsmLm):
    """Forgets the head: logits are hidden states."""

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        for mixer, norm in zip(self.mixers, self.norms, strict=True):
            x = x + mixer(norm(x))
        return self.norm_f(x)


class MaskTokenForgotten(Bert):
    """The head predicts one id fewer because the mask token was added to the inputs only."""

    def __init__(self) -> None:
        super().__init__(vocab=97)
        self.head = nn.Linear(48, 96)


VOCABULARY = [
    broken("vocab_mismatch", "gpt head too narrow", NarrowHead, ("head", ""), config={"vocab_size": 96}, task="causal_lm"),
    broken("vocab_mismatch", "head twice as wide", WideHead, ("proj", ""), config={"vocab_size": 96}, task="causal_lm"),
    broken("vocab_mismatch", "table one too small", SmallTable, ("embedding", ""), ("shape_crash",), vocab_size=96, task="causal_lm"),
    broken("vocab_mismatch", "hidden states as logits", WidthHead, ("", "lm_head"), ("unused_parameter",), config={"vocab_size": 96}, task="causal_lm"),
    broken("vocab_mismatch", "mask token without an output", MaskTokenForgotten, ("head", ""), vocab_size=97, task="masked_lm"),
]  # fmt: skip


class Squeezed(ResNet):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).squeeze())


class BatchOfFour(nn.Module):
    """Flattens with the batch size that was used in development."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4))
        self.fc = nn.Linear(8 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(4, -1))


class StoredState(LstmLm):
    """The first hidden state is stored for a batch of two."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("h0", torch.zeros(2, 2, 48))

    def forward(self, tokens: Tensor) -> Any:
        return self.decoder(self.rnn(self.embedding(tokens), (self.h0, self.h0))[0])


class LastPosition(Gpt):
    """The table of positions is one row short of the length that the config promises."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(63, 48)
        nn.init.normal_(self.positions.weight, std=0.02)


class SqueezedScores(Bert):
    """Drops the axis of a text of one token."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.norm(self.embed(input_ids)).squeeze(1)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return self.head(self.final(x))


class EvenOnly(nn.Module):
    """Pairs up steps, which fails for odd lengths."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, width)
        self.pair = nn.Linear(2 * width, 2 * width)
        self.head = nn.Linear(width, 80)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        batch, length, width = x.shape
        y = self.pair(x.view(batch, length // 2, 2 * width)).view(batch, length, width)
        return self.head(x + y)


class FlatSegmenter(nn.Module):
    """Labels each pixel, and squeezes the batch away."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values).squeeze(0)


class SqueezedMlp(Mlp):
    def forward(self, x: Tensor) -> Any:
        x = x.squeeze()
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


SHAPES = [
    broken("shape_crash", "resnet squeezes a batch of one", Squeezed, ("", "fc")),
    broken("shape_crash", "batch of four wired in", BatchOfFour, "", example_inputs={"x": torch.arange(4 * 784.0).sin().view(4, 1, 28, 28)}),
    broken("shape_crash", "lstm state for a batch of two", StoredState, ("", "rnn"), task="causal_lm"),
    broken("shape_crash", "positions one short", LastPosition, ("", "positions"), config={"vocab_size": 96, "block_size": 64}, task="causal_lm", max_length=64),
    broken("shape_crash", "text of one token", SqueezedScores, ("", "layers.0*"), task="masked_lm"),
    broken("shape_crash", "odd lengths", EvenOnly, ("", "pair"), task="masked_lm"),
    broken("shape_crash", "mlp squeezes a batch of one", SqueezedMlp, ""),
    broken("shape_crash", "pixels of a batch of one", FlatSegmenter, ""),
]  # fmt: skip

ENTRIES = CONSTANT + IGNORED + VOCABULARY + SHAPES
