"""Sound parts from which the zoo's models are put together; a fault is one of them replaced."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Eager multi-head self-attention, ``(batch, length, width)``; each step is a method that a fault can replace."""

    causal = True

    def __init__(self, width: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])

    def allowed(self, length: int, device: torch.device) -> Tensor:
        square = torch.ones(length, length, dtype=torch.bool, device=device)
        return square.tril() if self.causal else square

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        allowed = self.allowed(scores.shape[-1], scores.device)
        if mask is not None:
            allowed = allowed & mask.bool()[:, None, None, :]
        return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.dropout(self.weights(self.masked(self.scores(q, k), mask)))
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Bidirectional(Attention):
    """The same for encoders."""

    causal = False


class FusedAttention(nn.Module):
    """Attention by `scaled_dot_product_attention`, causal where no mask of the batch is given."""

    def __init__(self, width: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        p = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.attend(self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x)), mask)
        return self.out(y.transpose(1, 2).flatten(2))


class FusedBidirectional(FusedAttention):
    """The same for encoders, with the mask of the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = None if mask is None else mask.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class FeedForward(nn.Module):
    """Two layers with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, attention: type = Attention, feed: type = FeedForward) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention(width)
        self.feed = feed(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.feed(self.norm2(x))


class RmsNorm(nn.Module):
    """Root mean square norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class SwiGlu(nn.Module):
    """Gated feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Token-choice mixture of experts, two of four per token."""

    def __init__(self, width: int, count: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(FeedForward(width) for _ in range(count))
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        share, index = self.router(x).softmax(-1).topk(self.chosen, -1)
        share = share / share.sum(-1, keepdim=True)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = (share * (index == number)).sum(-1)
            rows = mine > 0
            if rows.any():
                result[rows] = result[rows] + expert(x[rows]) * mine[rows][:, None]
        return result


class CausalConv(nn.Module):
    """Convolution over time that is padded on the left only, ``(batch, length, width)``."""

    def __init__(self, width: int, kernel: int = 4, dilation: int = 1, out: int | None = None) -> None:
        super().__init__()
        self.left = (kernel - 1) * dilation
        self.conv = nn.Conv1d(width, out or width, kernel, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (self.left, 0))).transpose(1, 2)


class StateSpace(nn.Module):
    """Diagonal linear recurrence, computed as a product with a decay matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(1.0, 4.0, width))
        self.enter, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def mix(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        gap = (steps[:, None] - steps[None, :]).to(x.dtype)
        log = F.logsigmoid(self.decay)
        kernel = torch.where(gap[..., None] >= 0, torch.exp(gap.clamp(min=0)[..., None] * log), 0.0)
        return torch.einsum("tsd,bsd->btd", kernel.to(x.dtype), x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(self.mix(self.enter(x)) * F.silu(self.gate(x)))


class ResidualConv(nn.Module):
    """Basic block of a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y)
