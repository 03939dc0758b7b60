"""Models in which information goes where it must not, or does not arrive."""

# ruff: noqa: D102, D103

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_a.sound_images import TinyViT
from benchmarks.unseen_a.sound_language import (
    CausalConvStack,
    CharLSTM,
    Heads,
    Layer,
    LinearGPT,
    LinearHeads,
    LinearLayer,
    PocketConfig,
    PocketGPT,
    rotate,
)
from benchmarks.unseen_a.sound_others import MeanPooled, MiniBert, SelfAttend, TabularNorm, Towers, Translator
from benchmarks.zoo.entry import broken, initialised


class DiagonalTwo(Heads):
    """The mask starts one above the right diagonal."""

    def mix(self, q, k, v):
        t = q.shape[2]
        hidden = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(2)
        w = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, float("-inf"))
        return w.softmax(-1) @ v


class WindowOr(Heads):
    """Causal `or` near, where `and` was meant: the window opens the future."""

    def mix(self, q, k, v):
        at = torch.arange(q.shape[2], device=q.device)
        keep = (at[:, None] >= at) | ((at[:, None] - at).abs() < 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


class ShortMask(Heads):
    """Masks only up to the length of the old context."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] <= 32)


class WholeSum(LinearHeads):
    """The state runs, but its normaliser is summed over all keys."""

    def mix(self, q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhtk,bhtv->bhtkv", k, v).cumsum(2)
        norm = torch.einsum("bhtk,bhk->bht", q, k.sum(2))
        return torch.einsum("bhtk,bhtkv->bhtv", q, state) / norm[..., None]


def with_heads(heads, base=PocketGPT, layer=Layer, cfg=None):
    block = type("Block", (layer,), {"attention": heads, "__doc__": layer.__doc__})
    return initialised(type("Net", (base,), {"layer": block})(cfg))


class SamePadding(CausalConvStack):
    """The widest convolution kept its symmetric padding."""

    def pad(self, x, i):
        return F.pad(x, (8, 8)) if i == 3 else super().pad(x, i)


class NormOverTime(CausalConvStack):
    """Group norm of a sequence takes its statistics over time."""

    def __init__(self):
        super().__init__()
        self.gns = nn.ModuleList(nn.GroupNorm(4, 40) for _ in self.convs)

    def forward(self, tokens):
        x = self.lookup(tokens).transpose(1, 2)
        for i, (conv, gn) in enumerate(zip(self.convs, self.gns, strict=True)):
            x = x + F.relu(conv(self.pad(gn(x), i)))
        return self.readout(x.transpose(1, 2))


class TaggerLeftover(nn.Module):
    """A language model made from a tagger: still reads both ways."""

    def __init__(self, n_chars=66):
        super().__init__()
        self.char_embed = nn.Embedding(n_chars, 32)
        self.encoder = nn.GRU(32, 24, batch_first=True, bidirectional=True)
        self.to_char = nn.Linear(48, n_chars)

    def forward(self, idx):
        return self.to_char(self.encoder(self.char_embed(idx))[0])


class NoTargetMask(Translator):
    """The decoder mask was lost in a refactoring."""

    def target_mask(self, n, device):
        return None


class BatchStats(TabularNorm):
    """Batch norm without running statistics."""

    def __init__(self):
        super().__init__()
        self.norm_in = nn.BatchNorm1d(14, track_running_stats=False)


class SequenceFirst(nn.Module):
    """Data with the batch first in a stack that wants the sequence first."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(80, 32)
        self.pos = nn.Parameter(torch.randn(64, 32) * 0.1)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.1), 2)
        self.classifier = nn.Linear(32, 3)

    def forward(self, input_ids):
        x = self.embedding(input_ids) + self.pos[: input_ids.shape[1]]
        return self.classifier(self.encoder(x).mean(1))


class Standardised(nn.Module):
    """Standardises the features by the batch it happens to see."""

    def __init__(self, features=9):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, 32), nn.Linear(32, 1)

    def forward(self, x):
        h = F.gelu(self.fc1(x))
        h = (h - h.mean(0)) / (h.std(0, unbiased=False) + 1e-3)
        return self.fc2(h)


class Inverted(SelfAttend):
    """Masks where the mask says one."""

    def weights(self, scores, mask):
        return scores.masked_fill(mask[:, None, None, :] == 1, torch.finfo(scores.dtype).min).softmax(-1)


class HeadPositions(SelfAttend):
    """Rotary angles are taken before the transpose: over heads instead of time."""

    def forward(self, x, mask):
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.h, -1) for f in (self.query, self.key, self.value))
        q, k, v = rotate(q).transpose(1, 2), rotate(k).transpose(1, 2), v.transpose(1, 2)
        w = self.weights(q @ k.mT / math.sqrt(d / self.h), mask)
        return self.dense((w @ v).transpose(1, 2).reshape(b, t, d))


def with_attention(attention, base=MiniBert):
    block = type("Block", (base.layer,), {"attention": attention})
    return initialised(type("Net", (base,), {"layer": block})())


class RotaryByHead(MeanPooled):
    """No table: the rotation was meant to bring the positions."""

    def __init__(self):
        super().__init__()
        del self.place
        for layer in self.layers:
            layer.self_attn = HeadPositions(32)

    def encode(self, input_ids, attention_mask):
        x = self.ln(self.word(input_ids))
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x


class PlainMean(MeanPooled):
    """Averages over padding, too."""

    def pool(self, x, mask):
        return x.mean(1)


class LastState(nn.Module):
    """Reads the state after the padding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(77, 24, padding_idx=0)
        self.rnn = nn.GRU(24, 40, batch_first=True)
        self.sentiment = nn.Linear(40, 2)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask[..., None].to(self.embed.weight.dtype)
        return self.sentiment(self.rnn(x)[0][:, -1])


class Polarity(nn.Module):
    """`src_key_padding_mask` wants true for padding; it gets true for tokens."""

    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(90, 32)
        self.pos = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.mlm = nn.Linear(32, 90)

    def forward(self, input_ids, attention_mask):
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        blocked = torch.zeros_like(x[..., 0]).masked_fill(attention_mask.bool(), -1e4)
        return self.mlm(self.enc(x, src_key_padding_mask=blocked))


class FirstRow(MeanPooled):
    """Slices one row of the position table for all tokens."""

    def encode(self, input_ids, attention_mask):
        x = self.ln(self.word(input_ids) + self.place.weight[:1])
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x


class PatchBag(TinyViT):
    """Positions end up on the class token only."""

    def tokens(self, img):
        x = self.to_patch(img).flatten(2).mT
        return torch.cat((self.cls.expand(len(x), -1, -1) + self.pos[:, :1], x), 1)


class BagClassifier(nn.Module):
    """Text model of attention without any positions."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.ff = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, input_ids):
        x = self.table(input_ids)
        y = self.norm(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        return self.head((x + self.ff(x)).mean(1))


class OneLogitSoftmax(nn.Module):
    """Softmax over the single logit of a binary classifier."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.score = nn.Linear(16, 1)

    def forward(self, x):
        return torch.softmax(self.score(self.hidden(x)), dim=-1)


class NormedScalar(nn.Module):
    """Layer norm over the one value of a regressor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 16, 5, padding=2)
        self.fc = nn.Linear(16, 1)
        self.out_norm = nn.LayerNorm(1)

    def forward(self, signal):
        return self.out_norm(self.fc(F.relu(self.conv(signal)).mean(-1)))


class CopyPasteTowers(Towers):
    """The second tower looks the user up."""

    def forward(self, user_id, item_id):
        return (self.user_mlp(self.user(user_id)) * self.item_mlp(self.item(user_id))).sum(-1)


class SelfInsteadOfCross(nn.Module):
    """The decoder attends to itself where it should attend to the source."""

    def __init__(self, vocab=72, d=32):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.encoder = nn.GRU(d, d, batch_first=True)
        self.decoder = nn.GRU(d, d, batch_first=True)
        self.cross = nn.MultiheadAttention(d, 4, batch_first=True)
        self.norm = nn.LayerNorm(d)
        self.out = nn.Linear(d, vocab)

    def forward(self, src, tgt):
        self.encoder(self.emb(src))
        x, _ = self.decoder(self.emb(tgt))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = self.norm(x + self.cross(x, x, x, attn_mask=mask)[0])
        return self.out(x)


class OffByOneHead(CharLSTM):
    """The head counts from zero to the last id."""

    def __init__(self, vocab=70):
        super().__init__(vocab)
        self.fc = nn.Linear(48, vocab - 1)


class OneBased(PocketGPT):
    """Treats ids as counted from one: the id 0 has no row."""

    def embed(self, idx):
        return super().embed(idx) if idx.numel() == 0 else self.tok(idx - 1) + self.pos.weight[: idx.shape[1]]


class GrownHead(nn.Module):
    """The head was widened for added tokens, the table was not."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(64, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.lm_head = nn.Linear(32, 64 + 3)

    def forward(self, input_ids):
        return self.lm_head(self.lstm(self.wte(input_ids))[0])


IDS = torch.arange(4, 28).view(2, 12)
PAIR = {"src": IDS, "tgt": IDS + 20}
SCORES = {"user_id": torch.tensor([1, 7, 9]), "item_id": torch.tensor([4, 2, 260])}
LONG = PocketConfig(ctx=96)
ENTRIES = [
    broken("future_leakage", "triu_two", lambda: with_heads(DiagonalTwo), "layers.*.att*"),
    broken("future_leakage", "window_or_causal", lambda: with_heads(WindowOr), "layers.*.att*"),
    broken("future_leakage", "mask_to_old_context", lambda: with_heads(ShortMask, cfg=LONG), "layers.*.att*"),
    broken("future_leakage", "whole_normaliser", lambda: with_heads(WholeSum, LinearGPT, LinearLayer), "layers.*.att*"),
    broken("future_leakage", "widest_same_padding", SamePadding, ("convs.3*", ""), task="causal_lm"),
    broken("future_leakage", "group_norm_over_time", NormOverTime, "gns*", task="causal_lm"),
    broken("future_leakage", "tagger_leftover", TaggerLeftover, "encoder*", task="causal_lm"),
    broken("future_leakage", "no_target_mask", NoTargetMask, "core*", task="seq2seq"),
    broken("batch_leakage", "no_running_statistics", BatchStats, "norm_in*", also=("shape_crash",)),
    broken("batch_leakage", "sequence_first_stack", SequenceFirst, "encoder*", also=("position_absent",)),
    broken("batch_leakage", "standardised_by_batch", Standardised, ""),
    broken("padding_leakage", "inverted_mask", lambda: with_attention(Inverted), "layers.*.self_attn*"),
    broken("padding_leakage", "mean_over_padding", lambda: initialised(PlainMean()), ""),
    broken("padding_leakage", "state_after_padding", LastState, ("rnn*", "")),
    broken("padding_leakage", "inverted_float_mask", Polarity, "enc*"),
    broken("position_absent", "one_row_for_all", lambda: initialised(FirstRow()), ("place*", "")),
    broken("position_absent", "rotation_over_heads", lambda: initialised(RotaryByHead()), ("layers*", "")),
    broken("position_absent", "positions_on_class_token", PatchBag, ("pos", ""), also=("unused_parameter",)),
    broken("position_absent", "attention_over_a_bag", BagClassifier, ""),
    broken("constant_output", "softmax_of_one", OneLogitSoftmax, ("score*", ""), also=("wrong_softmax_dim",)),
    broken("constant_output", "norm_of_one", NormedScalar, ("out_norm*", "")),
    broken("ignored_input", "user_in_both_towers", CopyPasteTowers, ("", "item_id", "item*"), example_inputs=SCORES),
    broken(
        "ignored_input",
        "self_instead_of_cross",
        SelfInsteadOfCross,
        ("", "src", "encoder*", "cross*"),
        also=("unused_parameter",),
        task="seq2seq",
        example_inputs=PAIR,
    ),
    broken("vocab_mismatch", "head_one_short", OffByOneHead, ("fc*", "")),
    broken("vocab_mismatch", "ids_from_one", lambda: initialised(OneBased()), ("tok*", "")),
    broken("vocab_mismatch", "head_grown_alone", GrownHead, ("lm_head*", "wte*", "")),
]
