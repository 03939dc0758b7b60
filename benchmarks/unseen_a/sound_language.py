"""Sound models over tokens that generate from left to right."""

# ruff: noqa: D102, D103

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.zoo.entry import initialised, sinusoids, sound


@dataclass
class PocketConfig:
    """Sizes of the pocket model."""

    vocab: int = 96
    ctx: int = 64
    dim: int = 48
    heads: int = 4
    depth: int = 2
    drop: float = 0.0


class Heads(nn.Module):
    """Causal self-attention through the fused kernel."""

    def __init__(self, cfg):
        super().__init__()
        self.h, self.drop = cfg.heads, cfg.drop
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.out = nn.Linear(cfg.dim, cfg.dim)

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.drop if self.training else 0.0)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4)
        return self.out(self.mix(q, k, v).transpose(1, 2).reshape(b, t, d))


class Layer(nn.Module):
    """Pre-norm block."""

    attention = Heads

    def __init__(self, cfg):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)
        self.att = self.attention(cfg)
        self.ff = nn.Sequential(nn.Linear(cfg.dim, 4 * cfg.dim), nn.GELU(), nn.Linear(4 * cfg.dim, cfg.dim))

    def forward(self, x):
        x = x + self.att(self.n1(x))
        return x + self.ff(self.n2(x))


class PocketGPT(nn.Module):
    """Learned positions, tied head."""

    layer = Layer

    def __init__(self, cfg=None):
        super().__init__()
        cfg = self.cfg = cfg or PocketConfig()
        self.tok = nn.Embedding(cfg.vocab, cfg.dim)
        self.pos = nn.Embedding(cfg.ctx, cfg.dim)
        self.layers = nn.ModuleList(self.layer(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.dim)
        self.head = nn.Linear(cfg.dim, cfg.vocab, bias=False)
        self.head.weight = self.tok.weight

    def embed(self, idx):
        return self.tok(idx) + self.pos(torch.arange(idx.shape[1], device=idx.device))

    def body(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, idx):
        return self.head(self.norm(self.body(self.embed(idx))))


class CheckpointedGPT(PocketGPT):
    """Recomputes each layer in the backward pass."""

    def body(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.training else layer(x)
        return x


class MaskByLength(Heads):
    """Keeps one mask per length, which no call changes."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self._masks = {}

    def mix(self, q, k, v):
        t = q.shape[2]
        if t not in self._masks:
            self._masks[t] = torch.ones(t, t, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._masks[t].to(q.device))


class AlibiHeads(Heads):
    """Linear distance penalties for positions."""

    def mix(self, q, k, v):
        t = q.shape[2]
        at = torch.arange(t, device=q.device)
        slopes = 2.0 ** (-8.0 * torch.arange(1, self.h + 1, device=q.device) / self.h)
        bias = (at[None] - at[:, None]).to(q.dtype) * slopes[:, None, None].to(q.dtype)
        bias = bias.masked_fill(at[None] > at[:, None], float("-inf"))
        return ((q @ k.mT) / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


class BucketHeads(Heads):
    """A learned bias per clipped distance, as in T5."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rel = nn.Embedding(16, cfg.heads)

    def mix(self, q, k, v):
        at = torch.arange(q.shape[2], device=q.device)
        gap = at[:, None] - at[None]
        bias = self.rel(gap.clamp(0, 15)).permute(2, 0, 1).masked_fill(gap < 0, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


class LinearHeads(Heads):
    """Kernel attention by running sums: linear in the length."""

    def mix(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhtk,bhtv->bhtkv", k, v).cumsum(2)
        norm = torch.einsum("bhtk,bhtk->bht", q, k.cumsum(2))
        return torch.einsum("bhtk,bhtkv->bhtv", q, state) / norm[..., None]


class AlibiLayer(Layer):
    """Block with distance penalties."""

    attention = AlibiHeads


class BucketLayer(Layer):
    """Block with bucketed distances."""

    attention = BucketHeads


class LinearLayer(Layer):
    """Block with kernel attention."""

    attention = LinearHeads


class CachedLayer(Layer):
    """Block with masks kept by length."""

    attention = MaskByLength


class NoTable(PocketGPT):
    """Positions only inside the attention."""

    layer = AlibiLayer

    def __init__(self, cfg=None):
        super().__init__(cfg)
        del self.pos

    def embed(self, idx):
        return self.tok(idx)


class BucketGPT(NoTable):
    """Positions by bucketed distances only."""

    layer = BucketLayer


class LinearGPT(PocketGPT):
    """Linear attention."""

    layer = LinearLayer


class CachedGPT(PocketGPT):
    """Masks by length."""

    layer = CachedLayer


class RMS(nn.Module):
    """Root mean square norm."""

    def __init__(self, d):
        super().__init__()
        self.g = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.g, 1e-6)


def rotate(x):
    t, d = x.shape[-2:]
    inv = 1e4 ** (-torch.arange(0, d, 2, device=x.device).float() / d)
    ang = torch.arange(t, device=x.device).float()[:, None] * inv
    cos, sin = ang.cos().to(x.dtype), ang.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class LlamaishBlock(nn.Module):
    """Rotary grouped-query attention and a gated feed-forward."""

    def __init__(self, d=64, heads=4, kv=2):
        super().__init__()
        self.heads, self.kv, self.hd = heads, kv, d // heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, kv * self.hd, bias=False)
        self.v_proj = nn.Linear(d, kv * self.hd, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.gate, self.up = nn.Linear(d, 2 * d, bias=False), nn.Linear(d, 2 * d, bias=False)
        self.down = nn.Linear(2 * d, d, bias=False)
        self.in_norm, self.post_norm = RMS(d), RMS(d)

    def attend(self, x):
        b, t, d = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, -1).transpose(1, 2))
        k = rotate(self.k_proj(x).view(b, t, self.kv, -1).transpose(1, 2)).repeat_interleave(self.heads // self.kv, 1)
        v = self.v_proj(x).view(b, t, self.kv, -1).transpose(1, 2).repeat_interleave(self.heads // self.kv, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, d))

    def forward(self, x):
        x = x + self.attend(self.in_norm(x))
        y = self.post_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llamaish(nn.Module):
    """Returns a dict with a loss that shifts by itself."""

    block = LlamaishBlock

    def __init__(self, vocab_size=120, d=64, n=2):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, d)
        self.blocks = nn.ModuleList(self.block(d) for _ in range(n))
        self.norm = RMS(d)
        self.lm_head = nn.Linear(d, vocab_size, bias=False)

    def loss_of(self, logits, labels):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def forward(self, input_ids, labels=None):
        x = self.embed_tokens(input_ids)
        for b in self.blocks:
            x = b(x)
        out = {"logits": self.lm_head(self.norm(x))}
        if labels is not None:
            out["loss"] = self.loss_of(out["logits"], labels)
        return out


class CharLSTM(nn.Module):
    """Returns logits and the hidden state."""

    def __init__(self, vocab=70, width=48):
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        self.rnn = nn.LSTM(width, width, 2, batch_first=True, dropout=0.1)
        self.fc = nn.Linear(width, vocab)

    def forward(self, x, state=None):
        y, state = self.rnn(self.emb(x), state)
        return self.fc(y), state


class CausalConvStack(nn.Module):
    """Dilated convolutions padded on the left."""

    def __init__(self, vocab=64, c=40):
        super().__init__()
        self.lookup = nn.Embedding(vocab, c)
        self.convs = nn.ModuleList(nn.Conv1d(c, c, 3, dilation=2**i) for i in range(4))
        self.readout = nn.Linear(c, vocab)

    def pad(self, x, i):
        return F.pad(x, (2 * 2**i, 0))

    def forward(self, tokens):
        x = self.lookup(tokens).transpose(1, 2)
        for i, conv in enumerate(self.convs):
            x = x + F.relu(conv(self.pad(x, i)))
        return self.readout(x.transpose(1, 2))


class DiagonalSSM(nn.Module):
    """Real diagonal state space turned into a long causal kernel."""

    def __init__(self, d=32, n=8):
        super().__init__()
        self.log_a = nn.Parameter(torch.log(torch.linspace(0.05, 2.0, n)).repeat(d, 1))
        self.B = nn.Parameter(torch.randn(d, n) / math.sqrt(n))
        self.C = nn.Parameter(torch.randn(d, n) / math.sqrt(n))
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, u):
        t = u.shape[1]
        decay = torch.exp(-self.log_a.exp()[..., None] * torch.arange(t, device=u.device))
        kernel = torch.einsum("dn,dn,dnt->dt", self.B, self.C, decay)
        spec = torch.fft.rfft(u.mT.float(), 2 * t) * torch.fft.rfft(kernel.float(), 2 * t)
        return torch.fft.irfft(spec, 2 * t)[..., :t].mT.to(u.dtype) + self.D * u


class SSMLM(nn.Module):
    """State-space language model."""

    def __init__(self, vocab=80, d=32):
        super().__init__()
        self.wte = nn.Embedding(vocab, d)
        self.mixers = nn.ModuleList(DiagonalSSM(d) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.proj = nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        self.unembed = nn.Linear(d, vocab)

    def forward(self, input_ids):
        x = self.wte(input_ids)
        for mixer, norm, proj in zip(self.mixers, self.norms, self.proj, strict=True):
            x = x + proj(F.gelu(mixer(norm(x))))
        return self.unembed(x)


class TopOne(nn.Module):
    """Each token picks one expert of eight."""

    def __init__(self, d, n=8):
        super().__init__()
        self.router = nn.Linear(d, n, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)) for _ in range(n)
        )

    def forward(self, x):
        weight, pick = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = pick == i
            if rows.any():
                y[rows] = (expert(x[rows]) * weight[rows, None]).to(y.dtype)
        return y


class RoutedLayer(Layer):
    """Feed-forward by experts."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.ff = TopOne(cfg.dim)


class RoutedGPT(PocketGPT):
    """Mixture of experts; some get no token."""

    layer = RoutedLayer


class VaswaniLM(nn.Module):
    """Library layers, token vectors times the root of the width, sinusoids as a buffer."""

    def __init__(self, ntoken=90, d_model=32):
        super().__init__()
        self.d = d_model
        self.encoder = nn.Embedding(ntoken, d_model)
        nn.init.normal_(self.encoder.weight, std=d_model**-0.5)
        self.register_buffer("pe", sinusoids(128, d_model), persistent=False)
        layer = nn.TransformerEncoderLayer(d_model, 4, 64, 0.1, batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.Linear(d_model, ntoken)

    def forward(self, src):
        n = src.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=src.device, dtype=self.pe.dtype)
        x = self.encoder(src) * math.sqrt(self.d) + self.pe[:n]
        return self.decoder(self.stack(x, mask=mask, is_causal=True))


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank addition that starts at zero."""

    def __init__(self, base, r=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) / math.sqrt(base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + 2.0 * (x @ self.lora_A.mT) @ self.lora_B.mT


def adapted():
    model = initialised(PocketGPT()).requires_grad_(False)
    for layer in model.layers:
        layer.att.qkv = LowRank(layer.att.qkv)
        layer.att.out = LowRank(layer.att.out)
    return model


ENTRIES = [
    sound("pocket_gpt", lambda: initialised(PocketGPT())),
    sound("checkpointed_gpt", lambda: initialised(CheckpointedGPT())),
    sound("alibi_without_table", lambda: initialised(NoTable())),
    sound("bucketed_distances", lambda: initialised(BucketGPT())),
    sound("linear_attention", lambda: initialised(LinearGPT())),
    sound("masks_by_length", lambda: initialised(CachedGPT())),
    sound("rotary_grouped_dict", lambda: initialised(Llamaish())),
    sound("char_lstm", CharLSTM),
    sound("dilated_left_padding", CausalConvStack),
    sound("diagonal_ssm", SSMLM),
    sound("top_one_experts", lambda: initialised(RoutedGPT())),
    sound("library_causal_stack", VaswaniLM),
    sound("low_rank_adapters", adapted),
]
