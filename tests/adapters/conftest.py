"""Small models that are called, and answer, in every usual way."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Scorer(nn.Module):
    """Token ids in; `shape` makes the output from hidden states and logits."""

    def __init__(self, shape: Any = lambda hidden, logits: logits, vocabulary: int = 30, width: int = 8) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary)
        self.shape = shape

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.emb(input_ids)
        return self.shape(hidden, self.head(hidden))


class Nano(nn.Module):
    """As nanoGPT: without targets it returns the last position only."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(30, 8), nn.Embedding(16, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        hidden = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        if targets is None:
            return self.head(hidden[:, [-1], :]), None
        logits = self.head(hidden)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class RecurrentLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(30, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 30)

    def forward(self, x: Tensor, hidden: Any = None) -> Any:
        states, hidden = self.rnn(self.emb(x), hidden)
        return self.out(states), hidden


RecurrentLM.__name__ = "LSTMLM"


class Translator(nn.Module):
    """Two vocabularies of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(60, 8), nn.Embedding(40, 8)
        self.body, self.out = nn.Transformer(8, 2, 1, 1, 16, batch_first=True), nn.Linear(8, 40)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.out(self.body(self.source(src), self.target(tgt)))


@pytest.fixture
def small() -> SimpleNamespace:
    """The classes above."""
    return SimpleNamespace(Scorer=Scorer, Nano=Nano, RecurrentLM=RecurrentLM, Translator=Translator)
