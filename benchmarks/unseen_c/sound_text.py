"""Sound models of text, as people write them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import token_ids
from benchmarks.zoo.entry import initialised, sinusoids, sound


@dataclass
class GPTConfig:
    vocab_size: int = 128
    block_size: int = 64
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.1


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class GPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.dropout),
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        initialised(self)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx, targets=None):
        pos = torch.arange(idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer["drop"](self.transformer["wte"](idx) + self.transformer["wpe"](pos))
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class GroupedAttention(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.kv, self.hd = heads, kv_heads, dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = (nn.Linear(dim, kv_heads * self.hd, bias=False) for _ in range(2))
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.heads, self.hd).transpose(1, 2)
        k, v = (f(x).view(b, t, self.kv, self.hd).transpose(1, 2) for f in (self.wk, self.wv))
        freq = 1e4 ** (-torch.arange(0, self.hd, 2, device=x.device).float() / self.hd)
        angle = torch.arange(t, device=x.device).float()[:, None] * freq
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (z.repeat_interleave(self.heads // self.kv, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(b, t, -1))


class LlamaLayer(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.attention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)
        self.attention = GroupedAttention(dim, 4, 2)
        self.w1, self.w3, self.w2 = (
            nn.Linear(dim, hidden, bias=False),
            nn.Linear(dim, hidden, bias=False),
            nn.Linear(hidden, dim, bias=False),
        )

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class TinyLlama(nn.Module):
    def __init__(self, vocab_size=128, dim=64, n_layers=3):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(LlamaLayer(dim, 160) for _ in range(n_layers))
        self.norm, self.output = RMSNorm(dim), nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens):
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(h))


class BertForMaskedLM(nn.Module):
    def __init__(self, vocab_size=120, hidden_size=48, max_position=64, pad=0):
        super().__init__()
        self.word = nn.Embedding(vocab_size, hidden_size, padding_idx=pad)
        self.position, self.kind = nn.Embedding(max_position, hidden_size), nn.Embedding(2, hidden_size)
        self.LayerNorm, self.dropout = nn.LayerNorm(hidden_size), nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(hidden_size, 4, 128, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.transform = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.LayerNorm(hidden_size))
        self.decoder = nn.Linear(hidden_size, vocab_size)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        place = (attention_mask.cumsum(1) - 1).clamp(min=0)
        x = self.dropout(self.LayerNorm(self.word(input_ids) + self.position(place) + self.kind(token_type_ids)))
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        logits = self.decoder(self.transform(x))
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
        return out


class Seq2SeqTransformer(nn.Module):
    def __init__(self, src_vocab=90, tgt_vocab=95, d_model=48):
        super().__init__()
        self.src_emb, self.tgt_emb = nn.Embedding(src_vocab, d_model), nn.Embedding(tgt_vocab, d_model)
        self.register_buffer("pe", sinusoids(128, d_model))
        self.transformer = nn.Transformer(d_model, 4, 2, 2, 96, dropout=0.1, batch_first=True, norm_first=True)
        self.transformer.encoder.enable_nested_tensor = False
        self.generator = nn.Linear(d_model, tgt_vocab)

    def forward(self, src, tgt):
        t = tgt.shape[1]
        late = torch.ones(t, t, dtype=torch.bool, device=tgt.device).triu(1)
        out = self.transformer(
            self.src_emb(src) + self.pe[: src.shape[1]], self.tgt_emb(tgt) + self.pe[:t], tgt_mask=late
        )
        return self.generator(out)


class DiagonalStateSpace(nn.Module):
    """y = conv(x, K) with K[t] = sum_n c_n b_n exp(-a_n t), one kernel per channel."""

    def __init__(self, dim, states=8):
        super().__init__()
        self.log_decay = nn.Parameter(torch.linspace(-3, 0.5, states).repeat(dim, 1))
        self.mix = nn.Parameter(torch.randn(dim, states) / states)
        self.skip = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        t = x.shape[-1]
        steps = torch.arange(t, device=x.device, dtype=torch.float32)
        kernel = torch.einsum(
            "dn,dnt->dt", self.mix.float(), torch.exp(-self.log_decay.float().exp()[..., None] * steps)
        )
        y = F.conv1d(F.pad(x, (t - 1, 0)), kernel.flip(-1).unsqueeze(1).to(x.dtype), groups=x.shape[1])
        return y + self.skip[:, None] * x


class MambaLikeBlock(nn.Module):
    def __init__(self, dim, expand=2):
        super().__init__()
        inner = dim * expand
        self.norm, self.in_proj = nn.LayerNorm(dim), nn.Linear(dim, 2 * inner)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner)
        self.ssm, self.out_proj = DiagonalStateSpace(inner), nn.Linear(inner, dim)

    def forward(self, x):
        h, gate = self.in_proj(self.norm(x)).chunk(2, -1)
        h = F.silu(self.conv1d(F.pad(h.transpose(1, 2), (3, 0))))
        return x + self.out_proj(self.ssm(h).transpose(1, 2) * F.silu(gate))


class StateSpaceLM(nn.Module):
    def __init__(self, vocab_size=100, d_model=48, n_layer=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(MambaLikeBlock(d_model) for _ in range(n_layer))
        self.norm_f, self.lm_head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm_f(x))


class Retention(nn.Module):
    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.gate, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim // heads)
        self.register_buffer("gamma", 1 - 2.0 ** (-2 - torch.arange(heads)))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        steps = torch.arange(t, device=x.device)
        gap = (steps[:, None] - steps[None, :]).float()
        decay = torch.where(gap >= 0, self.gamma.float()[:, None, None] ** gap.clamp(min=0), 0.0).to(x.dtype)
        y = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5 * decay) @ v
        return self.out(self.norm(y.transpose(1, 2)).reshape(b, t, c) * F.silu(self.gate(x)))


class RetNet(nn.Module):
    def __init__(self, vocab=100, dim=48, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.ln1 = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.ln2 = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.mix = nn.ModuleList(Retention(dim) for _ in range(depth))
        self.ffn = nn.ModuleList(nn.Sequential(nn.Linear(dim, 96), nn.GELU(), nn.Linear(96, dim)) for _ in range(depth))
        self.final, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab)

    def forward(self, idx):
        x = self.embed(idx)
        for a, mix, b, ffn in zip(self.ln1, self.mix, self.ln2, self.ffn, strict=True):
            x = x + mix(a(x))
            x = x + ffn(b(x))
        return self.head(self.final(x))


class WordLSTM(nn.Module):
    def __init__(self, ntokens=110, emsize=48, nhid=64):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(ntokens, emsize)
        self.rnn, self.decoder = nn.LSTM(emsize, nhid, 2, dropout=0.2, batch_first=True), nn.Linear(nhid, ntokens)

    def forward(self, tokens, hidden=None):
        out, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(out)), hidden


class TextCNN(nn.Module):
    def __init__(self, vocab_size=150, emb=48, n_filters=32, n_classes=5):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, emb)
        self.convs = nn.ModuleList(nn.Conv1d(emb, n_filters, k, padding=k // 2) for k in (3, 5, 7))
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(3 * n_filters, n_classes)

    def forward(self, text):
        x = self.embedding(text).transpose(1, 2)
        return self.fc(self.dropout(torch.cat([F.relu(conv(x)).amax(-1) for conv in self.convs], 1)))


class AttentionSeq2Seq(nn.Module):
    def __init__(self, vocab_in=80, vocab_out=85, dim=48):
        super().__init__()
        self.emb_in, self.emb_out = nn.Embedding(vocab_in, dim), nn.Embedding(vocab_out, dim)
        self.enc, self.dec = nn.GRU(dim, dim, batch_first=True), nn.GRU(dim, dim, batch_first=True)
        self.query, self.combine, self.out = nn.Linear(dim, dim), nn.Linear(2 * dim, dim), nn.Linear(dim, vocab_out)

    def forward(self, source, target):
        memory, state = self.enc(self.emb_in(source))
        h, _ = self.dec(self.emb_out(target), state)
        weights = (self.query(h) @ memory.transpose(1, 2) / memory.shape[-1] ** 0.5).softmax(-1)
        return self.out(torch.tanh(self.combine(torch.cat([h, weights @ memory], -1))))


class SASRec(nn.Module):
    def __init__(self, n_items=200, dim=48, max_len=50):
        super().__init__()
        self.item_emb, self.pos_emb = nn.Embedding(n_items, dim), nn.Embedding(max_len, dim)
        layer = nn.TransformerEncoderLayer(dim, 2, 96, 0.2, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        initialised(self, 0.05)
        for block in self.encoder.layers:
            nn.init.xavier_uniform_(block.self_attn.in_proj_weight)

    def forward(self, item_ids):
        t = item_ids.shape[1]
        x = self.item_emb(item_ids) + self.pos_emb(torch.arange(t, device=item_ids.device))
        late = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        return self.encoder(x, mask=late) @ self.item_emb.weight.T


class SentenceEmbedder(nn.Module):
    def __init__(self, vocab_size=120, dim=48, out=32):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab_size, dim), nn.Embedding(64, dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 96, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.proj = nn.Linear(dim, out)

    def forward(self, input_ids, attention_mask):
        place = (attention_mask.cumsum(1) - 1).clamp(min=0)
        x = self.encoder(self.tok(input_ids) + self.pos(place), src_key_padding_mask=attention_mask == 0)
        w = attention_mask.unsqueeze(-1).to(x.dtype)
        return F.normalize(self.proj((x * w).sum(1) / w.sum(1).clamp(min=1)), dim=-1)


class GatedCnnLM(nn.Module):
    def __init__(self, vocab_size=100, width=48, depth=4):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 4) for _ in range(depth))
        self.out = nn.Conv1d(width, vocab_size, 1)

    def forward(self, tokens):
        x = self.embed(tokens).transpose(1, 2)
        for conv in self.convs:
            x = x + F.glu(conv(F.pad(x, (3, 0))), dim=1)
        return self.out(x).transpose(1, 2)


IDS = token_ids(2, 12)
PADDED = token_ids(2, 12)
PADDED[0, 9:] = 0
MASKED = {"input_ids": PADDED, "attention_mask": (PADDED != 0).long()}
ENTRIES = [
    sound("gpt with a config object", lambda: GPT(GPTConfig())),
    sound("llama", TinyLlama),
    sound("bert", BertForMaskedLM, task="masked_lm", pad_token_id=0),
    sound(
        "sequence to sequence transformer",
        Seq2SeqTransformer,
        task="seq2seq",
        example_inputs={"src": token_ids(2, 9), "tgt": token_ids(2, 7, seed=4)},
    ),
    sound("state space", StateSpaceLM),
    sound("retention", RetNet),
    sound("word lstm", WordLSTM),
    sound("convolutions over text", TextCNN, task="text_classification"),
    sound(
        "recurrent translation",
        AttentionSeq2Seq,
        task="seq2seq",
        example_inputs={"source": token_ids(2, 9), "target": token_ids(2, 7, seed=4)},
    ),
    sound("next item", SASRec, task="causal_lm"),
    sound("sentence embedder", SentenceEmbedder, task="embedding", example_inputs=MASKED),
    sound("gated convolutions", GatedCnnLM, task="causal_lm"),
]
