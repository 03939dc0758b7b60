"""Small text models with one switch per fault, shared by the tests of the independence checks."""

import math

import torch
from torch import nn
from torch.nn import functional


class SelfAttention(nn.Module):
    """Eager attention ``(batch, seq, width)`` with a padding mask that is 1 for real tokens."""

    def __init__(self, width=32, heads=4, causal=False, masking="sound", rotary=False):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads, self.causal, self.masking, self.rotary = heads, causal, masking, rotary

    def _split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _rotated(self, x):
        half = x.shape[-1] // 2
        steps = torch.arange(x.shape[-2], dtype=x.dtype)
        angle = torch.outer(steps, 100.0 ** -(torch.arange(half, dtype=x.dtype) / half))
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x, mask=None):
        q, k, v = (self._split(part(x)) for part in (self.q, self.k, self.v))
        if self.rotary is True:
            q, k = self._rotated(q), self._rotated(k)
        if self.rotary == "values":
            v = self._rotated(v)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        lowest = float("-inf") if self.masking == "infinite" else torch.finfo(scores.dtype).min
        if self.causal:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, lowest)
        if mask is not None and self.masking != "ignored":
            padding = (mask == 0)[:, None, None, :]
            if self.masking == "weak":
                scores = scores - 3.0 * padding.to(scores.dtype)
            else:
                scores = scores.masked_fill(~padding if self.masking == "inverted" else padding, lowest)
        weights = scores.softmax(0 if self.masking == "batch" else -1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm block."""

    def __init__(self, width=32, **settings):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, **settings)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x, mask=None):
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TextModel(nn.Module):
    """Token ids in; scores per token, or per text if `labels` is given."""

    def __init__(
        self, vocab=60, width=32, depth=2, positions="learned", labels=0, pooling="masked", pad=None, **settings
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width, padding_idx=pad)
        if positions not in ("none", "rotary", "values"):
            self.positions = nn.Embedding(64, width)
        if positions == "zero":
            nn.init.zeros_(self.positions.weight)
        settings["rotary"] = {"rotary": True, "values": "values"}.get(positions, False)
        self.layers = nn.ModuleList(Layer(width, **settings) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, labels or vocab)
        self.use, self.labels, self.pooling, self.pad = positions, labels, pooling, pad

    def embed(self, ids):
        x = self.tokens(ids)
        if self.use in ("learned", "zero"):
            return x + self.positions(torch.arange(ids.shape[1]))
        if self.use == "same":
            return x + self.positions(torch.zeros_like(ids))
        return x

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        x = self.norm(x)
        if self.labels:
            share = torch.ones_like(x[..., :1])
            if attention_mask is not None and self.pooling != "all":
                share = attention_mask[..., None].to(x.dtype)
            total = share.sum(1) if self.pooling == "empty" else share.sum(1).clamp(min=1)
            x = x[:, 0] if self.pooling == "first" else (x * share).sum(1) / total
        return self.head(x)


class Gpt(TextModel):
    """The causal kind, without a mask of padding."""

    def __init__(self, **settings):
        super().__init__(causal=True, **settings)

    def forward(self, input_ids):
        return super().forward(input_ids)


class MeanOfWords(nn.Module):
    """A bag of words."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(60, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, input_ids):
        return self.head(self.words(input_ids))


class Recurrent(nn.Module):
    """Embedding, recurrence, head."""

    def __init__(self, kind=nn.LSTM, batch_first=True, **settings):
        super().__init__()
        self.embed = nn.Embedding(60, 24)
        self.rnn = kind(24, 24, batch_first=batch_first, **settings)
        self.head = nn.Linear(48 if settings.get("bidirectional") else 24, 60)

    def forward(self, input_ids):
        return self.head(self.rnn(self.embed(input_ids))[0])


class Picture(nn.Module):
    """A small vision transformer; `positions` as above."""

    def __init__(self, positions="learned", pooling="cls", mixing=True):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 32) * 0.02)
        if positions != "none":
            self.positions = nn.Parameter(
                torch.randn(1, 16, 32) * 0.02 if positions != "zero" else torch.zeros(1, 16, 32)
            )
        self.layers = nn.ModuleList(Layer(32) for _ in range(2 if mixing else 0))
        self.head, self.use, self.pooling = nn.Linear(32, 5), positions, pooling
        self.config = {"image_size": 16}

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        if self.use in ("learned", "zero"):
            x = x + self.positions
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0] if self.pooling == "cls" else functional.gelu(x[:, 1:]).mean(1))
