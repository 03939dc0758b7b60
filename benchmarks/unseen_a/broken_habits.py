"""Models with hidden state, surprising modes, or trouble in the backward pass."""

# ruff: noqa: D102

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_a.broken_information import with_heads
from benchmarks.unseen_a.sound_images import BetaVAE, TinyViT
from benchmarks.unseen_a.sound_language import Heads, RoutedGPT
from benchmarks.unseen_a.sound_others import BertLayer, MiniBert, TabularNorm
from benchmarks.zoo.entry import broken, initialised


class DefaultDropout(BertLayer):
    """`F.dropout` trains by default."""

    def forward(self, x, mask):
        x = self.ln1(x + F.dropout(self.self_attn(x, mask), 0.1))
        return self.ln2(x + self.fc2(F.gelu(self.fc1(x))))


class DropsAlways(Heads):
    """The fused kernel drops whatever the mode."""

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)


class SamplesAlways(BetaVAE):
    """Draws its code at inference, too."""

    def forward(self, x):
        h = self.enc(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        return {"reconstruction": self.dec(z).view_as(x), "mu": mu, "logvar": logvar}


class NoisyRouter(RoutedGPT):
    """Jitter for exploration reaches the router in every mode."""

    def embed(self, idx):
        x = super().embed(idx)
        return x * torch.empty_like(x).uniform_(0.9, 1.1)


class RandomPatches(TinyViT):
    """Keeps a random half of the patches, as in pretraining."""

    def tokens(self, img):
        x = super().tokens(img)
        keep = torch.randperm(x.shape[1] - 1, device=x.device)[:8] + 1
        return torch.cat((x[:, :1], x[:, keep]), 1)


class KeepsTraining(TabularNorm):
    """Overrides `train` and forgets to pass the mode on."""

    def __init__(self):
        super().__init__()
        self.tracking = True

    def train(self, mode=True):
        self.tracking = mode
        return self


class SwitchesItself(nn.Module):
    """`forward` puts the norm into training mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2, 1)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        self.bn.train()
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class Stateful(nn.Module):
    """Goes on from the state of the last call."""

    def __init__(self, vocab=62):
        super().__init__()
        self.embedding = nn.Embedding(vocab, 32)
        self.rnn = nn.GRU(32, 32, batch_first=True)
        self.out = nn.Linear(32, vocab)
        self.hidden = None

    def forward(self, tokens):
        if self.hidden is not None and self.hidden.shape[1] != len(tokens):
            self.hidden = None
        y, h = self.rnn(self.embedding(tokens), self.hidden)
        self.hidden = h.detach()
        return self.out(y)


class RunningScale(nn.Module):
    """Moves its running scale at inference as well."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(13, 32), nn.Linear(32, 2)
        self.register_buffer("scale", torch.ones(32))

    def forward(self, x):
        h = F.silu(self.fc1(x))
        with torch.no_grad():
            self.scale.lerp_(h.abs().mean(0), 0.05)
        return self.fc2(h / self.scale)


class KeptGraph(nn.Module):
    """Keeps its state with the graph, so the second step cannot go back."""

    def __init__(self):
        super().__init__()
        self.inp, self.rec = nn.Linear(6, 24), nn.Linear(24, 24)
        self.out = nn.Linear(24, 2)
        self.memory = torch.zeros(24)

    def forward(self, x):
        h = torch.tanh(self.inp(x) + self.rec(self.memory))
        self.memory = h.mean(0)
        return self.out(h)


class InPlaceActivation(nn.Module):
    """Adds in place to the result of a sigmoid that the gradient needs."""

    def __init__(self):
        super().__init__()
        self.gate, self.value = nn.Conv1d(3, 16, 5, padding=2), nn.Conv1d(3, 16, 5, padding=2)
        self.head = nn.Linear(16, 4)

    def forward(self, series):
        g = torch.sigmoid(self.gate(series))
        y = g * self.value(series)
        g += 1.0
        return self.head((y * g).mean(-1))


class InPlaceScores(Heads):
    """Masks the probabilities of its softmax in place."""

    def mix(self, q, k, v):
        t = q.shape[2]
        hide = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        p = (q @ k.mT / math.sqrt(q.shape[-1])).exp()
        p.masked_fill_(hide, 0.0)
        return (p / p.sum(-1, keepdim=True)) @ v


class MasksIds(MiniBert):
    """Replaces unknown ids in the batch of the caller."""

    def encode(self, input_ids, attention_mask):
        input_ids[input_ids > 30] = 3
        return super().encode(input_ids, attention_mask)


class CentresInPlace(nn.Module):
    """Centres each row in place."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(17, 40), nn.GELU(), nn.Linear(40, 1))

    def forward(self, features):
        features -= features.mean(-1, keepdim=True)
        return self.net(features)


ENTRIES = [
    broken(
        "dropout_in_eval",
        "functional_default",
        lambda: initialised(type("DropBert", (MiniBert,), {"layer": DefaultDropout})()),
        ("layers*", ""),
    ),
    broken("dropout_in_eval", "kernel_drops_always", lambda: with_heads(DropsAlways), ("layers.*.att*", "")),
    broken(
        "nondeterministic_forward",
        "code_always_drawn",
        SamplesAlways,
        ("mu", "logvar", "dec*", ""),
        example_inputs={"x": torch.linspace(0, 1, 1568).view(2, 1, 28, 28)},
    ),
    broken("nondeterministic_forward", "jitter_in_every_mode", lambda: initialised(NoisyRouter()), ""),
    broken("nondeterministic_forward", "random_half_of_patches", RandomPatches, ""),
    broken(
        "train_eval_ignored",
        "train_not_passed_on",
        KeepsTraining,
        ("", "norm_in", "net*"),
        also=("dropout_in_eval", "shape_crash"),
    ),
    broken("train_eval_ignored", "norm_set_to_train", SwitchesItself, ("bn", ""), also=("batch_leakage",)),
    broken("state_across_calls", "state_of_last_call", Stateful, ("", "rnn*", "hidden")),
    broken("state_across_calls", "scale_moves_at_inference", RunningScale, ("", "scale")),
    broken("backward_crash", "graph_kept", KeptGraph, ("", "rec*", "memory"), also=("state_across_calls",)),
    broken("backward_crash", "sigmoid_changed", InPlaceActivation, ("", "gate*")),
    broken("backward_crash", "exp_masked_in_place", lambda: with_heads(InPlaceScores), ("layers.*.att*", "")),
    broken("input_mutation", "ids_replaced", lambda: initialised(MasksIds()), ("", "input_ids")),
    broken("input_mutation", "rows_centred", CentresInPlace, ("", "features")),
]
