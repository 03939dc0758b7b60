"""Models whose weights start wrong, or whose signals grow, fade or mix up."""

# ruff: noqa: D102, D103

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_a.broken_information import with_attention, with_heads
from benchmarks.unseen_a.sound_language import Heads, Layer, LowRank, PocketConfig, PocketGPT, TopOne, VaswaniLM
from benchmarks.unseen_a.sound_others import SelfAttend
from benchmarks.zoo.entry import broken, initialised, sinusoids


def negative_uniform():
    """The lower bound was typed, the upper one left at zero."""
    net = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)
    )
    nn.init.uniform_(net[2].weight, -0.125, 0.0)
    nn.init.constant_(net[2].bias, -0.02)
    return net


class LowBias(nn.Module):
    """Detector prior of -4.6 put on every convolution, not only on the last."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.score = nn.Conv2d(32, 2, 1)
        for m in (self.c1, self.c2, self.score):
            nn.init.normal_(m.weight, std=0.05)
            nn.init.constant_(m.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, x):
        return self.score(F.relu(self.c2(F.relu(self.c1(x))))).amax((2, 3))


class SameUnits(nn.Module):
    """Raw weights of ones over the width: all units are one."""

    def __init__(self, n=15, hidden=40):
        super().__init__()
        self.w1 = nn.Parameter(torch.ones(n, hidden) / n)
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.ones(hidden, 3) / hidden)
        self.b2 = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return torch.tanh(x @ self.w1 + self.b1) @ self.w2 + self.b2


class ConstantConv(nn.Module):
    """The convolutions are filled with one constant."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.cls = nn.Linear(16, 10)
        for conv in (self.first, self.second):
            nn.init.constant_(conv.weight, 0.02)
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        return self.cls(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def silent_adapters():
    """Both factors of each adapter start at zero, so neither moves."""
    model = initialised(PocketGPT()).requires_grad_(False)
    for layer in model.layers:
        layer.att.qkv = LowRank(layer.att.qkv)
        nn.init.zeros_(layer.att.qkv.lora_A)
    return model


class DoublyGated(nn.Module):
    """A gate at zero over a branch at zero."""

    def __init__(self, n=16, w=32):
        super().__init__()
        self.stem = nn.Linear(n, w)
        self.up, self.down = nn.Linear(w, w), nn.Linear(w, w)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(w, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.alpha * self.down(F.gelu(self.up(x))))


class ZeroMLP(nn.Module):
    """Raw parameters that nobody filled."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.zeros(11, 32))
        self.outer = nn.Parameter(torch.zeros(32, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.tanh(x @ self.inner) @ self.outer + self.bias


class NormalConvs(nn.Module):
    """`normal_` without a standard deviation."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential()
        for i, (a, b) in enumerate(((3, 32), (32, 32), (32, 32), (32, 64))):
            conv = nn.Conv2d(a, b, 3, padding=1)
            nn.init.normal_(conv.weight)
            self.body.add_module(f"conv{i}", conv)
            self.body.add_module(f"act{i}", nn.ReLU())
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def tenfold_xavier():
    """A gain meant for another layer: every matrix starts ten times too wide."""
    net = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(32, 32), nn.ReLU())], nn.Linear(32, 4))
    for m in net:
        if isinstance(m, nn.Linear):
            nn.init.xavier_normal_(m.weight, gain=10.0)
    return net


def tiny_tanh():
    """A standard deviation of 0.001 in plain layers of width 48."""
    net = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(48, 48), nn.Tanh())], nn.Linear(48, 3))
    for m in net:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.001)
            nn.init.zeros_(m.bias)
    return net


class SmallGain(nn.Module):
    """The start of a policy's last layer, used for all layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv1d(4, 24, 5, padding=2)] + [nn.Conv1d(24, 24, 5, padding=2) for _ in range(5)]
        )
        self.policy = nn.Linear(24, 6)
        for conv in self.layers:
            nn.init.orthogonal_(conv.weight, gain=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, obs):
        for conv in self.layers:
            obs = F.relu(conv(obs))
        return self.policy(obs.mean(-1))


class Doubling(nn.Module):
    """Adds the input to a sum that has it already, without a norm."""

    def __init__(self, n=24, w=32, depth=24):
        super().__init__()
        self.inp = nn.Linear(n, w)
        self.layers = nn.ModuleList(nn.Linear(w, w) for _ in range(depth))
        self.out = nn.Linear(w, 3)

    def forward(self, x):
        x = self.inp(x)
        for layer in self.layers:
            y = x + torch.relu(layer(x))
            x = x + y
        return self.out(x)


class WildRecurrence(nn.Module):
    """A linear recurrence whose matrix has twice the radius it may have."""

    def __init__(self, vocab=60, d=32):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.A = nn.Parameter(2.0 * torch.linalg.qr(torch.randn(d, d))[0])
        self.out = nn.Linear(d, vocab)

    def forward(self, tokens):
        h, ys = 0.0, []
        for x in self.embed(tokens).unbind(1):
            h = x if isinstance(h, float) else h @ self.A + x
            ys.append(h)
        return self.out(torch.stack(ys, 1))


def sigmoid_tower():
    """Sigmoids between twelve plain layers."""
    return nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(32, 32), nn.Sigmoid())], nn.Linear(32, 4))


class SigmoidConvs(nn.Module):
    """Squashes after each of nine convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1)
        self.trunk = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(8))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.sigmoid(self.stem(x))
        for conv in self.trunk:
            x = torch.sigmoid(conv(x))
        return self.fc(x.mean((2, 3)))


class NoSkipLayer(Layer):
    """Both residual sums are gone."""

    def forward(self, x):
        x = self.att(self.n1(x))
        return self.ff(self.n2(x))


class NoSkipGPT(PocketGPT):
    """Eight layers of that kind."""

    layer = NoSkipLayer


class NoShortcut(nn.Module):
    """Adds its shortcut only where the shapes differ: the condition is the wrong way round."""

    def __init__(self, c):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)

    def forward(self, x):
        identity = x
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        if out.shape != identity.shape:
            out = out + identity
        return out


class DeepPlain(nn.Module):
    """Fourteen of these units."""

    def __init__(self, depth=14):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.units = nn.Sequential(*[NoShortcut(16) for _ in range(depth)])
        self.fc = nn.Linear(16, 10)
        for m in self.units.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")

    def forward(self, x):
        return self.fc(self.units(F.relu(self.stem(x))).mean((2, 3)))


class Unscaled(SelfAttend):
    """Scores are not divided by the root of the head width."""

    def forward(self, x, mask):
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.h, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.dense((self.weights(q @ k.mT, mask) @ v).transpose(1, 2).reshape(b, t, d))


class TimesRoot(Heads):
    """Multiplies by the root where it should divide."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=q.shape[-1] ** 0.5)


class OverHeads(SelfAttend):
    """Softmax over the heads."""

    def weights(self, scores, mask):
        return scores.masked_fill(mask[:, None, None, :] == 0, -1e4).softmax(1)


class OverQueries(nn.Module):
    """A pooling query whose weights are normalised over the features."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(10, 32, batch_first=True)
        self.q = nn.Linear(32, 4)
        self.out = nn.Linear(128, 5)

    def forward(self, frames):
        h, _ = self.lstm(frames)
        w = F.softmax(self.q(h), dim=0)
        return self.out(torch.einsum("btk,btd->bkd", w, h).flatten(1))


class RouterOverTokens(TopOne):
    """The router is normalised over the tokens of the sequence, not over the experts."""

    def forward(self, x):
        gate = self.router(x).softmax(dim=1)
        return sum(e(x) * gate[..., i : i + 1] for i, e in enumerate(self.experts))


class RoutedEncoder(nn.Module):
    """A small classifier with such experts."""

    def __init__(self):
        super().__init__()
        self.tok, self.pos = nn.Embedding(70, 32), nn.Parameter(torch.randn(64, 32) * 0.02)
        self.moe = RouterOverTokens(32, 4)
        self.norm = nn.LayerNorm(32)
        self.rnn = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 3)

    def forward(self, input_ids):
        x = self.tok(input_ids) + self.pos[: input_ids.shape[1]]
        return self.head(self.rnn(x + self.moe(self.norm(x)))[0].mean(1))


def loud_positions():
    """Tokens at 0.02, positions at the default of one."""
    model = initialised(PocketGPT())
    nn.init.normal_(model.pos.weight)
    return model


class SinusoidsOverTokens(VaswaniLM):
    """Token vectors of 0.02 without the root of the width under sinusoids of one."""

    def __init__(self):
        super().__init__()
        nn.init.normal_(self.encoder.weight, std=0.02)
        self.register_buffer("pe", sinusoids(128, 32))

    def forward(self, src):
        n = src.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=src.device, dtype=self.pe.dtype)
        return self.decoder(self.stack(self.encoder(src) + self.pe[:n], mask=mask, is_causal=True))


class CopiedExperts(nn.Module):
    """Clones one expert and adds all with equal weight: they stay equal."""

    def __init__(self):
        super().__init__()
        one = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.experts = nn.ModuleList(copy.deepcopy(one) for _ in range(4))
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        return self.out(x + sum(e(x) for e in self.experts) / 4)


def unscaled():
    model = with_attention(Unscaled)
    for layer in model.layers:
        layer.self_attn.h = 1
        nn.init.normal_(layer.self_attn.query.weight, std=0.18)
        nn.init.normal_(layer.self_attn.key.weight, std=0.18)
    return model


def times_root():
    model = with_heads(TimesRoot, cfg=PocketConfig(dim=64, heads=2))
    for layer in model.layers:
        nn.init.xavier_uniform_(layer.att.qkv.weight)
    return model


def wave(n):
    return {"x": torch.linspace(-9, 8, 4 * n).sin().view(4, n)}


DEEP = PocketConfig(depth=8)
ENTRIES = [
    broken("dead_relu", "negative_uniform", negative_uniform, ("2*", "3")),
    broken(
        "dead_relu", "detector_prior_everywhere", LowBias, ("c1*", "c2*"), also=("constant_output", "ignored_input")
    ),
    broken("symmetric_init", "rows_of_ones", SameUnits, ("w1", "w2"), example_inputs=wave(15)),
    broken("symmetric_init", "constant_convolutions", ConstantConv, ("first*", "second*")),
    broken("symmetric_init", "copied_experts", CopiedExperts, "experts*"),
    broken("zero_init", "both_factors_zero", silent_adapters, "layers.*.att.qkv*"),
    broken("zero_init", "gate_over_zero_branch", DoublyGated, ("alpha", "down*", "up*")),
    broken(
        "zero_init",
        "parameters_never_filled",
        ZeroMLP,
        ("inner", "outer"),
        also=("constant_output",),
        example_inputs=wave(11),
    ),
    broken("exploding_init", "normal_without_std", NormalConvs, "body*"),
    broken("exploding_init", "gain_of_ten", tenfold_xavier, "*"),
    broken("exploding_init", "unit_normal_gpt", lambda: initialised(PocketGPT(), 1.0), ("*", "")),
    broken("vanishing_init", "std_of_a_thousandth", tiny_tanh, "*", also=("vanishing_gradient",)),
    broken(
        "vanishing_init", "policy_gain_everywhere", SmallGain, "layers*", also=("vanishing_gradient", "constant_output")
    ),
    broken("exploding_gradient", "input_added_twice", Doubling, ("layers*", "", "inp*"), also=("exploding_init",)),
    broken(
        "exploding_gradient", "recurrence_radius_two", WildRecurrence, ("A", "", "embed*"), also=("exploding_init",)
    ),
    broken("vanishing_gradient", "sigmoid_tower", sigmoid_tower, "*", also=("vanishing_init", "constant_output")),
    broken(
        "vanishing_gradient",
        "sigmoid_convolutions",
        SigmoidConvs,
        ("stem*", "trunk*"),
        also=("vanishing_init", "constant_output"),
    ),
    broken(
        "missing_residual",
        "no_sums_in_eight_layers",
        lambda: initialised(NoSkipGPT(DEEP)),
        ("layers*",),
        also=("vanishing_gradient",),
    ),
    broken(
        "missing_residual",
        "dropped_shortcut",
        DeepPlain,
        ("units*", ""),
        also=("vanishing_gradient", "exploding_gradient", "vanishing_init"),
    ),
    broken("missing_attention_scale", "plain_product", unscaled, "layers.*.self_attn*"),
    broken("missing_attention_scale", "times_the_root", times_root, "layers.*.att*"),
    broken("wrong_softmax_dim", "over_heads", lambda: with_attention(OverHeads), "layers.*.self_attn*"),
    broken("wrong_softmax_dim", "pooling_over_batch", OverQueries, ("q*", ""), also=("batch_leakage",)),
    broken("wrong_softmax_dim", "router_over_tokens", RoutedEncoder, "moe*"),
    broken("embedding_scale", "default_positions", loud_positions, ("pos*", "tok*")),
    broken("embedding_scale", "sinusoids_over_tokens", SinusoidsOverTokens, ("encoder*", "pe", "")),
]
