"""Models with hidden state, surprises between train and eval, and needless cost."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entry import broken, initialised


class FunctionalDropout(nn.Module):
    """F.dropout drops by default, whatever the mode."""

    def __init__(self, n=22, h=48, classes=4):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(n, h), nn.Linear(h, h), nn.Linear(h, classes)

    def forward(self, x):
        x = F.dropout(F.relu(self.fc1(x)), p=0.5)
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class SdpaDropout(nn.Module):
    """dropout_p given to the fused attention without asking for the mode."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.ln, self.qkv, self.proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.drop, self.lm_head = 0.1, nn.Linear(d, vocab, bias=False)
        initialised(self, 0.1)

    def forward(self, input_ids):
        x = self.wte(input_ids) + self.wpe.weight[: input_ids.size(1)]
        q, k, v = (z.unflatten(-1, (4, -1)).transpose(1, 2) for z in self.qkv(self.ln(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.drop)
        return self.lm_head(x + self.proj(y.transpose(1, 2).flatten(2)))


class DropoutMadeInForward(nn.Module):
    """A new nn.Dropout in forward is always in training mode."""

    def __init__(self, classes=10):
        super().__init__()
        self.c1, self.c2, self.fc = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 24, 3, 2, 1), nn.Linear(24, classes)

    def forward(self, x):
        x = self.c2(self.c1(x).relu()).relu()
        x = nn.Dropout2d(0.3)(x)
        return self.fc(x.mean((2, 3)))


class NoisyGate(nn.Module):
    """Noise for load balancing that is also added at inference."""

    def __init__(self, n=18, d=32, experts=4, classes=5):
        super().__init__()
        self.gate = nn.Linear(n, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(n, d), nn.ReLU(), nn.Linear(d, classes)) for _ in range(experts)
        )

    def forward(self, x):
        logits = self.gate(x)
        logits = logits + torch.randn_like(logits)
        w = logits.softmax(-1)
        return sum(w[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))


class VAE(nn.Module):
    """Samples its code in eval too, with numpy's generator."""

    def __init__(self, n=32, z=6):
        super().__init__()
        self.enc, self.mu, self.logvar = nn.Linear(n, 48), nn.Linear(48, z), nn.Linear(48, z)
        self.dec = nn.Sequential(nn.Linear(z, 48), nn.ReLU(), nn.Linear(48, n))

    def forward(self, x):
        h = torch.relu(self.enc(x))
        mu, logvar = self.mu(h), self.logvar(h)
        eps = torch.as_tensor(np.random.randn(*mu.shape), dtype=mu.dtype, device=mu.device)
        return self.dec(mu + eps * torch.exp(0.5 * logvar))


class RandomCrop(nn.Module):
    """Augmentation inside the model without asking for the mode."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        dy, dx = random.randint(-3, 3), random.randint(-3, 3)
        x = torch.roll(x, (dy, dx), dims=(2, 3)) * random.uniform(0.8, 1.2)
        return self.fc(self.conv(x).mean((2, 3)))


class AlwaysTraining(nn.Module):
    """self.train() inside forward, a leftover of debugging."""

    def __init__(self, classes=10):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        self.train()
        return self.head(self.net(x))


class TrainWithoutEffect(nn.Module):
    """train() is overridden and its mode does not reach the children."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.emb, self.drop = nn.Embedding(vocab, d), nn.Dropout(0.3)
        self.gru, self.cls = nn.GRU(d, d, batch_first=True), nn.Linear(d, 4)

    def train(self, mode=True):
        self.training = mode
        return self

    def forward(self, input_ids):
        return self.cls(self.drop(self.gru(self.drop(self.emb(input_ids)))[0][:, -1]))


class NormInTrainingFlag(nn.Module):
    """F.batch_norm with training=True written out."""

    def __init__(self, n=16, h=32, classes=3):
        super().__init__()
        self.fc, self.bn, self.out = nn.Linear(n, h), nn.BatchNorm1d(h), nn.Linear(h, classes)

    def forward(self, x):
        h = self.fc(x)
        h = F.batch_norm(h, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, training=True)
        return self.out(h.relu())


class KeepsHidden(nn.Module):
    """LSTM whose hidden state survives from batch to batch."""

    def __init__(self, vocab=70, d=32):
        super().__init__()
        self.emb, self.rnn, self.fc = nn.Embedding(vocab, d), nn.LSTM(d, d, batch_first=True), nn.Linear(d, vocab)
        self.state = None

    def forward(self, input_ids):
        if self.state is not None and self.state[0].size(1) != input_ids.size(0):
            self.state = None
        out, state = self.rnn(self.emb(input_ids), self.state)
        self.state = tuple(s.detach() for s in state)
        return self.fc(out)


class RunningScale(nn.Module):
    """Observer of a maximum that goes on observing at inference."""

    def __init__(self, n=15, h=32):
        super().__init__()
        self.a, self.b = nn.Linear(n, h), nn.Linear(h, 3)
        self.register_buffer("peak", torch.ones(1))

    def forward(self, x):
        h = torch.relu(self.a(x))
        self.peak = 0.9 * self.peak + 0.1 * h.detach().abs().amax()
        return self.b(h / self.peak)


class StepCounter(nn.Module):
    """Temperature annealed by a count of calls, in eval as well."""

    def __init__(self, n=20, k=8):
        super().__init__()
        self.q, self.cls = nn.Linear(n, k), nn.Linear(k, 4)
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        return self.cls(torch.softmax(self.q(x) * (1 + 0.05 * self.steps), -1))


class NormaliseInPlace(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 5, 2), nn.Linear(16, classes)

    def forward(self, images):
        images -= 0.5
        images /= 0.25
        return self.fc(self.conv(images).relu().mean((2, 3)))


class IgnoredTokens(nn.Module):
    """Unknown ids are replaced inside the caller's tensor."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(vocab, d), nn.GRU(d, d, batch_first=True), nn.Linear(d, 5)

    def forward(self, input_ids):
        input_ids[:, 0] = 1
        return self.out(self.rnn(self.emb(input_ids))[1][-1])


class ReluInPlaceFirst(nn.Module):
    def __init__(self, n=24, classes=3):
        super().__init__()
        self.net = nn.Sequential(
            nn.LeakyReLU(0.1, inplace=True), nn.Linear(n, 48), nn.ReLU(inplace=True), nn.Linear(48, classes)
        )

    def forward(self, x):
        return self.net(x)


class HistoryOfFeatures(nn.Module):
    """Features are kept for a plot and never thrown away."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.fc, self.history = nn.Conv2d(3, 16, 3, 2), nn.Linear(16, classes), []

    def forward(self, x):
        f = self.conv(x).relu().mean((2, 3))
        self.history.append(f)
        return self.fc(f)


class LossLog(nn.Module):
    """GRU model that files the activations of each call under its number."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.emb, self.gru, self.out = nn.Embedding(vocab, d), nn.GRU(d, d, batch_first=True), nn.Linear(d, vocab)
        self.activations = {}

    def forward(self, input_ids):
        h, _ = self.gru(self.emb(input_ids))
        self.activations[len(self.activations)] = h.detach().clone()
        return self.out(h)


class LinearPromise(nn.Module):
    """Linear attention that multiplies q and k first."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Parameter(torch.randn(1, 4096, d) * 0.1)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.norm, self.cls = nn.LayerNorm(d), nn.Linear(d, 4)

    def forward(self, input_ids):
        x = self.emb(input_ids) + self.pos[:, : input_ids.size(1)]
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        w = q @ k.transpose(1, 2)
        y = (w @ v) / w.sum(-1, keepdim=True)
        return self.cls(self.norm(x + self.o(y)).mean(1))


class ToeplitzSSM(nn.Module):
    """State-space layer which builds its whole (time, time) kernel."""

    def __init__(self, vocab=60, d=24):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.log_a, self.b = nn.Parameter(torch.linspace(-3, 0, d)), nn.Parameter(torch.ones(d))
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, vocab)

    def forward(self, input_ids):
        x = self.emb(input_ids)
        t = torch.arange(x.size(1), device=x.device)
        lag = (t[:, None] - t[None, :]).clamp(min=0)
        kernel = torch.exp(-lag[..., None] * self.log_a.exp()).to(x.dtype) * (t[:, None] >= t[None, :])[..., None]
        return self.out(self.norm(x + torch.einsum("tsd,bsd->btd", kernel, x * self.b)))


class LoopAttention(nn.Module):
    """Attention with Python loops over samples and positions."""

    def __init__(self, vocab=64, d=24):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.q, self.k, self.v, self.out = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, vocab)

    def forward(self, idx):
        x = self.emb(idx) + self.pos.weight[: idx.size(1)]
        rows = []
        for b in range(x.size(0)):
            outs = []
            for i in range(x.size(1)):
                scores = [(self.q(x[b, i]) * self.k(x[b, j])).sum() / 24**0.5 for j in range(i + 1)]
                w = torch.stack(scores).softmax(0)
                outs.append(sum(w[j] * self.v(x[b, j]) for j in range(i + 1)))
            rows.append(torch.stack(outs))
        return self.out(x + torch.stack(rows))


class LoopMLP(nn.Module):
    """Each token of each sample goes through the feed-forward part alone."""

    def __init__(self, vocab=80, d=32):
        super().__init__()
        self.emb, self.ff = nn.Embedding(vocab, d), nn.Sequential(nn.Linear(d, 64), nn.ReLU(), nn.Linear(64, d))
        self.gru, self.fc = nn.GRU(d, d, batch_first=True), nn.Linear(d, 3)

    def forward(self, tokens):
        x = self.emb(tokens)
        y = torch.stack([torch.stack([self.ff(step) for step in sample]) for sample in x])
        return self.fc(self.gru(x + y)[0][:, -1])


LM = {"task": "causal_lm"}
MODE = ("nondeterministic_forward", "dropout_in_eval")
ENTRIES = [
    broken("dropout_in_eval", "functional_default", FunctionalDropout, ("", "fc1", "fc2"), also=MODE[:1]),
    broken("dropout_in_eval", "fused_attention", SdpaDropout, ("", "qkv", "proj"), also=MODE[:1], **LM),
    broken("dropout_in_eval", "module_made_in_forward", DropoutMadeInForward, ("", "c2", "fc"), also=MODE[:1]),
    broken("nondeterministic_forward", "noisy_gate", NoisyGate, ("", "gate"), also=MODE[1:]),
    broken(
        "nondeterministic_forward",
        "vae_samples_with_numpy",
        VAE,
        ("", "mu", "logvar", "dec", "dec.*"),
        task="regression",
    ),
    broken("nondeterministic_forward", "augmentation_inside", RandomCrop, ("", "conv", "conv.*")),
    broken(
        "train_eval_ignored",
        "train_called_in_forward",
        AlwaysTraining,
        ("", "net", "net.*"),
        also=(*MODE, "batch_leakage", "state_across_calls"),
    ),
    broken(
        "train_eval_ignored", "override_without_children", TrainWithoutEffect, ("", "drop"), also=("dropout_in_eval",)
    ),
    broken(
        "train_eval_ignored",
        "batch_norm_always_training",
        NormInTrainingFlag,
        ("", "bn", "fc"),
        also=("batch_leakage", "state_across_calls"),
    ),
    broken("state_across_calls", "hidden_state_survives", KeepsHidden, ("", "rnn", "state"), **LM),
    broken("state_across_calls", "observer_of_peaks", RunningScale, ("", "peak", "a", "b"), also=("batch_leakage",)),
    broken("state_across_calls", "count_of_calls", StepCounter, ("", "steps", "q")),
    broken("input_mutation", "normalised_in_place", NormaliseInPlace, ("", "conv")),
    broken("input_mutation", "first_id_overwritten", IgnoredTokens, ("", "emb")),
    broken("input_mutation", "inplace_activation_first", ReluInPlaceFirst, ("", "net", "net.0")),
    broken("memory_growth", "history_of_features", HistoryOfFeatures, ("", "history", "conv", "fc")),
    broken("memory_growth", "activations_by_call", LossLog, ("", "activations", "gru"), **LM),
    broken(
        "quadratic_memory", "scores_first", LinearPromise, ("", "q", "k", "v", "o"), linear_memory=True, max_length=4096
    ),
    broken(
        "quadratic_memory",
        "kernel_as_matrix",
        ToeplitzSSM,
        ("", "emb", "norm"),
        linear_memory=True,
        max_length=1024,
        **LM,
    ),
    broken("slow_python_loop", "attention_by_hand", LoopAttention, ("", "q", "k", "v"), **LM),
    broken("slow_python_loop", "feed_forward_by_token", LoopMLP, ("", "ff", "ff.*")),
]
