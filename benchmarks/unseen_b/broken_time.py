"""Models that mishandle time: they see the future, lose or drown the order, or train on the wrong token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entry import broken, initialised


@dataclass
class Settings:
    vocab_size: int = 96
    ctx: int = 64
    width: int = 48
    heads: int = 4
    depth: int = 2


class EagerAttention(nn.Module):
    """Attention with the mask as a buffer; `diagonal` is the argument of tril."""

    def __init__(self, s: Settings, diagonal: int = 0, known: int | None = None):
        super().__init__()
        self.heads = s.heads
        self.c_attn = nn.Linear(s.width, 3 * s.width)
        self.c_proj = nn.Linear(s.width, s.width)
        mask = torch.ones(s.ctx, s.ctx)
        size = known or s.ctx
        mask[:size, :size] = torch.tril(torch.ones(size, size), diagonal=diagonal)
        self.register_buffer("bias", mask.view(1, 1, s.ctx, s.ctx))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf")).softmax(-1)
        return self.c_proj((att @ v).transpose(1, 2).reshape(B, T, C))


class FusedAttention(nn.Module):
    def __init__(self, s: Settings, causal: bool = True):
        super().__init__()
        self.s, self.causal = s, causal
        self.to_qkv = nn.Linear(s.width, 3 * s.width, bias=False)
        self.to_out = nn.Linear(s.width, s.width, bias=False)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.to_qkv(x).view(b, n, 3, self.s.heads, c // self.s.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.causal)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width, attn):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), attn
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TinyGPT(nn.Module):
    def __init__(self, attention, s: Settings | None = None):
        super().__init__()
        self.s = s = s or Settings()
        self.wte, self.wpe = nn.Embedding(s.vocab_size, s.width), nn.Embedding(s.ctx, s.width)
        self.h = nn.ModuleList(Layer(s.width, attention(s, i)) for i in range(s.depth))
        self.ln_f = nn.LayerNorm(s.width)
        self.lm_head = nn.Linear(s.width, s.vocab_size, bias=False)
        initialised(self)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class CharWaveNet(nn.Module):
    """Dilated convolutions over characters; the last layer was copied from an image project."""

    def __init__(self, n_chars=80, ch=40):
        super().__init__()
        self.embed = nn.Embedding(n_chars, ch)
        self.dilations = (1, 2, 4)
        self.convs = nn.ModuleList(nn.Conv1d(ch, 2 * ch, 2, dilation=d) for d in self.dilations)
        self.mix = nn.Conv1d(ch, ch, 3, padding=1)
        self.out = nn.Conv1d(ch, n_chars, 1)

    def forward(self, tokens):
        h = self.embed(tokens).transpose(1, 2)
        for d, conv in zip(self.dilations, self.convs, strict=False):
            a, g = conv(F.pad(h, (d, 0))).chunk(2, dim=1)
            h = h + torch.tanh(a) * torch.sigmoid(g)
        h = torch.relu(self.mix(h))
        return self.out(h).transpose(1, 2)


class GRULanguageModel(nn.Module):
    def __init__(self, vocab=70, emb=32, hidden=48):
        super().__init__()
        self.encoder = nn.Embedding(vocab, emb)
        self.rnn = nn.GRU(emb, hidden, num_layers=1, batch_first=True, bidirectional=True)
        self.decoder = nn.Linear(2 * hidden, vocab)

    def forward(self, input_ids):
        out, h_n = self.rnn(self.encoder(input_ids))
        return self.decoder(out), h_n


class GatedScan(nn.Module):
    """Diagonal linear recurrence with a gate on a summary of the sequence."""

    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.inp, self.gate, self.outp = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.decay = nn.Parameter(torch.linspace(-1.0, 3.0, d))

    def forward(self, x):
        u = self.norm(x)
        a, v = torch.sigmoid(self.decay), self.inp(u)
        state, ys = torch.zeros_like(v[:, 0]), []
        for t in range(v.size(1)):
            state = a * state + (1 - a) * v[:, t]
            ys.append(state)
        y = torch.stack(ys, dim=1)
        y = y * F.silu(self.gate(u.mean(dim=1, keepdim=True) + u))
        return x + self.outp(y)


class ScanLM(nn.Module):
    def __init__(self, vocab=64, d=40):
        super().__init__()
        self.tok = nn.Embedding(vocab, d)
        self.layers = nn.Sequential(GatedScan(d), GatedScan(d))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)

    def forward(self, input_ids):
        return {"logits": self.head(self.norm(self.layers(self.tok(input_ids))))}


class CausalConvGroupNorm(nn.Module):
    def __init__(self, v=60, c=32):
        super().__init__()
        self.emb = nn.Embedding(v, c)
        self.conv1, self.conv2 = nn.Conv1d(c, c, 3), nn.Conv1d(c, c, 3)
        self.gn1, self.gn2 = nn.GroupNorm(4, c), nn.GroupNorm(4, c)
        self.fc = nn.Linear(c, v)

    def forward(self, x):
        h = self.emb(x).permute(0, 2, 1)
        h = h + torch.relu(self.gn1(self.conv1(F.pad(h, [2, 0]))))
        h = h + torch.relu(self.gn2(self.conv2(F.pad(h, [2, 0]))))
        return self.fc(h.permute(0, 2, 1))


class Translator(nn.Module):
    """nn.Transformer whose target mask was forgotten."""

    def __init__(self, src_vocab=60, tgt_vocab=60, d=32):
        super().__init__()
        self.src_emb, self.tgt_emb = nn.Embedding(src_vocab, d), nn.Embedding(tgt_vocab, d)
        self.pos = nn.Parameter(torch.randn(1, 128, d) * 0.5)
        self.transformer = nn.Transformer(d, 4, 1, 2, 64, dropout=0.1, batch_first=True)
        self.generator = nn.Linear(d, tgt_vocab)

    def forward(self, src, tgt):
        s = self.src_emb(src) + self.pos[:, : src.size(1)]
        t = self.tgt_emb(tgt) + self.pos[:, : tgt.size(1)]
        return self.generator(self.transformer(s, t))


class ExpertChoice(nn.Module):
    """Each expert picks the tokens it likes best, out of the whole sequence."""

    def __init__(self, s: Settings, experts=4):
        super().__init__()
        self.router = nn.Linear(s.width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(s.width, 64), nn.SiLU(), nn.Linear(64, s.width)) for _ in range(experts)
        )

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        k = max(1, x.size(1) // 2)
        weight, where = scores.topk(k, dim=1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            at = where[:, :, e, None].expand(-1, -1, x.size(-1))
            out = out.scatter_add(1, at, weight[:, :, e, None] * expert(x.gather(1, at)))
        return out


def routed_gpt():
    model = TinyGPT(lambda s, i: EagerAttention(s))
    model.h[1].mlp = ExpertChoice(model.s)
    return initialised(model)


class SentenceEncoder(nn.Module):
    """BERT-like; the result of adding positions is dropped, or all positions have the same index."""

    def __init__(self, same_index: bool, vocab=90, d=40, classes=5):
        super().__init__()
        self.same_index = same_index
        self.word_embeddings, self.position_embeddings = nn.Embedding(vocab, d), nn.Embedding(64, d)
        layer = nn.TransformerEncoderLayer(d, 4, 96, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(d), enable_nested_tensor=False)
        self.classifier = nn.Linear(d, classes)

    def forward(self, input_ids, attention_mask=None):
        x = self.word_embeddings(input_ids)
        if self.same_index:
            position_ids = torch.zeros_like(input_ids)
            x = x + self.position_embeddings(position_ids)
        else:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)
            x.add(self.position_embeddings(position_ids))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        h = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        m = attention_mask.unsqueeze(-1).to(h.dtype)
        return self.classifier((h * m).sum(1) / m.sum(1).clamp(min=1))


class PatchTransformer(nn.Module):
    """ViT without position embedding."""

    def __init__(self, dim=48, patch=8, classes=10):
        super().__init__()
        self.to_patch = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        block = nn.TransformerEncoderLayer(dim, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, images):
        x = self.to_patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.size(0), -1, -1), x], dim=1)
        return self.head(self.blocks(x)[:, 0])


@dataclass
class LMOutput:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class GPTWithLoss(TinyGPT):
    """The loss is computed inside; `offset` says which logits meet which labels."""

    def __init__(self, offset: str):
        super().__init__(lambda s, i: FusedAttention(s))
        self.offset = offset

    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids)
        if labels is None:
            return LMOutput(logits)
        if self.offset == "backwards":
            a, b = logits[:, 1:], labels[:, :-1]
        elif self.offset == "two":
            logits_s, labels_s = logits[:, :-1], labels[:, 1:]
            a, b = logits_s[:, :-1], labels_s[:, 1:]
        else:
            a, b = logits[:-1], labels[1:]
        loss = F.cross_entropy(a.reshape(-1, a.size(-1)), b.reshape(-1), ignore_index=-100)
        return LMOutput(logits, loss)


class SelfLoss(nn.Module):
    """LSTM language model which makes its targets from its input and forgets to shift them."""

    def __init__(self, n_tokens=75, dim=40):
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, dim)
        self.lstm = nn.LSTM(dim, dim, 2, batch_first=True)
        self.to_logits = nn.Linear(dim, n_tokens)

    def forward(self, input_ids):
        hidden, _ = self.lstm(self.embedding(input_ids))
        logits = self.to_logits(hidden)
        loss = F.cross_entropy(logits.transpose(1, 2), input_ids)
        return loss, logits


class LoudPositions(nn.Module):
    """Learned positions by torch.randn over tokens at 0.02."""

    def __init__(self, vocab=64, d=48):
        super().__init__()
        self.tokens = nn.Embedding(vocab, d)
        self.layer = nn.TransformerEncoderLayer(d, 4, 96, batch_first=True, norm_first=True, dropout=0.0)
        self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, vocab)
        initialised(self)
        self.pos_embed = nn.Parameter(torch.randn(1, 64, d))

    def forward(self, input_ids):
        t = input_ids.size(1)
        mask = torch.full((t, t), float("-inf"), device=input_ids.device).triu(1)
        x = self.tokens(input_ids) + self.pos_embed[:, :t]
        return self.head(self.ln(self.layer(x, src_mask=mask)))


LM = {"task": "causal_lm"}
ENTRIES = [
    broken(
        "future_leakage", "tril_diagonal_one", lambda: TinyGPT(lambda s, i: EagerAttention(s, diagonal=1)), ("h.*",)
    ),
    broken(
        "future_leakage",
        "is_causal_first_layer_only",
        lambda: TinyGPT(lambda s, i: FusedAttention(s, i == 0)),
        ("h.1", "h.1.*"),
        **LM,
    ),
    broken(
        "future_leakage",
        "mask_for_first_sixteen_only",
        lambda: TinyGPT(lambda s, i: EagerAttention(s, known=16)),
        ("h.*",),
        **LM,
    ),
    broken("future_leakage", "wavenet_symmetric_layer", CharWaveNet, ("mix",), **LM),
    broken("future_leakage", "bidirectional_gru", GRULanguageModel, ("rnn",), **LM),
    broken("future_leakage", "scan_gate_sees_mean", ScanLM, ("layers", "layers.*"), **LM),
    broken("future_leakage", "group_norm_over_time", CausalConvGroupNorm, ("gn1", "gn2"), **LM),
    broken(
        "future_leakage",
        "translator_without_target_mask",
        Translator,
        ("transformer", "transformer.decoder*"),
        task="seq2seq",
    ),
    broken("future_leakage", "expert_choice", routed_gpt, ("h.1", "h.1.mlp", "h.1.mlp.*"), **LM),
    broken(
        "position_absent",
        "sum_not_assigned",
        lambda: SentenceEncoder(False),
        ("", "position_embeddings", "position_embeddings.weight", "encoder", "word_embeddings"),
        also=("unused_parameter",),
    ),
    broken(
        "position_absent",
        "all_positions_zero",
        lambda: SentenceEncoder(True),
        ("", "position_embeddings", "position_embeddings.weight", "encoder", "word_embeddings"),
    ),
    broken("position_absent", "vit_forgot_positions", PatchTransformer, ("", "to_patch", "blocks", "cls_token")),
    broken("label_shift", "backwards", lambda: GPTWithLoss("backwards"), "", **LM),
    broken("label_shift", "shifted_twice", lambda: GPTWithLoss("two"), "", **LM),
    broken("label_shift", "shifted_along_batch", lambda: GPTWithLoss("batch"), "", **LM),
    broken("label_shift", "own_input_unshifted", SelfLoss, "", **LM),
    broken("embedding_scale", "parameter_of_randn", LoudPositions, ("", "pos_embed", "tokens*"), **LM),
]
