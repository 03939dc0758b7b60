"""Sound models of text that look as if something were wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.zoo.entry import initialised, sinusoids, sound


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x):
    return x.transpose(1, 2).flatten(2)


class AlibiAttention(nn.Module):
    def __init__(self, d, heads=4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, heads + 1) * 2, persistent=False)

    def forward(self, x):
        q, k, v = (split(z, self.heads) for z in self.qkv(x).chunk(3, -1))
        at = torch.arange(x.size(1), device=x.device)
        distance = (at[:, None] - at[None, :]).to(x.dtype)
        bias = -self.slopes.to(x.dtype)[:, None, None] * distance
        bias = bias.masked_fill(distance < 0, float("-inf"))
        return self.out(join(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])))


class RotaryAttention(nn.Module):
    """The table is kept for the longest sequence seen so far."""

    def __init__(self, d, heads=4):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.size, self.table = d // heads, None

    def turn(self, x):
        t = x.size(2)
        if self.table is None or self.table.size(0) < t or self.table.device != x.device:
            rate = 1e4 ** (-torch.arange(0, self.size, 2, device=x.device) / self.size)
            self.table = torch.outer(torch.arange(t, device=x.device), rate)
        angle = self.table[:t]
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        c, s = angle.cos(), angle.sin()
        return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).to(x.dtype)

    def forward(self, x):
        q, k, v = (split(z, self.heads) for z in self.qkv(x).chunk(3, -1))
        return self.out(join(F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)))


class RelativeBias(nn.Module):
    """T5: a learned bias for each bucket of distance, no scale, since the initialisation has it."""

    def __init__(self, d, heads=4, causal=True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.bias = nn.Embedding(33, heads)

    def reset(self):
        d = self.q.in_features
        nn.init.normal_(self.q.weight, std=(d * d // self.heads) ** -0.5)
        for m in (self.k, self.v, self.o):
            nn.init.normal_(m.weight, std=d**-0.5)
        nn.init.normal_(self.bias.weight, std=0.3)

    def forward(self, x):
        at = torch.arange(x.size(1), device=x.device)
        far = at[None, :] - at[:, None]
        scores = split(self.q(x), self.heads) @ split(self.k(x), self.heads).mT
        scores = scores + self.bias(far.clamp(-16, 16) + 16).permute(2, 0, 1)
        if self.causal:
            scores = scores.masked_fill(far > 0, torch.finfo(scores.dtype).min)
        return self.o(join(scores.float().softmax(-1).to(x.dtype) @ split(self.v(x), self.heads)))


class CosineAttention(nn.Module):
    """Normalised queries and keys with a learned temperature in place of the square root."""

    def __init__(self, d, heads=4):
        super().__init__()
        self.heads, self.wq, self.wk, self.wv, self.wo = heads, *(nn.Linear(d, d) for _ in range(4))
        self.tau = nn.Parameter(torch.full((heads, 1, 1), math.log(8.0)))

    def forward(self, x):
        q, k = F.normalize(split(self.wq(x), self.heads), dim=-1), F.normalize(split(self.wk(x), self.heads), dim=-1)
        t = x.size(1)
        hidden = torch.ones(t, t, device=x.device, dtype=torch.bool).triu(1)
        a = ((q @ k.mT) * self.tau.exp()).masked_fill(hidden, float("-inf")).softmax(-1)
        return self.wo(join(a @ split(self.wv(x), self.heads)))


class Block(nn.Module):
    def __init__(self, d, attn, gate=None, ckpt=False):
        super().__init__()
        self.n1, self.attn, self.n2, self.ckpt = nn.LayerNorm(d), attn, nn.LayerNorm(d), ckpt
        self.ff = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.gate = None if gate is None else nn.Parameter(torch.full((2,), gate))

    def run(self, x):
        g, h = (1.0, 1.0) if self.gate is None else self.gate
        x = x + g * self.attn(self.n1(x))
        return x + h * self.ff(self.n2(x))

    def forward(self, x):
        if self.ckpt and self.training and torch.is_grad_enabled():
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)


class LM(nn.Module):
    """Causal language model whose attention knows the positions."""

    def __init__(self, attn, vocab=72, d=48, depth=2, tied=False, zero_head=False, **block):
        super().__init__()
        self.tok = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, attn(d), **block) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        initialised(self)
        for b in self.blocks:
            if hasattr(b.attn, "reset"):
                b.attn.reset()
        if tied:
            self.head.weight = self.tok.weight
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, idx):
        x = self.tok(idx)
        for b in self.blocks:
            x = b(x)
        return self.head(self.norm(x))


@dataclass
class Out:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class ShiftedInside(LM):
    """labels equal input_ids; the model shifts them."""

    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return Out(logits, loss)


class ShiftedOutside(LM):
    """targets are the next tokens already."""

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        loss = (
            None
            if targets is None
            else F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        )
        return logits, loss


class FrozenVectors(nn.Module):
    def __init__(self, vocab=90, d=32, classes=4):
        super().__init__()
        self.vectors = nn.Embedding.from_pretrained(torch.randn(vocab, d), freeze=True)
        self.lstm = nn.LSTM(d, 32, batch_first=True, bidirectional=True)
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(64, classes)

    def forward(self, tokens):
        return self.out(self.drop(self.lstm(self.vectors(tokens))[0]).amax(1))


class BertLike(nn.Module):
    """Bidirectional on purpose; masked mean; the mask is additive."""

    def __init__(self, vocab=99, d=48, heads=4, depth=2, labels=None, tied=True):
        super().__init__()
        self.heads, self.labels = heads, labels
        self.word, self.position, self.kind = (
            nn.Embedding(vocab, d, padding_idx=0),
            nn.Embedding(64, d),
            nn.Embedding(2, d),
        )
        self.ln = nn.LayerNorm(d)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(d, 3 * d),
                    "o": nn.Linear(d, d),
                    "l1": nn.LayerNorm(d),
                    "f1": nn.Linear(d, 96),
                    "f2": nn.Linear(96, d),
                    "l2": nn.LayerNorm(d),
                }
            )
            for _ in range(depth)
        )
        self.out = nn.Linear(d, labels or vocab)
        initialised(self)
        if tied and not labels:
            self.out.weight = self.word.weight

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word(input_ids) + self.position.weight[: input_ids.size(1)] + self.kind(kinds)
        x = F.dropout(self.ln(x), 0.1, training=self.training)
        add = (1 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        for m in self.layers:
            q, k, v = (split(z, self.heads) for z in m["qkv"](x).chunk(3, -1))
            a = (q @ k.mT / math.sqrt(q.size(-1)) + add).softmax(-1)
            x = m["l1"](x + m["o"](join(a @ v)))
            x = m["l2"](x + m["f2"](F.gelu(m["f1"](x))))
        if self.labels:
            w = attention_mask.unsqueeze(-1).to(x.dtype)
            x = (x * w).sum(1) / w.sum(1).clamp(min=1)
        return {"logits": self.out(x)}


class Albert(nn.Module):
    """One layer, called four times on purpose."""

    def __init__(self, vocab=80, d=32, classes=3, turns=4):
        super().__init__()
        self.emb, self.turns = nn.Embedding(vocab, d), turns
        self.register_buffer("pe", sinusoids(96, d))
        self.layer = nn.TransformerEncoderLayer(d, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.norm, self.cls = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, input_ids):
        x = self.emb(input_ids) * 0.7 + self.pe[: input_ids.size(1)]
        for _ in range(self.turns):
            x = self.layer(x)
        return self.cls(self.norm(x).mean(1))


class ScaledSinusoids(nn.Module):
    """Vaswani: tokens at 1/sqrt(d), times sqrt(d), plus sinusoids."""

    def __init__(self, vocab=70, d=64):
        super().__init__()
        self.d, self.lut, self.proj = d, nn.Embedding(vocab, d), nn.Linear(d, vocab)
        self.register_buffer("pe", sinusoids(128, d)[None], persistent=False)
        layer = nn.TransformerEncoderLayer(d, 4, 128, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        nn.init.normal_(self.lut.weight, std=d**-0.5)
        self.drop = nn.Dropout(0.1)

    def forward(self, tokens):
        t = tokens.size(1)
        x = self.drop(self.lut(tokens) * math.sqrt(self.d) + self.pe[:, :t])
        mask = torch.ones(t, t, device=tokens.device, dtype=torch.bool).triu(1)
        return self.proj(self.body(x, mask=mask))


class BagOfWords(nn.Module):
    """fastText: order does not matter on purpose."""

    def __init__(self, vocab=100, d=24, classes=5):
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(vocab, d, mode="mean"), nn.Linear(d, classes)

    def forward(self, input_ids):
        return self.fc(self.bag(input_ids))


class CarryGRU(nn.Module):
    """Padded steps leave the state as it is."""

    def __init__(self, vocab=64, d=32, classes=4):
        super().__init__()
        self.emb, self.cell, self.cls = nn.Embedding(vocab, d, padding_idx=0), nn.GRUCell(d, d), nn.Linear(d, classes)

    def forward(self, input_ids, attention_mask=None):
        x = self.emb(input_ids)
        h = x.new_zeros(x.size(0), x.size(2))
        for t in range(x.size(1)):
            new = self.cell(x[:, t], h)
            h = new if attention_mask is None else torch.where(attention_mask[:, t, None].bool(), new, h)
        return self.cls(h)


class StatePassed(nn.Module):
    """The state is an optional argument and a result."""

    def __init__(self, vocab=70, d=40):
        super().__init__()
        self.embed, self.lstm, self.head = (
            nn.Embedding(vocab, d),
            nn.LSTM(d, d, 2, batch_first=True, dropout=0.2),
            nn.Linear(d, vocab),
        )

    def forward(self, input_ids, hidden=None):
        y, hidden = self.lstm(self.embed(input_ids), hidden)
        return self.head(y), hidden


class CausalConvLM(nn.Module):
    """Left padding only; the norm is over channels."""

    def __init__(self, vocab=64, c=40):
        super().__init__()
        self.emb = nn.Embedding(vocab, c)
        self.convs = nn.ModuleList(nn.Conv1d(c, c, 3, padding=2 * d, dilation=d) for d in (1, 2, 4))
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(4))
        self.out = nn.Linear(c, vocab)

    def forward(self, idx):
        x = self.emb(idx)
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = x + F.gelu(conv(norm(x).mT)[..., : idx.size(1)].mT)
        return self.out(self.norms[-1](x))


class CausalLinear(nn.Module):
    """Linear attention by cumulative sums."""

    def __init__(self, d):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.pos = nn.Conv1d(d, d, 4, groups=d)

    def forward(self, x):
        x = x + self.pos(F.pad(x.mT, (3, 0))).mT
        q, k, v = (split(f(x), 4) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=2)
        z = (q * torch.cumsum(k, dim=2)).sum(-1, keepdim=True)
        return self.o(join(torch.einsum("bhtd,bhtde->bhte", q, kv) / (z + 1e-3)))


class SharedGPTMoE(nn.Module):
    """Two of eight experts by token; an expert may be without tokens in a batch."""

    def __init__(self, d, experts=8):
        super().__init__()
        self.gate = nn.Linear(d, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 32), nn.SiLU(), nn.Linear(32, d)) for _ in range(experts)
        )

    def forward(self, x):
        flat = x.flatten(0, -2)
        w, choice = self.gate(flat).softmax(-1).topk(2, dim=-1)
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, slot = torch.where(choice == e)
            if rows.numel():
                out = out.index_add(0, rows, expert(flat[rows]) * w[rows, slot, None])
        return out.view_as(x)


def moe():
    model = LM(RotaryAttention)
    model.blocks[1].ff = SharedGPTMoE(48)
    return initialised(model)


C = {"task": "causal_lm"}
ENTRIES = [
    sound("alibi_gpt", lambda: LM(AlibiAttention), **C),
    sound("rotary_table_kept_by_length", lambda: LM(RotaryAttention), **C),
    sound("t5_relative_bias_without_scale", lambda: LM(RelativeBias), **C),
    sound("cosine_attention_with_temperature", lambda: LM(CosineAttention, d=32), vocab_size=72, **C),
    sound("tied_weights", lambda: LM(RotaryAttention, tied=True), **C),
    sound("zero_head", lambda: LM(RotaryAttention, zero_head=True), **C),
    sound("rezero_gates", lambda: LM(RotaryAttention, gate=0.0, depth=3), **C),
    sound("checkpointed_blocks", lambda: LM(AlibiAttention, ckpt=True), **C),
    sound("labels_shifted_inside", lambda: ShiftedInside(RotaryAttention), **C),
    sound("targets_shifted_outside", lambda: ShiftedOutside(RotaryAttention), **C),
    sound("frozen_word_vectors", FrozenVectors),
    sound("masked_lm_sees_both_sides", BertLike, task="masked_lm", pad_token_id=0),
    sound("bert_masked_mean", lambda: BertLike(labels=4), task="text_classification", pad_token_id=0),
    sound("albert_one_layer", Albert),
    sound("embedding_times_root", ScaledSinusoids, **C),
    sound("bag_of_words", BagOfWords, task="text_classification"),
    sound("state_carried_over_padding", CarryGRU, pad_token_id=0),
    sound("state_as_argument", StatePassed, **C),
    sound("causal_convolutions", CausalConvLM, **C),
    sound("causal_linear_attention", lambda: LM(CausalLinear), **C),
    sound("experts_without_tokens", moe, **C),
]
