"""Sound encoders, sequence-to-sequence models, tables, sets, sounds and series."""

# ruff: noqa: D102

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entry import initialised, sinusoids, sound


class SelfAttend(nn.Module):
    """Attention in both directions that honours a mask of real tokens."""

    def __init__(self, d=32, h=4):
        super().__init__()
        self.h = h
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.dense = nn.Linear(d, d)

    def weights(self, scores, mask):
        return scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min).softmax(-1)

    def forward(self, x, mask):
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.h, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        w = self.weights(q @ k.mT / math.sqrt(d / self.h), mask)
        return self.dense((w @ v).transpose(1, 2).reshape(b, t, d))


class BertLayer(nn.Module):
    """Post-norm layer."""

    attention = SelfAttend

    def __init__(self, d=32):
        super().__init__()
        self.self_attn = self.attention(d)
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x, mask):
        x = self.ln1(x + self.self_attn(x, mask))
        return self.ln2(x + self.fc2(F.gelu(self.fc1(x))))


class MiniBert(nn.Module):
    """Masked language model."""

    layer = BertLayer

    def __init__(self, vocab=100, d=32, n=2, length=64):
        super().__init__()
        self.word = nn.Embedding(vocab, d, padding_idx=0)
        self.place = nn.Embedding(length, d)
        self.ln = nn.LayerNorm(d)
        self.layers = nn.ModuleList(self.layer(d) for _ in range(n))
        self.transform, self.ln_head = nn.Linear(d, d), nn.LayerNorm(d)
        self.decoder = nn.Linear(d, vocab)

    def encode(self, input_ids, attention_mask):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.ln(self.word(input_ids) + self.place.weight[: input_ids.shape[1]])
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.decoder(self.ln_head(F.gelu(self.transform(self.encode(input_ids, attention_mask)))))}


class MeanPooled(MiniBert):
    """Classifier over the mean of the real tokens."""

    def __init__(self, labels=3):
        super().__init__()
        del self.transform, self.ln_head
        self.decoder = nn.Linear(32, labels)

    def pool(self, x, mask):
        m = mask[..., None].to(x.dtype)
        return (x * m).sum(1) / m.sum(1).clamp(min=1)

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.decoder(self.pool(self.encode(input_ids, attention_mask), attention_mask))


class PackedLSTM(nn.Module):
    """Bidirectional recurrence over packed sequences."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(80, 24, padding_idx=0)
        self.lstm = nn.LSTM(24, 32, batch_first=True, bidirectional=True)
        self.out = nn.Linear(64, 4)

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        n = attention_mask.sum(1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.emb(input_ids), n, batch_first=True, enforce_sorted=False)
        h = self.lstm(packed)[1][0]
        return self.out(torch.cat((h[0], h[1]), -1))


class KimCNN(nn.Module):
    """Sentence classifier by convolutions of three widths."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(90, 32)
        self.convs = nn.ModuleList(nn.Conv1d(32, 16, k, padding=k // 2) for k in (3, 5, 7))
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(48, 2)

    def forward(self, input_ids):
        x = self.embed(input_ids).mT
        return self.fc(self.drop(torch.cat([F.relu(c(x)).amax(-1) for c in self.convs], -1)))


class Translator(nn.Module):
    """Library encoder and decoder with a shared table."""

    def __init__(self, vocab=88, d=32):
        super().__init__()
        self.shared = nn.Embedding(vocab, d)
        self.register_buffer("table", sinusoids(96, d) * 0.1)
        self.core = nn.Transformer(d, 4, 1, 1, 64, 0.0, batch_first=True)
        self.generator = nn.Linear(d, vocab, bias=False)
        nn.init.normal_(self.shared.weight, std=0.1)
        self.generator.weight = self.shared.weight

    def target_mask(self, n, device):
        return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)

    def forward(self, input_ids, decoder_input_ids):
        src = self.shared(input_ids) + self.table[: input_ids.shape[1]]
        tgt = self.shared(decoder_input_ids) + self.table[: decoder_input_ids.shape[1]]
        mask = self.target_mask(tgt.shape[1], tgt.device)
        return self.generator(self.core(src, tgt, tgt_mask=mask))


class Encoding(NamedTuple):
    """What the sentence model returns."""

    embedding: torch.Tensor
    tokens: torch.Tensor


class SentenceVector(MeanPooled):
    """Unit vectors of sentences."""

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.encode(input_ids, attention_mask)
        return Encoding(F.normalize(self.decoder(self.pool(x, attention_mask)), dim=-1), x)


class TabularNorm(nn.Module):
    """Batch norm and dropout over a row."""

    def __init__(self, features=14, classes=3):
        super().__init__()
        self.norm_in = nn.BatchNorm1d(features)
        self.net = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, classes))

    def forward(self, x):
        return self.net(self.norm_in(x))


class CrossNet(nn.Module):
    """Explicit feature crosses beside a deep part."""

    def __init__(self, n=10):
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(n, n) for _ in range(2))
        self.deep = nn.Sequential(nn.Linear(n, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Linear(n + 16, 1)

    def forward(self, features):
        x = features
        for layer in self.cross:
            x = features * layer(x) + x
        return self.top(torch.cat((x, self.deep(features)), -1)).squeeze(-1)


class ZeroBranchMLP(nn.Module):
    """Residual rows whose branches start at zero."""

    def __init__(self, n=20, w=48):
        super().__init__()
        self.inp = nn.Linear(n, w)
        self.ups = nn.ModuleList(nn.Linear(w, 2 * w) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(2 * w, w) for _ in range(3))
        for down in self.downs:
            nn.init.zeros_(down.weight)
            nn.init.zeros_(down.bias)
        self.out = nn.Linear(w, 4)

    def forward(self, x):
        x = self.inp(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(F.silu(up(x)))
        return self.out(x)


class Towers(nn.Module):
    """Scores a user against an item."""

    def __init__(self, users=200, items=300, d=24):
        super().__init__()
        self.user, self.item = nn.Embedding(users, d), nn.Embedding(items, d)
        self.user_mlp = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))
        self.item_mlp = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))

    def forward(self, user_id, item_id):
        return (self.user_mlp(self.user(user_id)) * self.item_mlp(self.item(item_id))).sum(-1)


class DeepSets(nn.Module):
    """A function of a set; the order means nothing, on purpose."""

    def __init__(self, d=6):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Linear(32, 32))
        self.rho = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, points):
        return self.rho(self.phi(points).mean(1))


class PointNetty(nn.Module):
    """Shared convolutions and a maximum over points."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1))
        self.cls = nn.Linear(64, 8)

    def forward(self, xyz):
        return self.cls(self.mlp(xyz).amax(-1))


class WaveClassifier(nn.Module):
    """Strided convolutions over a wave."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(1, 16, 9, stride=4, padding=4)
        self.norm = nn.InstanceNorm1d(16, affine=True)
        self.body = nn.Conv1d(16, 32, 5, stride=2, padding=2)
        self.cls = nn.Linear(32, 5)

    def forward(self, waveform):
        return self.cls(F.gelu(self.body(F.gelu(self.norm(self.front(waveform))))).mean(-1))


class Forecaster(nn.Module):
    """Next values of a series from a recurrent state."""

    def __init__(self, n=5, horizon=3):
        super().__init__()
        self.gru = nn.GRU(n, 32, batch_first=True)
        self.horizon, self.n = horizon, n
        self.out = nn.Linear(32, n * horizon)

    def forward(self, series):
        return self.out(self.gru(series)[0][:, -1]).view(-1, self.horizon, self.n)


class Siren(nn.Module):
    """Sine layers with their own start."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 3)
        with torch.no_grad():
            self.a.weight.uniform_(-0.5, 0.5)
            self.b.weight.uniform_(-math.sqrt(6 / 64) / 30, math.sqrt(6 / 64) / 30)

    def forward(self, xy):
        return self.c(torch.sin(30 * self.b(torch.sin(30 * self.a(xy)))))


class Highway(nn.Module):
    """Gates that carry at the start."""

    def __init__(self, w=40):
        super().__init__()
        self.into = nn.Linear(12, w)
        self.gates = nn.ModuleList(nn.Linear(w, w) for _ in range(4))
        self.plain = nn.ModuleList(nn.Linear(w, w) for _ in range(4))
        for g in self.gates:
            nn.init.constant_(g.bias, -2.0)
        self.out = nn.Linear(w, 2)

    def forward(self, x):
        x = self.into(x)
        for g, p in zip(self.gates, self.plain, strict=True):
            t = torch.sigmoid(g(x))
            x = t * torch.relu(p(x)) + (1 - t) * x
        return self.out(x)


def deep_he():
    """Twelve ReLU layers with the start of He."""
    layers = [nn.Linear(16, 64), nn.ReLU()]
    for _ in range(11):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    layers.append(nn.Linear(64, 5))
    for m in layers[:-1]:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight)
            nn.init.zeros_(m.bias)
    return nn.Sequential(*layers)


class MixedColumns(nn.Module):
    """Categories through tables beside numbers."""

    def __init__(self):
        super().__init__()
        self.cats = nn.ModuleList(nn.Embedding(n, 6) for n in (5, 9, 12))
        self.fc = nn.Sequential(nn.Linear(18 + 7, 48), nn.GELU(), nn.Linear(48, 2))

    def forward(self, numbers, categories):
        e = [t(categories[:, i]) for i, t in enumerate(self.cats)]
        return self.fc(torch.cat((numbers, *e), 1))


class FixedTable(nn.Module):
    """Pretrained word vectors kept as they are."""

    def __init__(self):
        super().__init__()
        self.vectors = nn.Embedding.from_pretrained(torch.randn(70, 24), freeze=True)
        self.rnn = nn.GRU(24, 32, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(64, 9)

    def forward(self, tokens):
        return self.tags(self.rnn(self.vectors(tokens))[0])


MIXED = {"numbers": torch.linspace(-2, 2, 28).view(4, 7), "categories": torch.arange(12).view(4, 3) % 5}
ENTRIES = [
    sound("masked_lm", lambda: initialised(MiniBert())),
    sound("mean_over_real_tokens", lambda: initialised(MeanPooled())),
    sound("packed_bilstm", PackedLSTM),
    sound("kim_cnn", KimCNN),
    sound("shared_translator", Translator, task="seq2seq"),
    sound("unit_sentence_vector", lambda: initialised(SentenceVector()), task="embedding"),
    sound("tabular_batch_norm", TabularNorm),
    sound("cross_network", CrossNet),
    sound("zero_branches", ZeroBranchMLP),
    sound(
        "two_towers", Towers, example_inputs={"user_id": torch.tensor([1, 7, 9]), "item_id": torch.tensor([4, 2, 260])}
    ),
    sound(
        "deep_sets",
        DeepSets,
        task="regression",
        example_inputs={"points": torch.linspace(-3, 4, 162).sin().view(3, 9, 6)},
    ),
    sound("point_net", PointNetty),
    sound("wave_classifier", WaveClassifier),
    sound("forecaster", Forecaster),
    sound("siren", Siren),
    sound("highway_closed_gates", Highway),
    sound("deep_he_relu", deep_he),
    sound("mixed_columns", MixedColumns, example_inputs=MIXED),
    sound("fixed_vectors", FixedTable, frozen=("vectors",)),
]
