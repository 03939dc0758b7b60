"""Models whose initialisation or flow of signals is at fault."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import einsum, nn

from benchmarks.zoo.entry import broken, initialised


class DeadMLP(nn.Module):
    """Tabular classifier; the bias of a hidden layer was set to -10 instead of 0.1."""

    def __init__(self, n=20, h=64, classes=4):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(n, h), nn.Linear(h, h), nn.Linear(h, classes)
        nn.init.constant_(self.l2.bias, -10.0)

    def forward(self, x):
        return self.l3(F.relu(self.l2(F.relu(self.l1(x)))))


class DeadConv(nn.Module):
    """uniform_(-0.5, 0) instead of (-0.5, 0.5) behind a ReLU: no unit ever fires."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1)
        self.conv2 = nn.Conv2d(16, 32, 3, 2, 1)
        self.fc = nn.Linear(32, classes)
        nn.init.uniform_(self.conv2.weight, -0.5, 0.0)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        return self.fc(x.mean((-1, -2)))


class FilledWeights(nn.Module):
    """All weights of the feed-forward part have one value."""

    def __init__(self, n=16, h=32, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU())
        self.clf = nn.Linear(h, classes)
        for m in self.body:
            if isinstance(m, nn.Linear):
                nn.init.constant_(m.weight, 0.05)
                nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.clf(self.body(x))


class OnesRNN(nn.Module):
    """GRU tagger; the loop over parameters filled the recurrent matrices with a constant."""

    def __init__(self, vocab=64, d=24, tags=6):
        super().__init__()
        self.emb, self.gru, self.out = nn.Embedding(vocab, d), nn.GRU(d, d, batch_first=True), nn.Linear(d, tags)
        for name, p in self.gru.named_parameters():
            nn.init.constant_(p, 0.0 if "bias" in name else 0.02)

    def forward(self, input_ids):
        return self.out(self.gru(self.emb(input_ids))[0])


class ZeroMLP(nn.Module):
    """Two zero matrices in a row: neither gets a gradient."""

    def __init__(self, n=30, h=48, classes=5):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(n, h)), nn.Parameter(torch.zeros(h, classes))
        self.b1, self.b2 = nn.Parameter(torch.zeros(h)), nn.Parameter(torch.zeros(classes))

    def forward(self, x):
        return torch.relu(x @ self.w1 + self.b1) @ self.w2 + self.b2


class ZeroLoRA(nn.Module):
    """Both factors of a low-rank update start at zero, over a frozen base."""

    def __init__(self, n=20, h=32, classes=4):
        super().__init__()
        self.base, self.head = nn.Linear(n, h), nn.Linear(h, classes)
        self.base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(n, 4)), nn.Parameter(torch.zeros(4, h))

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + x @ self.lora_A @ self.lora_B))


class ZeroConvNet(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 12, 3, 2), nn.Conv2d(12, 16, 3, 2)
        self.fc = nn.Linear(16, classes)
        for m in (self.b, self.fc):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


class GPTish(nn.Module):
    """Compact causal transformer with settings for the beginning of training."""

    def __init__(self, vocab=64, d=48, depth=2, res=True, scale=True, softmax_dim=-1, std=0.02, pos_std=0.02):
        super().__init__()
        self.res, self.scale, self.dim, self.nh = res, scale, softmax_dim, 4
        self.token, self.position = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "n1": nn.LayerNorm(d),
                    "qkv": nn.Linear(d, 3 * d),
                    "proj": nn.Linear(d, d),
                    "n2": nn.LayerNorm(d),
                    "up": nn.Linear(d, 4 * d),
                    "down": nn.Linear(4 * d, d),
                }
            )
            for _ in range(depth)
        )
        self.norm, self.unembed = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        initialised(self, std)
        nn.init.normal_(self.position.weight, std=pos_std)

    def attend(self, layer, x):
        b, t, c = x.shape
        q, k, v = layer["qkv"](x).view(b, t, 3, self.nh, -1).permute(2, 0, 3, 1, 4)
        s = einsum("bhid,bhjd->bhij", q, k) * (q.size(-1) ** -0.5 if self.scale else 1.0)
        hidden = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        a = s.masked_fill(hidden, torch.finfo(s.dtype).min).softmax(dim=self.dim)
        return layer["proj"](einsum("bhij,bhjd->bihd", a, v).reshape(b, t, c))

    def forward(self, idx):
        x = self.token(idx) + self.position(torch.arange(idx.size(1), device=idx.device))
        for layer in self.layers:
            y = self.attend(layer, layer["n1"](x))
            x = x + y if self.res else y
            y = layer["down"](F.gelu(layer["up"](layer["n2"](x))))
            x = x + y if self.res else y
        return self.unembed(self.norm(x))


class TiedUnit(nn.Module):
    """Tied head over a table at N(0, 1): logits are hundreds at the start."""

    def __init__(self, vocab=100, d=128):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.gru = nn.GRU(d, d, batch_first=True)
        self.ln = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        return self.head(self.ln(self.gru(self.embed(input_ids))[0]))


class LoudConv(nn.Module):
    """Kaiming's formula with the fan in the numerator."""

    def __init__(self, classes=10):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 16), (16, 32), (32, 32)))
        self.fc = nn.Linear(32, classes)
        for c in self.convs:
            fan = c.in_channels * 9
            c.weight.data.normal_(0, math.sqrt(fan / 2))

    def forward(self, x):
        for c in self.convs:
            x = F.relu(c(x))
        return self.fc(x.mean((2, 3)))


class DeepTanh(nn.Module):
    """Deep plain stack in the style of the first lessons; `std` decides what becomes of the signal."""

    def __init__(self, std, act=torch.tanh, n=32, depth=12, classes=4, bias=False):
        super().__init__()
        self.act = act
        self.fcs = nn.ModuleList(nn.Linear(n, n) for _ in range(depth))
        self.last = nn.Linear(n, classes)
        for fc in self.fcs:
            nn.init.normal_(fc.weight, std=std)
            nn.init.zeros_(fc.bias)

    def forward(self, x):
        for fc in self.fcs:
            x = self.act(fc(x))
        return self.last(x)


class FadingConv(nn.Module):
    """Truncated normal of 1e-3 in eight convolutions without norm."""

    def __init__(self, c=16, classes=10):
        super().__init__()
        layers = [nn.Conv2d(3, c, 3, 2, 1), nn.ReLU()]
        for _ in range(7):
            layers += [nn.Conv2d(c, c, 3, 1, 1), nn.ReLU()]
        self.trunk, self.fc = nn.Sequential(*layers), nn.Linear(c, classes)
        for m in self.trunk:
            if isinstance(m, nn.Conv2d):
                nn.init.trunc_normal_(m.weight, std=1e-3)
                nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.fc(self.trunk(x).mean((2, 3)))


class ElmanLoop(nn.Module):
    """Own recurrence whose matrix was drawn from a unit normal: a chaotic regime."""

    def __init__(self, n_in=8, h=36, classes=3):
        super().__init__()
        self.w_in, self.w_out = nn.Linear(n_in, h), nn.Linear(h, classes)
        self.w_h = nn.Parameter(torch.randn(h, h))

    def forward(self, series):
        h = torch.zeros(series.size(0), self.w_h.size(0), device=series.device, dtype=series.dtype)
        for t in range(series.size(1)):
            h = torch.tanh(self.w_in(series[:, t]) + h @ self.w_h)
        return self.w_out(h)


class SigmoidConv(nn.Module):
    """Ten convolutions with sigmoids and the default initialisation."""

    def __init__(self, c=16, depth=10, classes=10):
        super().__init__()
        self.first = nn.Conv2d(1, c, 3, 2, 1)
        self.rest = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(depth))
        self.fc = nn.Linear(c, classes)

    def forward(self, x):
        x = torch.sigmoid(self.first(x))
        for conv in self.rest:
            x = torch.sigmoid(conv(x))
        return self.fc(x.mean((2, 3)))


class PlainTwenty(nn.Module):
    """A residual network from which the addition was lost in a refactoring."""

    def __init__(self, c=16, depth=8, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1, bias=False),
                nn.BatchNorm2d(c),
                nn.ReLU(),
                nn.Conv2d(c, c, 3, padding=1, bias=False),
                nn.BatchNorm2d(c),
            )
            for _ in range(depth)
        )
        self.fc = nn.Linear(c, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")

    def forward(self, x):
        x = self.stem(x)
        for f in self.stages:
            out = f(x)
            x = F.relu(out)
        return self.fc(x.mean((2, 3)))


class DeepEncoder(nn.Module):
    """BERT-like in which no half of a block has a way around."""

    def __init__(self, vocab=80, d=48, depth=6, classes=4):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.att = nn.ModuleList(nn.MultiheadAttention(d, 4, batch_first=True) for _ in range(depth))
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d)) for _ in range(depth)
        )
        self.ln_a = nn.ModuleList(nn.LayerNorm(d) for _ in range(depth))
        self.ln_f = nn.ModuleList(nn.LayerNorm(d) for _ in range(depth))
        self.cls = nn.Linear(d, classes)

    def forward(self, input_ids):
        x = self.emb(input_ids) + self.pos(torch.arange(input_ids.size(1), device=input_ids.device))
        for att, ffn, a, f in zip(self.att, self.ffn, self.ln_a, self.ln_f, strict=False):
            x = a(att(x, x, x, need_weights=False)[0])
            x = f(ffn(x))
        return self.cls(x.mean(1))


class WideHeads(nn.Module):
    """ViT: q @ k without the division, heads of 64."""

    def __init__(self, d=128, heads=2, classes=10):
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, d, 8, 8)
        self.pos = nn.Parameter(torch.randn(1, 16, d) * 0.02)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(d, d, bias=False) for _ in range(4))
        for m in (self.to_q, self.to_k, self.to_v):
            nn.init.xavier_uniform_(m.weight)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.fc = nn.Linear(d, classes)

    def forward(self, img):
        x = self.patch(img).flatten(2).mT + self.pos
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(2, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        attn = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        x = x + self.to_out(torch.einsum("bhqk,bkhd->bqhd", attn, v).flatten(2))
        return self.fc((x + self.mlp(self.norm2(x))).mean(1))


class TabAttention(nn.Module):
    """Transformer over columns with the softmax over queries, or over heads."""

    def __init__(self, dim, columns=10, d=32, classes=2, scaled=True):
        super().__init__()
        self.dim, self.scaled = dim, scaled
        self.w, self.b = nn.Parameter(torch.randn(columns, d) * 0.5), nn.Parameter(torch.randn(columns, d) * 0.5)
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, classes))

    def forward(self, x):
        z = x[:, :, None] * self.w + self.b
        q, k, v = (f(z).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        a = torch.softmax(q @ k.transpose(-1, -2) / q.size(-1) ** 0.5, dim=self.dim)
        return self.head(self.norm(z + (a @ v).transpose(1, 2).flatten(2)).mean(1))


class UnscaledText(nn.Module):
    """Single head of full width, dot products as they are, weights of Xavier."""

    def __init__(self, vocab=90, d=96, classes=5):
        super().__init__()
        self.e, self.p = nn.Embedding(vocab, d), nn.Parameter(torch.randn(70, d) * 0.5)
        self.Wq, self.Wk, self.Wv = (nn.Parameter(nn.init.xavier_normal_(torch.empty(d, d))) for _ in range(3))
        self.ln, self.y = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, x):
        h = self.e(x) + self.p[: x.size(1)]
        energy = torch.bmm(h @ self.Wq, (h @ self.Wk).transpose(1, 2))
        return self.y(self.ln(h + F.softmax(energy, dim=2) @ (h @ self.Wv)).mean(1))


LM = {"task": "causal_lm"}
SERIES = {"example_inputs": {"series": torch.randn(4, 30, 8, generator=torch.Generator().manual_seed(5))}}
BLOCKS = ("", "layers", "layers.*")
ENTRIES = [
    broken("dead_relu", "bias_minus_ten", DeadMLP, ("l2", "l2.*")),
    broken("dead_relu", "weights_below_zero", DeadConv, ("conv2", "conv2.*")),
    broken("symmetric_init", "constant_mlp", FilledWeights, ("body", "body.*")),
    broken("symmetric_init", "constant_gru", OnesRNN, ("gru", "gru.*")),
    broken("zero_init", "two_matrices", ZeroMLP, ("", "w1", "w2")),
    broken("zero_init", "both_lora_factors", ZeroLoRA, ("", "lora_A", "lora_B")),
    broken("zero_init", "conv_and_head", ZeroConvNet, ("b", "b.*", "fc", "fc.*", "a", "a.*")),
    broken(
        "exploding_init",
        "tied_table_of_unit_variance",
        TiedUnit,
        ("", "embed", "embed.weight", "head", "head.weight"),
        **LM,
    ),
    broken(
        "exploding_init", "fan_in_numerator", LoudConv, ("", "convs", "convs.*", "fc"), also=("exploding_gradient",)
    ),
    broken(
        "exploding_init",
        "gpt_with_std_two",
        lambda: GPTish(std=2.0, pos_std=2.0),
        ("", "layers*", "unembed*", "token*", "position*"),
        **LM,
    ),
    broken(
        "vanishing_init", "conv_of_a_thousandth", FadingConv, ("", "trunk", "trunk.*"), also=("vanishing_gradient",)
    ),
    broken(
        "vanishing_init",
        "tanh_of_a_hundredth",
        lambda: DeepTanh(0.01),
        ("", "fcs", "fcs.*"),
        also=("vanishing_gradient",),
    ),
    broken("exploding_gradient", "elman_loop", ElmanLoop, ("", "w_h", "w_in", "w_in.*"), **SERIES),
    broken("exploding_gradient", "deep_tanh_at_large_std", lambda: DeepTanh(1.0, depth=30), ("", "fcs", "fcs.*")),
    broken(
        "vanishing_gradient",
        "deep_sigmoid",
        lambda: DeepTanh(0.18, torch.sigmoid),
        ("", "fcs", "fcs.*"),
        also=("vanishing_init",),
    ),
    broken(
        "vanishing_gradient",
        "sigmoid_convolutions",
        SigmoidConv,
        ("", "first", "first.*", "rest", "rest.*"),
        also=("vanishing_init",),
    ),
    broken("missing_residual", "resnet_without_addition", PlainTwenty, ("", "stages", "stages.*")),
    broken("missing_residual", "gpt_without_addition", lambda: GPTish(depth=6, res=False), BLOCKS, **LM),
    broken(
        "missing_residual", "bert_without_addition", DeepEncoder, ("", "ffn", "ffn.*", "att", "att.*", "ln_a*", "ln_f*")
    ),
    broken(
        "missing_attention_scale",
        "einsum_gpt",
        lambda: GPTish(scale=False, depth=2, d=64, std=0.15, pos_std=0.15),
        BLOCKS,
        **LM,
    ),
    broken("missing_attention_scale", "vit_wide_heads", WideHeads, ("", "to_q*", "to_k*", "to_v*", "to_out*")),
    broken("missing_attention_scale", "raw_matrices", UnscaledText, ("", "Wq", "Wk", "Wv")),
    broken("wrong_softmax_dim", "columns_over_queries", lambda: TabAttention(-2), ("", "query*", "key*", "value*")),
    broken("wrong_softmax_dim", "over_heads", lambda: TabAttention(1), ("", "query*", "key*", "value*")),
    broken(
        "wrong_softmax_dim", "gpt_over_queries", lambda: GPTish(softmax_dim=-2), BLOCKS, also=("future_leakage",), **LM
    ),
    broken("embedding_scale", "gpt_positions_unit", lambda: GPTish(pos_std=1.0), ("token*", "position*"), **LM),
]
