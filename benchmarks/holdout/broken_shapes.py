"""Shapes, vocabularies, and parts that never train."""
# ruff: noqa: D102

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.holdout.bodies_pictures import Generator, ResNet, Spectrogram, Unet
from benchmarks.holdout.bodies_readers import GruReader, HandReader, MhaReader
from benchmarks.holdout.bodies_tables import DeepFm, Experts, FeatureTokens, Forecaster, Tabular
from benchmarks.holdout.bodies_text import EinsumGpt, FusedGpt, LabelLm, RetNet, Translator, WaveLm
from benchmarks.holdout.broken_information import CLICKS, FEATURES, MASKED, TRANSLATION
from benchmarks.holdout.samples import noise
from benchmarks.zoo.entry import broken

ROWS = {"rows": noise(6, 16)}
SERIES = {"series": noise(4, 10, 5)}
WAVE = {"waveform": noise(3, 1024)}
CODES = {"z": noise(4, 20)}


class ShortTable(LabelLm):
    """The table ends one id before the vocabulary of the settings."""

    def __init__(self) -> None:
        super().__init__(vocab=90)
        self.words = nn.Embedding(89, 40)


class WideHead(RetNet):
    """The head still has the size of another tokenizer."""

    def __init__(self) -> None:
        super().__init__(vocab=110)
        self.head[1] = nn.Linear(32, 164)


class NarrowHead(WaveLm):
    """The head lacks the special tokens."""

    def __init__(self) -> None:
        super().__init__(vocab=64)
        self.head = nn.Conv1d(32, 60, 1)


class ShiftedIds(FusedGpt):
    """Reserves id 0 inside and forgets to enlarge the table."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        return super().forward(idx + 1, targets)


class PairPool(HandReader):
    """Averages neighbours by a view, so odd lengths crash."""

    def pool(self, x: Tensor) -> Tensor:
        return super().pool(x.reshape(x.shape[0], -1, 2, x.shape[-1]).mean(2))


class SqueezedReader(MhaReader):
    """Drops all axes of size one from its answer."""

    def pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return super().pool(x, attention_mask).squeeze()


class ExtraPosition(FusedGpt):
    """Counts positions from one, so the longest text has none for its last token."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        steps = torch.arange(1, idx.shape[1] + 1, device=idx.device)
        x = self.drop(self.tok(idx) + self.pos(steps))
        for layer in self.layers:
            x = layer(x)
        logits = self.out(self.final(x))
        return logits if targets is None else (logits, self.loss(logits, targets))


class FixedBatch(Generator):
    """Folds with the batch size of the author's loader."""

    def forward(self, z: Tensor) -> Tensor:
        x = self.start(z).view(8, 64, 4, 4)
        x = F.leaky_relu(self.bn1(self.up1(x)), 0.2)
        return torch.tanh(self.rgb(F.leaky_relu(self.bn2(self.up2(x)), 0.2)))


class LengthOne(GruReader):
    """Compares every word with the one before and cannot with a single word."""

    def forward(self, words: Tensor) -> Tensor:
        x = self.lookup(words)
        change = torch.stack([x[:, i] - x[:, i - 1] for i in range(1, x.shape[1])], 1)
        x = torch.cat((x[:, :1], x[:, 1:] + change), 1)
        return self.emit(self.drop(self.lstm(x)[0]))


class DetachedEncoder(Spectrogram):
    """Takes the first convolution's data."""

    def forward(self, waveform: Tensor) -> Tensor:
        x = F.relu(self.b1(self.c1(self.picture(waveform)))).detach()
        return self.fc(F.relu(self.b2(self.c2(x))).mean((2, 3)))


class NoGradMemory(Translator):
    """Encodes the source without gradient, left over from generation."""

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        with torch.no_grad():
            memory = self.transformer.encoder(self.read(src, tgt))
        y = self.tgt_emb(tgt) + self.tgt_pos(self.steps(tgt))
        return self.generator(self.transformer.decoder(y, memory, tgt_mask=self.causal(tgt.shape[1], tgt.device)))


class CopiedFields(DeepFm):
    """Rebuilds the fields as a new tensor."""

    def fields(self, user_id: Tensor, ad_id: Tensor, numbers: Tensor) -> Tensor:
        dense = torch.tensor(self.dense(numbers).tolist(), device=numbers.device, dtype=numbers.dtype)
        return torch.stack((self.user(user_id), self.ad(ad_id), dense), 1)


class DetachedLower(RetNet):
    """Cuts the graph between its first and second layer."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        h = self.emb(input_ids)
        for i, r in enumerate(self.ret):
            h = h + r(self.n1[i](h))
            h = h + self.ffn[i](self.n2[i](h))
            if i == 0:
                h = h.data
        return {"logits": self.head(h)}


def frozen(build: Any, *names: str) -> Any:
    """Return a builder that leaves single parameters frozen."""

    def made() -> nn.Module:
        model = build()
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        return model

    return made


class SpareNorm(FeatureTokens):
    """Makes a norm after the blocks and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.post_norm = nn.LayerNorm(24)


class ShortLoop(EinsumGpt):
    """The loop ends one layer early."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i in range(self.depth - 1):
            x = x + self.attend(i, self.rms(x, self.gains[2 * i]))
            x = x + self.feed(i, self.rms(x, self.gains[2 * i + 1]))
        return self.rms(x, self.gains[-1]) @ self.unembed


class SecondExpertOnly(Experts):
    """Calls the second expert in the third's place."""

    def forward(self, rows: Tensor) -> Tensor:
        x = torch.tanh(self.inp(rows))
        share = self.router(x).softmax(-1)
        called = (0, 1, 1, 3)
        return self.head(x + sum(share[:, i : i + 1] * self.experts[c](x) for i, c in enumerate(called)))


class ForgottenSkip(Unet):
    """A convolution for the skip that no line uses."""

    def __init__(self) -> None:
        super().__init__()
        self.skip_proj = nn.Conv2d(12, 12, 1)

    def grow(self, x: Tensor, like: Tensor) -> Tensor:
        return super().grow(x, like)


class PlainList(nn.Module):
    """Residual MLP with its layers in a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(20, 32)
        self.hidden = [nn.Linear(32, 32) for _ in range(3)]
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer in self.hidden:
            x = x + F.relu(layer(x))
        return self.out(x)


class HeadsInDict(MhaReader):
    """Two heads in a Python dict."""

    def __init__(self) -> None:
        super().__init__()
        del self.classifier
        self.heads = {"topic": nn.Linear(32, 5), "tone": nn.Linear(32, 2)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.hidden_keys(attention_mask)
        for i, mha in enumerate(self.mha):
            x = self.norm1[i](x + mha(x, x, x, key_padding_mask=hidden, need_weights=False)[0])
            x = self.norm2[i](x + self.fc2[i](F.relu(self.fc1[i](x))))
        pooled = self.pool(x, attention_mask)
        return {name: head(pooled) for name, head in self.heads.items()}


class LooseTensor(FusedGpt):
    """Positions that require a gradient and are no parameter."""

    def __init__(self) -> None:
        super().__init__()
        del self.pos
        self.table = (torch.randn(64, 48) * 0.02).requires_grad_()

    def pos(self, steps: Tensor) -> Tensor:
        return self.table[steps]


class Captured(ResNet):
    """A projection that only a lambda knows."""

    def __init__(self) -> None:
        super().__init__()
        gate = nn.Linear(32, 32)
        self.gate = lambda x: x * torch.sigmoid(gate(x))

    def pool(self, x: Tensor) -> Tensor:
        return self.gate(super().pool(x))


class LazyHead(Tabular):
    """Its last layer finds out its size by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.LazyLinear(4)


class LazyStem(ResNet):
    """The first convolution is lazy."""

    def __init__(self) -> None:
        super().__init__()
        self.stem[0] = nn.LazyConv2d(16, 3, padding=1, bias=False)


class MadeLater(Forecaster):
    """Makes its reader at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.read = None

    def forward(self, series: Tensor) -> Tensor:
        if self.read is None:
            self.read = nn.Linear(self.width, series.shape[-1])
        return super().forward(series)


ATTN = "transformer.encoder"
DETACHED = ("src*", f"{ATTN}*")
ENTRIES = [
    broken("vocab_mismatch", "table one short", ShortTable, ("", "words"), config={"vocab_size": 90}),
    broken("vocab_mismatch", "head of another tokenizer", WideHead, ("", "head*", "emb"), task="causal_lm"),
    broken("vocab_mismatch", "head without special tokens", NarrowHead, ("", "head", "chars"), task="causal_lm"),
    broken("vocab_mismatch", "ids moved by one", ShiftedIds, ("", "tok"), task="causal_lm", vocab_size=120),
    broken("shape_crash", "pairs of steps", PairPool, ("", "score", "head"), example_inputs=FEATURES),
    broken("shape_crash", "reader squeezes", SqueezedReader, ("", "classifier"), example_inputs=MASKED),
    broken("shape_crash", "positions from one", ExtraPosition, ("", "pos"), ("vocab_mismatch",), max_length=64),
    broken(
        "shape_crash",
        "batch of eight",
        FixedBatch,
        ("", "start"),
        example_inputs={"z": noise(8, 20)},
        task="regression",
    ),
    broken("shape_crash", "single word", LengthOne, ("", "lookup", "lstm"), task="text_classification"),
    broken(
        "detached_submodule", "detach after first convolution", DetachedEncoder, ("", "c1*", "b1*"), example_inputs=WAVE
    ),
    broken(
        "detached_submodule",
        "encoder without gradient",
        NoGradMemory,
        DETACHED,
        example_inputs=TRANSLATION,
        task="seq2seq",
    ),
    broken("detached_submodule", "tensor from list", CopiedFields, ("dense*",), example_inputs=CLICKS),
    broken(
        "detached_submodule",
        "data between layers",
        DetachedLower,
        ("emb*", "ret.0*", "n1.0*", "n2.0*", "ffn.0*"),
        task="causal_lm",
    ),
    broken("frozen_parameter", "one projection", frozen(FusedGpt, "layers.1.attn.proj.weight"), "layers.1.attn.proj*"),
    broken("frozen_parameter", "one convolution", frozen(ResNet, "stage2.0.conv1.weight"), "stage2.0.conv1*"),
    broken("frozen_parameter", "one matrix of raw ones", frozen(EinsumGpt, "up.1"), "up.1", vocab_size=97),
    broken(
        "frozen_parameter",
        "one expert",
        frozen(Experts, "experts.2.0.weight", "experts.2.2.weight"),
        "experts.2*",
        example_inputs=ROWS,
    ),
    broken("unused_parameter", "norm never called", SpareNorm, "post_norm*", example_inputs={"table": noise(5, 9)}),
    broken("unused_parameter", "loop one short", ShortLoop, ("w[qkvo].2", "up.2", "down.2", "gains.*"), vocab_size=97),
    broken("unused_parameter", "expert never called", SecondExpertOnly, "experts.2*", example_inputs=ROWS),
    broken(
        "unused_parameter",
        "skip never used",
        ForgottenSkip,
        "skip_proj*",
        example_inputs={"image": noise(2, 3, 32, 32)},
    ),
    broken("unregistered_layer", "list of layers", PlainList, ("", "hidden*")),
    broken("unregistered_layer", "dict of heads", HeadsInDict, ("", "heads*"), example_inputs=MASKED),
    broken("unregistered_layer", "loose tensor", LooseTensor, ("", "table"), task="causal_lm"),
    broken("unregistered_layer", "captured by a lambda", Captured, ("", "gate*")),
    broken("lazy_parameter", "lazy head", LazyHead, ("out*",)),
    broken("lazy_parameter", "lazy stem", LazyStem, ("stem.0*",), example_inputs={"pixels": noise(2, 3, 32, 32)}),
    broken(
        "lazy_parameter", "made at first call", MadeLater, ("", "read*"), ("unregistered_layer",), example_inputs=SERIES
    ),
]
