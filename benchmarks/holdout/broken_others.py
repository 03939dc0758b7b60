"""Faults in models that share no body with the rest."""
# ruff: noqa: D102

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.holdout.samples import ids, mask, noise
from benchmarks.zoo.entry import broken

MASKED = {"input_ids": ids(4, 12), "attention_mask": mask(4, 12)}


class ReviewRnn(nn.Module):
    """Reviews through a plain RNN; cross entropy of a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(90, 16)
        self.rnn = nn.RNN(16, 24, batch_first=True)
        self.words = nn.Embedding(90, 16)
        self.fc = nn.Linear(40, 4)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        last = self.rnn(self.words(input_ids))[0][:, -1]
        probs = F.softmax(self.fc(torch.cat((last, self.emb(input_ids)), -1)), dim=-1)
        return (probs,) if labels is None else (F.cross_entropy(probs, labels), probs)


class PoolOverOne(nn.Module):
    """Attention pooling whose softmax runs over the one score of each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Conv1d(10, 32, 5, padding=2)
        self.attention = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1), nn.Softmax(dim=-1))
        self.out = nn.Linear(32, 6)

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.frames(mel.transpose(1, 2))).transpose(1, 2)
        return self.out((self.attention(x) * x).sum(1) / x.shape[1])


class SoundStack(nn.Module):
    """Residual convolutions over a waveform; the fourth of six replaces its input."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(1, 24, 16, 8, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, 24), nn.Conv1d(24, 24, 5, padding=2), nn.GELU(), nn.Conv1d(24, 24, 1))
            for _ in range(6)
        )
        self.out = nn.Linear(24, 5)

    def forward(self, wave: Tensor) -> Tensor:
        x = self.front(wave)
        for i, block in enumerate(self.blocks):
            x = block(x) if i == 3 else x + block(x)
        return self.out(x.mean(-1))


class CellDropout(nn.Module):
    """LSTM cell in a loop, its state thinned out in all modes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(70, 24)
        self.cell = nn.LSTMCell(24, 24)
        self.proj = nn.Linear(24, 70)

    def forward(self, x: Tensor) -> Tensor:
        h = c = self.proj.weight.new_zeros(x.shape[0], 24)
        steps = []
        for e in self.emb(x).unbind(1):
            h, c = self.cell(e, (h, c))
            h = F.dropout(h, 0.25, training=True)
            steps.append(self.proj(h))
        return torch.stack(steps, 1)


class NeverTrains(nn.Module):
    """Deployed once and kept in evaluation since: `train()` leaves dropout and batch norm as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0.2))
        self.fc = nn.Linear(16, 7)

    def train(self, mode: bool = True) -> NeverTrains:
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).mean((-1, -2)))


class OneExpertFourTimes(nn.Module):
    """A mixture whose list repeats one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))] * 4)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in self.experts], 1)
        return self.out((made * self.gate(x).softmax(-1).unsqueeze(-1)).sum(1))


class CentresImages(nn.Module):
    """Centres the caller's images in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 24, 3, 2, 1)
        self.out = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        images -= self.centre
        return self.out(F.silu(self.b(F.silu(self.a(images)))).mean((-1, -2)))


class LoudSegments(nn.Module):
    """BERT-like: quiet words, and learned positions drawn by `torch.randn` that are ten times the words."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(100, 32) * 0.02)
        self.p = nn.Parameter(torch.randn(40, 32) * 2)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.decode = nn.Linear(32, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.decode(self.block(F.embedding(input_ids, self.w) + self.p[: input_ids.shape[1]]))


class LabelsSeenTwice(nn.Module):
    """Causal convolution model; the caller's labels are the inputs, and no one moves them."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(60, 32)
        self.c = nn.Conv1d(32, 32, 4)
        self.u = nn.Linear(32, 60)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        x = self.e(input_ids)
        x = x + torch.tanh(self.c(F.pad(x.mT, (3, 0)))).mT
        out: dict[str, Any] = {"logits": self.u(x)}
        if labels is not None:
            out["loss"] = F.cross_entropy(out["logits"].view(-1, 60), labels.reshape(-1))
        return out


class Journal(nn.Module):
    """Writes the mean of every batch into a list, graph and all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(22, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))
        self.journal: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        self.journal.append(y)
        return y


ENTRIES = [
    broken("double_softmax", "reviews", ReviewRnn, ("", "fc"), task="text_classification"),
    broken(
        "wrong_softmax_dim",
        "pooling over one",
        PoolOverOne,
        ("", "attention*"),
        example_inputs={"mel": noise(4, 20, 10)},
    ),
    broken(
        "missing_residual",
        "one of six convolutions",
        SoundStack,
        ("blocks.3*",),
        example_inputs={"wave": noise(3, 1, 512)},
    ),
    broken("dropout_in_eval", "in a cell", CellDropout, ("", "cell", "proj"), ("nondeterministic_forward",)),
    broken("train_eval_ignored", "never trains", NeverTrains),
    broken(
        "shared_weight",
        "one expert four times",
        OneExpertFourTimes,
        ("experts*", ""),
        example_inputs={"x": noise(6, 16)},
    ),
    broken("input_mutation", "centred images", CentresImages, ("", "images")),
    broken(
        "embedding_scale",
        "positions of two over words of 0.02",
        LoudSegments,
        ("", "p", "w"),
        task="masked_lm",
        vocab_size=100,
        max_length=40,
    ),
    broken("label_shift", "none in convolutions", LabelsSeenTwice, ("", "u"), task="causal_lm"),
    broken("memory_growth", "journal with graphs", Journal, ("", "journal", "net*")),
]
