"""Broken models: the loss is not the right one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, TextStem, gauss, token_ids
from benchmarks.zoo.entry import broken


class SoftmaxCNN(nn.Module):
    """cross_entropy of probabilities."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, 2, 1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
        )
        self.fc = nn.Linear(48, num_classes)

    def forward(self, pixel_values, labels=None):
        logits = F.softmax(self.fc(self.features(pixel_values).mean((2, 3))), dim=-1)
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


class ProbabilityLM(nn.Module):
    """The head ends in a softmax and the loss takes another."""

    def __init__(self, vocab_size=80, dim=48):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.blocks = nn.Sequential(Block(dim, 4, causal=True), Block(dim, 4, causal=True))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, vocab_size), nn.Softmax(dim=-1))

    def forward(self, input_ids, labels=None):
        logits = self.head(self.blocks(self.stem(input_ids)))
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


class SigmoidThenBce(nn.Module):
    """A sigmoid before the loss that has its own."""

    def __init__(self, features=14, n_tags=6):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, n_tags))

    def forward(self, x, labels=None):
        logits = torch.sigmoid(self.net(x))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.binary_cross_entropy_with_logits(logits, labels)}


@dataclass
class TagOutput:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class ScrambledTagger(nn.Module):
    """(batch, tags, time) is viewed as (batch * time, tags): rows are torn apart."""

    def __init__(self, vocab_size=100, dim=48, n_tags=7):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.rnn = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)
        self.tag = nn.Linear(dim, n_tags)

    def forward(self, input_ids, labels=None):
        logits = self.tag(self.rnn(self.embed(input_ids))[0])
        loss = None
        if labels is not None:
            wrong = logits.transpose(1, 2).reshape(-1, logits.shape[-1])
            loss = F.cross_entropy(wrong, labels.reshape(-1))
        return TagOutput(logits, loss)


class RawNll(nn.Module):
    """nll_loss of raw scores: it falls without bound."""

    def __init__(self, n_in=20, classes=5):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_in, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.classifier = nn.Linear(64, classes)

    def forward(self, x, labels=None):
        logits = self.classifier(self.body(x))
        loss = F.nll_loss(logits, labels) if labels is not None else None
        return loss, logits


class CharModelUnshifted(nn.Module):
    """Position i is trained to give token i, which it has seen."""

    def __init__(self, vocab_size=80, dim=48):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.blocks = nn.Sequential(Block(dim, 4, causal=True), Block(dim, 4, causal=True))
        self.norm, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.norm(self.blocks(self.stem(input_ids))))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-100)
        return {"loss": loss, "logits": logits}


class BackwardShift(nn.Module):
    """The labels are shifted the other way: the model repeats the past."""

    def __init__(self, vocab_size=90, dim=48):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.decoder = nn.Linear(dim, vocab_size)

    def forward(self, input_ids, labels=None):
        logits = self.decoder(self.gru(self.embed(input_ids))[0])
        if labels is None:
            return {"logits": logits}
        shifted, target = logits[:, 1:], labels[:, :-1]
        return {"logits": logits, "loss": F.cross_entropy(shifted.reshape(-1, shifted.shape[-1]), target.reshape(-1))}


class DoubleShift(nn.Module):
    """The loss shifts by two: the next token is never predicted."""

    def __init__(self, vocab_size=90, dim=48):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.block = Block(dim, 4, causal=True)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size, bias=False)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.norm(self.block(self.stem(input_ids))))
        loss = None
        if labels is not None:
            labels = labels[:, 1:]
            loss = F.cross_entropy(logits[:, :-2].transpose(1, 2), labels[:, 1:])
        return loss, logits


IDS = token_ids(2, 12)
ENTRIES = [
    broken(
        "double_softmax",
        "image classifier",
        SoftmaxCNN,
        ("",),
        example_inputs={"pixel_values": gauss(4, 3, 32, 32), "labels": torch.tensor([1, 3, 0, 9])},
    ),
    broken(
        "double_softmax",
        "softmax in the head",
        ProbabilityLM,
        ("", "head", "head.2"),
        task="causal_lm",
        example_inputs={"input_ids": IDS, "labels": IDS},
    ),
    broken(
        "double_softmax",
        "sigmoid before its loss",
        SigmoidThenBce,
        ("", "net*"),
        ("wrong_builtin_loss",),
        example_inputs={"x": gauss(4, 14), "labels": (gauss(4, 6) > 0).float()},
    ),
    broken(
        "wrong_builtin_loss",
        "torn rows",
        ScrambledTagger,
        ("", "tag"),
        example_inputs={"input_ids": IDS, "labels": IDS % 7},
    ),
    broken(
        "wrong_builtin_loss",
        "nll of raw scores",
        RawNll,
        ("", "classifier"),
        example_inputs={"x": gauss(4, 20), "labels": torch.tensor([1, 4, 0, 2])},
    ),
    broken(
        "label_shift",
        "not shifted",
        CharModelUnshifted,
        ("",),
        task="causal_lm",
        example_inputs={"input_ids": IDS, "labels": IDS},
    ),
    broken(
        "label_shift",
        "shifted back",
        BackwardShift,
        ("",),
        task="causal_lm",
        example_inputs={"input_ids": IDS, "labels": IDS},
    ),
    broken(
        "label_shift",
        "shifted twice",
        DoubleShift,
        ("",),
        task="causal_lm",
        example_inputs={"input_ids": IDS, "labels": IDS},
    ),
]
