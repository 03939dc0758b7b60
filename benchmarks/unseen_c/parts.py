"""Sound pieces that several models of this set are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def token_ids(*shape: int, low: int = 4, high: int = 50, seed: int = 3) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def gauss(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adjacency(batch: int, nodes: int, seed: int = 3) -> torch.Tensor:
    """Return symmetric 0/1 matrices of rings with chords, so that no node is alone."""
    ring = torch.eye(nodes).roll(1, 1)
    chords = (torch.rand(batch, nodes, nodes, generator=torch.Generator().manual_seed(seed)) < 0.2).float().triu(1)
    return ((ring + ring.T + chords + chords.transpose(1, 2)) > 0).float()


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, keep=None):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if keep is None else keep[:, None, None, :].bool()
        if self.causal:
            past = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
            mask = past if mask is None else mask & past
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool = False, attn: nn.Module | None = None):
        super().__init__()
        self.ln1 = nn.LayerNorm(dim)
        self.attn = attn if attn is not None else SelfAttention(dim, heads, causal)
        self.ln2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, keep=None):
        x = x + (self.attn(self.ln1(x)) if keep is None else self.attn(self.ln1(x), keep))
        return x + self.mlp(self.ln2(x))


class TextStem(nn.Module):
    """Token and position embeddings; positions count the real tokens where a mask is given."""

    def __init__(self, vocab: int, dim: int, length: int):
        super().__init__()
        self.tok = nn.Embedding(vocab, dim)
        self.pos = nn.Embedding(length, dim)
        nn.init.normal_(self.tok.weight, std=0.02)
        nn.init.normal_(self.pos.weight, std=0.02)

    def forward(self, ids, keep=None):
        if keep is None:
            steps = torch.arange(ids.shape[1], device=ids.device)
        else:
            steps = (keep.long().cumsum(1) - 1).clamp(min=0)
        return self.tok(ids) + self.pos(steps)
