"""Sound language models of several hands, with seams where the broken ones differ."""
# ruff: noqa: D102

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EinsumGpt(nn.Module):
    """Decoder of raw matrices in parameter lists, rotary positions, RMS norms."""

    def __init__(self, vocab: int = 97, width: int = 32, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.depth, self.inner = depth, width // heads
        self.table = nn.Parameter(torch.randn(vocab, width) * 0.02)
        self.wq = nn.ParameterList(self.draw(width, heads, self.inner) for _ in range(depth))
        self.wk = nn.ParameterList(self.draw(width, heads, self.inner) for _ in range(depth))
        self.wv = nn.ParameterList(self.draw(width, heads, self.inner) for _ in range(depth))
        self.wo = nn.ParameterList(self.draw(heads, self.inner, width, fan=width) for _ in range(depth))
        self.up = nn.ParameterList(self.draw(width, 3 * width) for _ in range(depth))
        self.down = nn.ParameterList(self.draw(3 * width, width) for _ in range(depth))
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(2 * depth + 1))
        self.unembed = nn.Parameter(torch.randn(width, vocab) * 0.02)

    def draw(self, *shape: int, fan: int | None = None) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape) * (fan or shape[0]) ** -0.5)

    def rms(self, x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        speeds = 100.0 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None] * speeds
        cos, sin = angle.cos().to(x.dtype)[None, :, None], angle.sin().to(x.dtype)[None, :, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def visible(self, n: int, device: Any) -> Tensor:
        return torch.ones(n, n, dtype=torch.bool, device=device).tril()

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.inner)
        scores = scores.masked_fill(~self.visible(q.shape[1], q.device), torch.finfo(q.dtype).min)
        return scores.softmax(-1)

    def attend(self, i: int, x: Tensor) -> Tensor:
        q = self.rotate(torch.einsum("btw,whd->bthd", x, self.wq[i]))
        k = self.rotate(torch.einsum("btw,whd->bthd", x, self.wk[i]))
        v = torch.einsum("btw,whd->bthd", x, self.wv[i])
        return torch.einsum("bhqk,bkhd,hdw->bqw", self.weights(q, k), v, self.wo[i])

    def feed(self, i: int, x: Tensor) -> Tensor:
        return F.silu(x @ self.up[i]) @ self.down[i]

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i in range(self.depth):
            x = x + self.attend(i, self.rms(x, self.gains[2 * i]))
            x = x + self.feed(i, self.rms(x, self.gains[2 * i + 1]))
        return self.rms(x, self.gains[-1]) @ self.unembed


class Fused(nn.Module):
    """Causal attention through the fused kernel."""

    def __init__(self, width: int, heads: int, p: float = 0.1) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p if self.training else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.mix(q, k, v).transpose(1, 2).reshape(b, t, c))


class PreNorm(nn.Module):
    """Block with norms before its two parts."""

    def __init__(self, width: int, heads: int, attention: type[nn.Module] = Fused) -> None:
        super().__init__()
        self.ln_a, self.ln_m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_a(x))
        return x + self.mlp(self.ln_m(x))


class FusedGpt(nn.Module):
    """GPT with tied weights; returns logits, or logits and loss."""

    def __init__(
        self,
        vocab: int = 120,
        width: int = 48,
        heads: int = 4,
        depth: int = 3,
        length: int = 64,
        attention: type[nn.Module] = Fused,
        block: type[nn.Module] = PreNorm,
    ) -> None:
        super().__init__()
        self.tok = nn.Embedding(vocab, width)
        self.pos = nn.Embedding(length, width)
        self.drop = nn.Dropout(0.1)
        self.layers = nn.ModuleList(block(width, heads, attention) for _ in range(depth))
        self.final = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocab, bias=False)
        self.apply(self.begin)
        self.out.weight = self.tok.weight

    def begin(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.drop(self.tok(idx) + self.pos(torch.arange(idx.shape[1], device=idx.device)))
        for layer in self.layers:
            x = layer(x)
        logits = self.out(self.final(x))
        return logits if targets is None else (logits, self.loss(logits, targets))


@dataclass
class LmOutput:
    """Logits, and the loss if there were labels."""

    logits: Tensor
    loss: Tensor | None = None


class LabelLm(nn.Module):
    """GRU language model that takes labels as the inputs themselves and shifts inside."""

    def __init__(self, vocab: int = 90, width: int = 40) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab, width)
        self.rnn = nn.GRU(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocab)

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def logits(self, input_ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(input_ids))[0])

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> LmOutput:
        logits = self.logits(input_ids)
        return LmOutput(logits, None if labels is None else self.criterion(logits, labels))


class WaveLm(nn.Module):
    """Dilated causal convolutions over characters."""

    def __init__(self, vocab: int = 64, width: int = 32, dilations: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        super().__init__()
        self.chars = nn.Embedding(vocab, width)
        self.dilations = dilations
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, dilation=d) for d in dilations)
        self.mixes = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)
        self.head = nn.Conv1d(width, vocab, 1)

    def pad(self, i: int, x: Tensor) -> Tensor:
        return F.pad(x, (2 * self.dilations[i], 0))

    def forward(self, chars: Tensor) -> Tensor:
        x = self.chars(chars).transpose(1, 2)
        for i, (conv, mix) in enumerate(zip(self.convs, self.mixes, strict=True)):
            a, b = conv(self.pad(i, x)).chunk(2, 1)
            x = x + mix(torch.tanh(a) * torch.sigmoid(b))
        return self.head(x).transpose(1, 2)


class Retention(nn.Module):
    """Retention with one decay per head, in its parallel form."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v, self.g = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.o = nn.Linear(width, width, bias=False)
        self.register_buffer("decay", 1 - 2.0 ** -(3 + torch.arange(heads, dtype=torch.float32)))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def norm(self, y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        steps = torch.arange(x.shape[1], device=x.device)
        gap = steps[:, None] - steps
        fade = torch.where(gap >= 0, self.decay[:, None, None] ** gap.clamp(min=0), 0.0).to(x.dtype)
        y = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 * fade) @ v
        return self.o(F.silu(self.g(x)) * self.norm(y).transpose(1, 2).flatten(2))


class RetNet(nn.Module):
    """Retention and gated layers in turn; a dict comes back."""

    def __init__(self, vocab: int = 110, width: int = 32, depth: int = 3, kind: type[nn.Module] = Retention) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        nn.init.normal_(self.emb.weight, std=0.3)
        self.ret = nn.ModuleList(kind(width, 4) for _ in range(depth))
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width)) for _ in range(depth)
        )
        self.n1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.n2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocab))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        h = self.emb(input_ids)
        for r, f, a, b in zip(self.ret, self.ffn, self.n1, self.n2, strict=True):
            h = h + r(a(h))
            h = h + f(b(h))
        return {"logits": self.head(h)}


class Translator(nn.Module):
    """Seq2seq around `nn.Transformer`."""

    def __init__(self, source: int = 80, target: int = 70, width: int = 32, length: int = 40) -> None:
        super().__init__()
        self.width = width
        self.src_emb, self.tgt_emb = nn.Embedding(source, width), nn.Embedding(target, width)
        self.src_pos, self.tgt_pos = nn.Embedding(length, width), nn.Embedding(length, width)
        self.transformer = nn.Transformer(width, 4, 2, 2, 64, dropout=0.1, batch_first=True)
        self.generator = nn.Linear(width, target)

    def causal(self, n: int, device: Any) -> Tensor | None:
        return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)

    def steps(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1], device=x.device)

    def read(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.src_emb(src) + self.src_pos(self.steps(src))

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        y = self.tgt_emb(tgt) + self.tgt_pos(self.steps(tgt))
        return self.generator(self.transformer(self.read(src, tgt), y, tgt_mask=self.causal(tgt.shape[1], tgt.device)))
