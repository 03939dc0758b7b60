"""Sound encoders of text: classifiers, taggers, masked models, embeddings."""
# ruff: noqa: D102

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ReaderOutput:
    """What a reader says."""

    logits: Tensor
    pooled: Tensor


class MhaReader(nn.Module):
    """Sentiment classifier on `nn.MultiheadAttention`, post-norm, masked mean."""

    def __init__(self, vocab: int = 100, width: int = 32, depth: int = 2, labels: int = 5, length: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width, padding_idx=0)
        self.position = nn.Parameter(torch.randn(length, width) * 0.5)
        self.mha = nn.ModuleList(nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True) for _ in range(depth))
        self.norm1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.fc1 = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.fc2 = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.norm2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.classifier = nn.Linear(width, labels)

    def hidden_keys(self, attention_mask: Tensor) -> Tensor | None:
        hidden = attention_mask == 0
        return hidden & ~hidden.all(1, keepdim=True)

    def pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        m = attention_mask.unsqueeze(-1).to(x.dtype)
        return (x * m).sum(1) / m.sum(1).clamp(min=1)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids) + self.position[: input_ids.shape[1]]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ReaderOutput:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.embed(input_ids)
        for i, mha in enumerate(self.mha):
            keys = self.hidden_keys(attention_mask)
            x = self.norm1[i](x + mha(x, x, x, key_padding_mask=keys, need_weights=False)[0])
            x = self.norm2[i](x + self.fc2[i](F.relu(self.fc1[i](x))))
        pooled = self.pool(x, attention_mask)
        return ReaderOutput(self.classifier(pooled), pooled)


class MaskedReader(nn.Module):
    """Masked language model on `nn.TransformerEncoder`; the future may be seen."""

    def __init__(self, vocab: int = 105, width: int = 32, depth: int = 3, length: int = 48) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(vocab, width)
        self.position_embeddings = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.decoder = nn.Linear(width, vocab)
        for table in (self.token_embeddings, self.position_embeddings):
            nn.init.normal_(table.weight, std=0.02)

    def embed(self, input_ids: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embeddings(input_ids) + self.position_embeddings(steps)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.decoder(self.transform(self.encoder(self.embed(input_ids))))


class HandReader(nn.Module):
    """Encoder with hand-written attention, reads features of shape (batch, time, channels)."""

    def __init__(self, channels: int = 12, width: int = 32, heads: int = 2, depth: int = 2, labels: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.inp = nn.Linear(channels, width)
        self.conv_pos = nn.Conv1d(width, width, 5, padding=2, groups=4)
        self.to_q = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.to_k = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.to_v = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.to_o = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.pre = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.score = nn.Linear(width, 1)
        self.head = nn.Linear(width, labels)

    def heads_of(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).movedim(2, 1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q.matmul(k.mT) * q.shape[-1] ** -0.5

    def normalise(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, dim=-1)

    def pool(self, x: Tensor) -> Tensor:
        return (torch.softmax(self.score(x), dim=1) * x).sum(1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.inp(features)
        x = x + F.gelu(self.conv_pos(x.mT).mT)
        for q, k, v, o, pre in zip(self.to_q, self.to_k, self.to_v, self.to_o, self.pre, strict=True):
            h = pre(x)
            a = self.normalise(self.scores(self.heads_of(q(h)), self.heads_of(k(h))))
            x = x + o(a.matmul(self.heads_of(v(h))).movedim(1, 2).flatten(2))
        return self.head(self.pool(x))


class Perceiver(nn.Module):
    """Latents that read bytes by cross attention."""

    def __init__(self, width: int = 32, latents: int = 6, labels: int = 4, length: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.where = nn.Embedding(length, width)
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.norm_l, self.norm_x, self.norm_s = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross = nn.MultiheadAttention(width, 2, batch_first=True)
        self.own = nn.MultiheadAttention(width, 2, batch_first=True)
        self.ff = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, labels)

    def content(self, byte_ids: Tensor) -> Tensor:
        return self.bytes(byte_ids) + self.where(torch.arange(byte_ids.shape[1], device=byte_ids.device))

    def forward(self, byte_ids: Tensor) -> Tensor:
        x = self.norm_x(self.content(byte_ids))
        z = self.latents.expand(x.shape[0], -1, -1)
        z = z + self.cross(self.norm_l(z), x, x, need_weights=False)[0]
        s = self.norm_s(z)
        z = z + self.own(s, s, s, need_weights=False)[0]
        z = z + self.ff(z)
        return self.head(z.mean(1))


class GruReader(nn.Module):
    """Bidirectional tagger of words with an LSTM."""

    def __init__(self, vocab: int = 80, width: int = 24, tags: int = 9) -> None:
        super().__init__()
        self.lookup = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.drop = nn.Dropout(0.2)
        self.emit = nn.Linear(2 * width, tags)

    def forward(self, words: Tensor) -> Tensor:
        return self.emit(self.drop(self.lstm(self.lookup(words))[0]))


class Fnet(nn.Module):
    """Fourier mixing in place of attention; returns a tuple."""

    def __init__(self, vocab: int = 60, width: int = 32, length: int = 32, labels: int = 3) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in "ab")
        self.cls = nn.Linear(width, labels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        for i, mlp in enumerate(self.mlps):
            mixed = torch.fft.fft2(x.float(), norm="ortho").real.to(x.dtype)
            x = self.norms[2 * i](x + mixed)
            x = self.norms[2 * i + 1](x + mlp(x))
        return self.cls(x[:, 0]), x
