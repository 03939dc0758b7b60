"""Sound models of text in many styles."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entry import initialised, sinusoids, sound


class RMSNorm(nn.Module):
    def __init__(self, d, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class LlamaLike(nn.Module):
    """Grouped queries, SwiGLU, RMS norms, learned positions."""

    def __init__(self, vocab=128, d=48, heads=4, groups=2, depth=2):
        super().__init__()
        self.h, self.g, self.s = heads, groups, d // heads
        self.embed_tokens, self.embed_pos = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(
                nn.ModuleDict(
                    {
                        "in_norm": RMSNorm(d),
                        "q": nn.Linear(d, d, bias=False),
                        "kv": nn.Linear(d, 2 * groups * self.s, bias=False),
                        "o": nn.Linear(d, d, bias=False),
                        "post_norm": RMSNorm(d),
                        "gate": nn.Linear(d, 96, bias=False),
                        "up": nn.Linear(d, 96, bias=False),
                        "down": nn.Linear(96, d, bias=False),
                    }
                )
            )
        self.norm, self.lm_head = RMSNorm(d), nn.Linear(d, vocab, bias=False)
        initialised(self)

    def forward(self, input_ids):
        b, t = input_ids.shape
        x = self.embed_tokens(input_ids) + self.embed_pos(torch.arange(t, device=input_ids.device))
        for m in self.layers:
            y = m["in_norm"](x)
            q = m["q"](y).view(b, t, self.h, self.s).transpose(1, 2)
            k, v = m["kv"](y).view(b, t, 2, self.g, self.s).permute(2, 0, 3, 1, 4)
            k, v = (z.repeat_interleave(self.h // self.g, dim=1) for z in (k, v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + m["o"](a.transpose(1, 2).reshape(b, t, -1))
            y = m["post_norm"](x)
            x = x + m["down"](F.silu(m["gate"](y)) * m["up"](y))
        return self.lm_head(self.norm(x))


class RawGPT(nn.Module):
    """Nothing but parameters and einsum."""

    def __init__(self, V=64, D=32, H=2, L=2, T=64):
        super().__init__()

        def draw(*shape):
            return nn.Parameter(torch.randn(*shape) * 0.02)

        self.L, self.D = L, D
        self.E, self.P, self.U = draw(V, D), draw(T, D), draw(D, V)
        self.Wqkv, self.Wo = draw(L, 3, H, D, D // H), draw(L, H, D // H, D)
        self.W1, self.W2 = draw(L, D, 4 * D), draw(L, 4 * D, D)
        self.b1 = nn.Parameter(torch.zeros(L, 4 * D))

    def forward(self, tokens):
        T = tokens.shape[1]
        x = self.E[tokens] + self.P[:T]
        hide = torch.full((T, T), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        for i in range(self.L):
            q, k, v = torch.einsum("btd,shde->sbhte", F.layer_norm(x, (self.D,)), self.Wqkv[i])
            a = (torch.einsum("bhqe,bhke->bhqk", q, k) / math.sqrt(q.size(-1)) + hide).softmax(-1)
            x = x + torch.einsum("bhqk,bhke,hed->bqd", a, v, self.Wo[i])
            x = x + F.relu(F.layer_norm(x, (self.D,)) @ self.W1[i] + self.b1[i]).square() @ self.W2[i]
        return F.layer_norm(x, (self.D,)) @ self.U


class CharLSTM(nn.Module):
    def __init__(self, n=65, emb=32, hid=64):
        super().__init__()
        self.emb, self.lstm = nn.Embedding(n, emb), nn.LSTM(emb, hid, 2, batch_first=True)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(hid, n)

    def forward(self, x):
        return self.fc(self.drop(self.lstm(self.emb(x))[0]))


class Attn2Seq(nn.Module):
    """Bahdanau's translator."""

    def __init__(self, src=60, tgt=70, d=32):
        super().__init__()
        self.src_emb, self.tgt_emb = nn.Embedding(src, d), nn.Embedding(tgt, d)
        self.enc = nn.GRU(d, d, batch_first=True, bidirectional=True)
        self.dec = nn.GRU(d, d, batch_first=True)
        self.query, self.key, self.energy = (
            nn.Linear(d, d),
            nn.Linear(2 * d, d, bias=False),
            nn.Linear(d, 1, bias=False),
        )
        self.out = nn.Linear(3 * d, tgt)

    def forward(self, src, tgt):
        memory, _ = self.enc(self.src_emb(src))
        states, _ = self.dec(self.tgt_emb(tgt))
        e = self.energy(torch.tanh(self.query(states)[:, :, None] + self.key(memory)[:, None])).squeeze(-1)
        context = e.softmax(-1) @ memory
        return self.out(torch.cat([states, context], -1))


class Transformer2Seq(nn.Module):
    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.shared = nn.Embedding(vocab, d)
        self.register_buffer("pe", sinusoids(100, d), persistent=False)
        self.core = nn.Transformer(d, 4, 2, 2, 64, 0.1, batch_first=True, norm_first=True)
        self.generator = nn.Linear(d, vocab)

    def forward(self, src, tgt):
        n = tgt.size(1)
        mask = torch.ones(n, n, dtype=torch.bool, device=tgt.device).triu(1)
        s, t = self.shared(src) + self.pe[: src.size(1)], self.shared(tgt) + self.pe[:n]
        return self.generator(self.core(s, t, tgt_mask=mask))


class MambaLike(nn.Module):
    """Selective scan with a short causal convolution."""

    def __init__(self, vocab=64, d=32, n=4, depth=2):
        super().__init__()
        self.emb, self.n = nn.Embedding(vocab, d), n
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(d),
                    "inp": nn.Linear(d, 4 * d, bias=False),
                    "conv": nn.Conv1d(2 * d, 2 * d, 4, groups=2 * d, padding=3),
                    "dt": nn.Linear(2 * d, 2 * d),
                    "bc": nn.Linear(2 * d, 2 * n, bias=False),
                    "out": nn.Linear(2 * d, d, bias=False),
                }
            )
            for _ in range(depth)
        )
        self.log_a = nn.ParameterList(
            nn.Parameter(torch.arange(1.0, n + 1).log().repeat(2 * d, 1)) for _ in range(depth)
        )
        self.skip = nn.ParameterList(nn.Parameter(torch.ones(2 * d)) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        for m in self.layers:
            nn.init.constant_(m["dt"].bias, -3.0)

    def forward(self, input_ids):
        x = self.emb(input_ids)
        for m, log_a, skip in zip(self.layers, self.log_a, self.skip, strict=False):
            u, z = m["inp"](m["norm"](x)).chunk(2, -1)
            u = F.silu(m["conv"](u.transpose(1, 2))[..., : x.size(1)].transpose(1, 2))
            dt = F.softplus(m["dt"](u))
            b, c = m["bc"](u).chunk(2, -1)
            keep = torch.exp(-dt.unsqueeze(-1) * log_a.exp())
            drive = (dt * u).unsqueeze(-1) * b.unsqueeze(2)
            h, ys = torch.zeros_like(drive[:, 0]), []
            for t in range(x.size(1)):
                h = keep[:, t] * h + drive[:, t]
                ys.append((h * c[:, t, None]).sum(-1))
            x = x + m["out"]((torch.stack(ys, 1) + skip * u) * F.silu(z))
        return self.head(self.norm(x))


class TextCNN(nn.Module):
    """Kim 2014, padded so that one word is enough."""

    def __init__(self, vocab=120, d=32, classes=4):
        super().__init__()
        self.emb = nn.Embedding(vocab, d, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(d, 24, k, padding=k - 1) for k in (2, 3, 4))
        self.drop, self.fc = nn.Dropout(0.4), nn.Linear(72, classes)

    def forward(self, input_ids):
        x = self.emb(input_ids).transpose(1, 2)
        return self.fc(self.drop(torch.cat([F.relu(c(x)).amax(-1) for c in self.convs], 1)))


class Tagged(NamedTuple):
    scores: torch.Tensor
    states: torch.Tensor


class Tagger(nn.Module):
    """BiLSTM tagger returning a named tuple."""

    def __init__(self, vocab=80, tags=7):
        super().__init__()
        self.embeddings, self.encoder = nn.Embedding(vocab, 32), nn.LSTM(32, 24, batch_first=True, bidirectional=True)
        self.score = nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, tags))

    def forward(self, words):
        states, _ = self.encoder(self.embeddings(words))
        return Tagged(self.score(states), states)


class SentenceVectors(nn.Module):
    """Bi-encoder with a masked mean and unit vectors."""

    def __init__(self, vocab=90, d=48, size=24):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d, padding_idx=0), nn.Parameter(torch.randn(64, d))
        layer = nn.TransformerEncoderLayer(d, 4, 96, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.enc, self.proj = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(d, size)

    def forward(self, input_ids, attention_mask):
        pad = attention_mask == 0
        h = self.enc(self.emb(input_ids) + self.pos[: input_ids.size(1)], src_key_padding_mask=pad)
        h = h.masked_fill(pad[..., None], 0.0).sum(1) / attention_mask.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(self.proj(h), dim=-1)


class WaveNetLM(nn.Module):
    def __init__(self, q=64, c=32):
        super().__init__()
        self.inp = nn.Embedding(q, c)
        self.dil = (1, 2, 4, 8)
        self.filt = nn.ModuleList(nn.Conv1d(c, 2 * c, 2, dilation=d) for d in self.dil)
        self.res = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in self.dil)
        self.skip = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in self.dil)
        self.post = nn.Sequential(nn.ReLU(), nn.Conv1d(c, c, 1), nn.ReLU(), nn.Conv1d(c, q, 1))

    def forward(self, tokens):
        x, total = self.inp(tokens).mT, 0
        for i, d in enumerate(self.dil):
            a, b = self.filt[i](F.pad(x, (d, 0))).chunk(2, 1)
            y = a.tanh() * b.sigmoid()
            total = total + self.skip[i](y)
            if i < len(self.dil) - 1:
                x = x + self.res[i](y)
            else:
                total = total + self.res[i](y)
        return self.post(total).mT


class SlidingWindow(nn.Module):
    """Causal attention over the last eight tokens, two streams of positions."""

    def __init__(self, vocab=70, d=32, window=8):
        super().__init__()
        self.window = window
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Embedding(96, d)
        self.att = nn.ModuleList(nn.MultiheadAttention(d, 4, dropout=0.1, batch_first=True) for _ in range(2))
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 64), nn.GELU(), nn.Linear(64, d), nn.Dropout(0.1)) for _ in range(2)
        )
        self.ln = nn.ModuleList(nn.LayerNorm(d) for _ in range(5))
        self.head = nn.Linear(d, vocab)
        initialised(self)

    def forward(self, idx):
        t = torch.arange(idx.size(1), device=idx.device)
        lag = t[:, None] - t[None]
        hidden = (lag < 0) | (lag >= self.window)
        x = self.tok(idx) + self.pos(t)
        for i, (att, ffn) in enumerate(zip(self.att, self.ffn, strict=False)):
            y = self.ln[2 * i](x)
            x = x + att(y, y, y, attn_mask=hidden, need_weights=False)[0]
            x = x + ffn(self.ln[2 * i + 1](x))
        return (self.head(self.ln[-1](x)), None)


class Highway(nn.Module):
    """Words from characters would be longer; here a highway network over a GRU's summary."""

    def __init__(self, vocab=77, d=40, classes=5):
        super().__init__()
        self.emb, self.gru = nn.Embedding(vocab, d), nn.GRU(d, d, batch_first=True)
        self.t, self.h, self.out = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, classes)
        nn.init.constant_(self.t.bias, -1.0)

    def forward(self, text):
        x = self.gru(self.emb(text))[0].mean(1)
        gate = torch.sigmoid(self.t(x))
        return {"logits": self.out(gate * F.relu(self.h(x)) + (1 - gate) * x), "features": x}


class MixerForText(nn.Module):
    """Causal mixing over time by a lower-triangular matrix of fixed maximal length."""

    def __init__(self, vocab=64, d=32, longest=48):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.mix = nn.ParameterList(nn.Parameter(torch.randn(longest, longest) * 0.1) for _ in range(2))
        self.ln = nn.ModuleList(nn.LayerNorm(d) for _ in range(5))
        self.ff = nn.ModuleList(nn.Sequential(nn.Linear(d, 64), nn.GELU(), nn.Linear(64, d)) for _ in range(2))
        self.out = nn.Linear(d, vocab)

    def forward(self, tokens):
        t, x = tokens.size(1), self.emb(tokens)
        for i in range(2):
            x = x + self.mix[i][:t, :t].tril() @ self.ln[2 * i](x)
            x = x + self.ff[i](self.ln[2 * i + 1](x))
        return self.out(self.ln[-1](x))


C = {"task": "causal_lm"}
ENTRIES = [
    sound("llama_like", LlamaLike, **C),
    sound("gpt_of_raw_parameters", RawGPT, vocab_size=64, max_length=64, **C),
    sound("char_lstm", CharLSTM, **C),
    sound("bahdanau_translator", Attn2Seq, task="seq2seq"),
    sound("transformer_translator", Transformer2Seq, task="seq2seq"),
    sound("mamba_like", MambaLike, **C),
    sound("text_cnn", TextCNN),
    sound("bilstm_tagger", Tagger),
    sound("sentence_vectors", SentenceVectors, task="embedding", pad_token_id=0),
    sound("wavenet_lm", WaveNetLM, **C),
    sound("sliding_window_gpt", SlidingWindow, **C),
    sound("highway_over_gru", Highway),
    sound("causal_mixer", MixerForText, max_length=48, **C),
]
