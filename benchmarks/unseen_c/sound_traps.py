"""Sound models that look like a fault, first part: text and sequences."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.unseen_c.parts import Block, TextStem, gauss, token_ids
from benchmarks.zoo.entry import initialised, sinusoids, sound


class RelativeAttention(nn.Module):
    """As in T5: no scale, because the queries are drawn smaller by as much."""

    def __init__(self, dim, heads, reach=32):
        super().__init__()
        self.heads, self.reach = heads, reach
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.bias = nn.Embedding(2 * reach + 1, heads)
        nn.init.normal_(self.bias.weight, std=0.5)
        nn.init.normal_(self.q.weight, std=(dim * dim // heads) ** -0.5)
        for layer in (self.k, self.v, self.o):
            nn.init.normal_(layer.weight, std=dim**-0.5)

    def forward(self, x, keep):
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        steps = torch.arange(t, device=x.device)
        gap = (steps[None, :] - steps[:, None]).clamp(-self.reach, self.reach) + self.reach
        scores = q @ k.transpose(-2, -1) + self.bias(gap).permute(2, 0, 1)
        scores = scores.masked_fill(~keep[:, None, None, :].bool(), torch.finfo(scores.dtype).min)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class T5StyleEncoder(nn.Module):
    def __init__(self, vocab_size=100, d_model=48, num_labels=4):
        super().__init__()
        self.shared = nn.Embedding(vocab_size, d_model)
        self.block = nn.ModuleList(Block(d_model, 4, attn=RelativeAttention(d_model, 4)) for _ in range(2))
        self.final = nn.LayerNorm(d_model)
        self.classifier = nn.Linear(d_model, num_labels)

    def forward(self, input_ids, attention_mask=None):
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.shared(input_ids)
        for block in self.block:
            x = block(x, keep)
        weight = keep.unsqueeze(-1).to(x.dtype)
        return self.classifier((self.final(x) * weight).sum(1) / weight.sum(1).clamp(min=1))


class AlibiAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("slopes", 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1)), persistent=False)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        steps = torch.arange(t, device=x.device)
        gap = (steps[None, :] - steps[:, None]).to(q.dtype)
        bias = self.slopes.to(q.dtype)[:, None, None] * gap
        bias = bias.masked_fill(gap > 0, float("-inf"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(b, -1, -1, -1))
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class AlibiLM(nn.Module):
    """No position table: distances come from the bias. The head is the table of words."""

    def __init__(self, vocab_size=96, dim=48, depth=3):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, dim)
        self.blocks = nn.Sequential(*[Block(dim, 4, attn=AlibiAttention(dim, 4)) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids):
        return self.lm_head(self.ln_f(self.blocks(self.wte(input_ids))))


class AlbertLike(nn.Module):
    """One layer, used four times on purpose, and a factorized table."""

    def __init__(self, vocab_size=110, embed=24, dim=48, rounds=4):
        super().__init__()
        self.rounds = rounds
        self.stem = TextStem(vocab_size, embed, 64)
        self.widen = nn.Linear(embed, dim)
        self.shared_layer = Block(dim, 4)
        self.norm = nn.LayerNorm(dim)
        self.mlm = nn.Linear(dim, vocab_size)

    def forward(self, input_ids, attention_mask):
        x = self.widen(self.stem(input_ids, attention_mask))
        for _ in range(self.rounds):
            x = self.shared_layer(x, attention_mask)
        return self.mlm(self.norm(x))


class RoutedExperts(nn.Module):
    """Top-1 routing: an expert that no token chose has no gradient."""

    def __init__(self, dim, experts=8):
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(experts))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weight, choice = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            rows = (choice == number).nonzero().squeeze(1)
            out = out.index_add(0, rows, down(F.gelu(up(flat[rows]))) * weight[rows, None])
        return out.view_as(x)


class SwitchGPT(nn.Module):
    def __init__(self, vocab_size=100, dim=32):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.block1, self.block2 = Block(dim, 4, causal=True), Block(dim, 4, causal=True)
        self.block2.mlp = RoutedExperts(dim)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, idx):
        return self.head(self.norm(self.block2(self.block1(self.stem(idx)))))


class FrozenGlove(nn.Module):
    """Word vectors from elsewhere, frozen on purpose."""

    def __init__(self, words=120, dim=50, classes=3):
        super().__init__()
        self.glove = nn.Embedding.from_pretrained(gauss(words, dim, seed=9), freeze=True)
        self.gru = nn.GRU(dim, 48, batch_first=True, bidirectional=True)
        self.out = nn.Linear(96, classes)

    def forward(self, input_ids):
        return self.out(self.gru(self.glove(input_ids))[0].mean(1))


class LowRank(nn.Module):
    """The base is frozen, the second factor starts at zero, the first does not."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * 2.0


class LoraTagger(nn.Module):
    def __init__(self, vocab_size=100, dim=48, tags=6):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.block = Block(dim, 4)
        self.stem.requires_grad_(False)
        self.block.requires_grad_(False)
        self.block.attn.qkv = LowRank(self.block.attn.qkv)
        self.norm, self.tagger = nn.LayerNorm(dim), nn.Linear(dim, tags)

    def forward(self, input_ids):
        return self.tagger(self.norm(self.block(self.stem(input_ids))))


class Chomp1d(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    """Pads on both sides and cuts the right side off: causal after all."""

    def __init__(self, width, dilation):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(width, width, 3, padding=2 * dilation, dilation=dilation),
            Chomp1d(2 * dilation),
            nn.ReLU(),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        return x + self.net(x)


class CharTCN(nn.Module):
    def __init__(self, vocab_size=80, width=48):
        super().__init__()
        self.encoder = nn.Embedding(vocab_size, width)
        self.tcn = nn.Sequential(*[TemporalBlock(width, 2**i) for i in range(4)])
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, tokens):
        return self.decoder(self.tcn(self.encoder(tokens).transpose(1, 2)).transpose(1, 2))


class RunningMeanLM(nn.Module):
    """Pools over time, but only over the past: a running mean."""

    def __init__(self, vocab_size=90, dim=64):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 128)
        self.local = nn.Linear(2 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, input_ids):
        x = self.stem(input_ids)
        x = x + F.gelu(self.local(torch.cat([x, F.pad(x, (0, 0, 1, 0))[:, :-1]], -1)))
        h = self.norm1(x)
        count = torch.arange(1, h.shape[1] + 1, device=h.device).to(h.dtype)
        past = h.cumsum(1) / count[:, None]
        return self.head(self.norm2(x + self.mlp(torch.cat([h, past], -1))))


class PackedTagger(nn.Module):
    """Sees the future, as a tagger may; padding is packed away."""

    def __init__(self, vocab_size=110, dim=40, tags=9):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim, padding_idx=0)
        self.lstm = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)
        self.drop = nn.Dropout(0.2)
        self.proj = nn.Linear(2 * dim, tags)

    def forward(self, input_ids, lengths):
        lengths = lengths.clamp(1, input_ids.shape[1]).cpu()
        packed = pack_padded_sequence(self.embed(input_ids), lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=input_ids.shape[1])
        return self.proj(self.drop(out))


class NllLM(nn.Module):
    """log_softmax in the head and nll_loss behind it: one softmax, not two."""

    def __init__(self, ntoken=90, ninp=48):
        super().__init__()
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, ninp, batch_first=True)
        self.decoder = nn.Linear(ninp, ntoken)

    def forward(self, input_ids, labels=None):
        logp = F.log_softmax(self.decoder(self.rnn(self.encoder(input_ids))[0]), dim=-1)
        if labels is None:
            return logp
        return F.nll_loss(logp[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logp


class ScaledStem(nn.Module):
    """Tokens at d^-0.5 times sqrt(d) beside sinusoids of amplitude one, as in the paper."""

    def __init__(self, vocab_size=100, d_model=64):
        super().__init__()
        self.emb = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.emb.weight, std=d_model**-0.5)
        self.scale = math.sqrt(d_model)
        self.register_buffer("pe", sinusoids(128, d_model))
        self.layers = nn.ModuleList(Block(d_model, 4, causal=True) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def forward(self, tokens):
        x = self.emb(tokens) * self.scale + self.pe[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))


class LastMapEncoder(nn.Module):
    """Keeps the attention of the last call only; nothing reads it."""

    def __init__(self, vocab_size=100, dim=48, labels=3):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(dim, 96), nn.ReLU(), nn.Linear(96, dim))
        self.head = nn.Linear(dim, labels)
        self.last_map = None

    def forward(self, input_ids):
        x = self.stem(input_ids)
        h = self.norm1(x)
        y, weights = self.attention(h, h, h)
        self.last_map = weights.detach()
        x = x + y
        x = x + self.ff(self.norm2(x))
        return self.head(x.mean(1))


class KernelAttention(nn.Module):
    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, (F.elu(k) + 1) / t
        y = (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(2).unsqueeze(-1) + 1e-4)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class LinearEncoder(nn.Module):
    """Linear in memory as promised."""

    def __init__(self, vocab_size=100, dim=48, labels=4):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 4096)
        self.blocks = nn.Sequential(*[Block(dim, 4, attn=KernelAttention(dim)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, input_ids):
        return self.head(self.norm(self.blocks(self.stem(input_ids))).mean(1))


IDS = token_ids(2, 12)
PADDED = token_ids(2, 12)
PADDED[1, 8:] = 0
MASKED = {"input_ids": PADDED, "attention_mask": (PADDED != 0).long()}
ENTRIES = [
    sound("t5 attention without scale", T5StyleEncoder, task="text_classification"),
    sound("alibi with tied head", lambda: initialised(AlibiLM()), task="causal_lm"),
    sound("one layer four times", AlbertLike, task="masked_lm", example_inputs=MASKED),
    sound("experts not routed", SwitchGPT, task="causal_lm"),
    sound("frozen word vectors", FrozenGlove, task="text_classification", frozen=("glove",)),
    sound(
        "low rank over a frozen base",
        LoraTagger,
        frozen=("stem", "block.ln", "block.mlp", "block.attn.out", "block.attn.qkv.base"),
        example_inputs={"input_ids": IDS},
    ),
    sound("chomped convolutions", CharTCN, task="causal_lm"),
    sound("running mean", RunningMeanLM, task="causal_lm"),
    sound(
        "packed tagger",
        PackedTagger,
        pad_token_id=0,
        example_inputs={"input_ids": PADDED, "lengths": torch.tensor([12, 8])},
    ),
    sound("log softmax and nll", NllLM, task="causal_lm", example_inputs={"input_ids": IDS, "labels": IDS}),
    sound("scaled tokens and sinusoids", ScaledStem, task="causal_lm"),
    sound("last map kept", LastMapEncoder, task="text_classification"),
    sound("kernel attention", LinearEncoder, task="text_classification", linear_memory=True),
]
