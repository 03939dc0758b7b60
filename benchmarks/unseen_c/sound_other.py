"""Sound models of tables, graphs, series, sound, policies and flows, as people write them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, adjacency, gauss, token_ids
from benchmarks.zoo.entry import sound


class FTTransformer(nn.Module):
    """Each number and each category becomes a token."""

    def __init__(self, n_num=6, cards=(5, 9, 12), dim=32, n_out=2):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(n_num, dim) * 0.2),
            nn.Parameter(torch.randn(n_num, dim) * 0.2),
        )
        self.cats = nn.ModuleList(nn.Embedding(card, dim) for card in cards)
        for table in self.cats:
            nn.init.normal_(table.weight, std=0.2)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.2)
        self.blocks = nn.Sequential(Block(dim, 4), Block(dim, 4))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, n_out))

    def forward(self, x_num, x_cat):
        tokens = [self.cls.expand(x_num.shape[0], -1, -1), x_num.unsqueeze(-1) * self.weight + self.bias]
        tokens += [table(x_cat[:, i : i + 1]) for i, table in enumerate(self.cats)]
        return self.head(self.blocks(torch.cat(tokens, 1))[:, 0])


class TabularMLP(nn.Module):
    def __init__(self, n_in=25, hidden=(96, 48), n_out=3, p=0.2):
        super().__init__()
        layers, width = [], n_in
        for h in hidden:
            layers += [nn.Linear(width, h), nn.BatchNorm1d(h), nn.ReLU(), nn.Dropout(p)]
            width = h
        self.layers = nn.Sequential(*layers, nn.Linear(width, n_out))

    def forward(self, x):
        return self.layers(x)


class DeepFM(nn.Module):
    def __init__(self, fields=8, ids=60, k=8):
        super().__init__()
        self.linear, self.factors = nn.Embedding(ids, 1), nn.Embedding(ids, k)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.normal_(self.factors.weight, std=0.1)
        self.bias = nn.Parameter(torch.zeros(1))
        self.deep = nn.Sequential(nn.Linear(fields * k, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, features):
        v = self.factors(features)
        pairs = 0.5 * (v.sum(1).pow(2) - v.pow(2).sum(1)).sum(-1, keepdim=True)
        return self.bias + self.linear(features).sum(1) + pairs + self.deep(v.flatten(1))


class NeuralCF(nn.Module):
    def __init__(self, users=80, items=70, dim=16):
        super().__init__()
        self.user_gmf, self.item_gmf = nn.Embedding(users, dim), nn.Embedding(items, dim)
        self.user_mlp, self.item_mlp = nn.Embedding(users, dim), nn.Embedding(items, dim)
        for table in (self.user_gmf, self.item_gmf, self.user_mlp, self.item_mlp):
            nn.init.normal_(table.weight, std=0.3)
        self.mlp = nn.Sequential(nn.Linear(2 * dim, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.predict = nn.Linear(dim + 16, 1)

    def forward(self, user_id, item_id):
        g = self.user_gmf(user_id) * self.item_gmf(item_id)
        m = self.mlp(torch.cat([self.user_mlp(user_id), self.item_mlp(item_id)], -1))
        return self.predict(torch.cat([g, m], -1)).squeeze(-1)


class DenseGCN(nn.Module):
    def __init__(self, features=8, hidden=48, classes=4):
        super().__init__()
        self.w1, self.w2 = nn.Linear(features, hidden), nn.Linear(hidden, classes)

    def forward(self, x, adj):
        adj = adj + torch.eye(adj.shape[-1], device=adj.device, dtype=adj.dtype)
        scale = adj.sum(-1).clamp(min=1).rsqrt()
        adj = scale.unsqueeze(-1) * adj * scale.unsqueeze(-2)
        return adj @ self.w2(F.relu(adj @ self.w1(x)))


class DenseGAT(nn.Module):
    def __init__(self, features=8, hidden=48, heads=4, targets=1):
        super().__init__()
        self.heads = heads
        self.lin = nn.Linear(features, hidden)
        self.src, self.dst = (
            nn.Parameter(torch.randn(heads, hidden // heads) * 0.3),
            nn.Parameter(torch.randn(heads, hidden // heads) * 0.3),
        )
        self.readout = nn.Sequential(nn.Linear(hidden, 32), nn.ReLU(), nn.Linear(32, targets))

    def forward(self, nodes, adj):
        b, n, _ = nodes.shape
        h = self.lin(nodes).view(b, n, self.heads, -1)
        scores = (h * self.dst).sum(-1).unsqueeze(2) + (h * self.src).sum(-1).unsqueeze(1)
        eye = torch.eye(n, device=adj.device, dtype=torch.bool)
        linked = ((adj > 0) | eye).unsqueeze(-1)
        weights = F.leaky_relu(scores, 0.2).masked_fill(~linked, torch.finfo(scores.dtype).min).softmax(2)
        h = F.elu(torch.einsum("bijh,bjhd->bihd", weights, h).flatten(2))
        return self.readout(h.mean(1))


class AffineCoupling(nn.Module):
    def __init__(self, dim, flip, width=48):
        super().__init__()
        self.flip = flip
        self.net = nn.Sequential(nn.Linear(dim // 2, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, x):
        a, b = x.chunk(2, -1)
        if self.flip:
            a, b = b, a
        log_s, shift = self.net(a).chunk(2, -1)
        log_s = torch.tanh(log_s)
        b = b * log_s.exp() + shift
        return torch.cat((b, a) if self.flip else (a, b), -1), log_s.sum(-1)


class Flow(nn.Module):
    def __init__(self, dim=6, steps=4):
        super().__init__()
        self.steps = nn.ModuleList(AffineCoupling(dim, i % 2 == 1) for i in range(steps))

    def forward(self, x):
        log_det = 0.0
        for step in self.steps:
            x, part = step(x)
            log_det = log_det + part
        return x, log_det


class ActorCritic(nn.Module):
    def __init__(self, obs_dim=8, n_actions=4, hidden=64):
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(obs_dim, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.actor, self.critic = nn.Linear(hidden, n_actions), nn.Linear(hidden, 1)
        for layer, gain in ((self.shared[0], 2**0.5), (self.shared[2], 2**0.5), (self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, obs):
        h = self.shared(obs)
        return self.actor(h), self.critic(h).squeeze(-1)


class GaussianOut(NamedTuple):
    mean: torch.Tensor
    log_std: torch.Tensor


class SacActor(nn.Module):
    def __init__(self, obs=11, act=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(obs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.mean, self.log_std = nn.Linear(64, act), nn.Linear(64, act)

    def forward(self, obs):
        h = self.net(obs)
        return GaussianOut(self.mean(h), -5 + 3.5 * (torch.tanh(self.log_std(h)) + 1))


class KanLayer(nn.Module):
    """A spline-like layer: radial bumps on a grid beside a base of SiLU."""

    def __init__(self, n_in, n_out, grid=6):
        super().__init__()
        self.register_buffer("centres", torch.linspace(-2, 2, grid))
        self.base = nn.Linear(n_in, n_out)
        self.spline = nn.Linear(n_in * grid, n_out, bias=False)

    def forward(self, x):
        bumps = torch.exp(-(((x.unsqueeze(-1) - self.centres) / 0.8) ** 2))
        return self.base(F.silu(x)) + self.spline(bumps.flatten(-2))


def kan() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 16), KanLayer(16, 16), nn.LayerNorm(16), KanLayer(16, 2))


class SpectrogramCNN(nn.Module):
    def __init__(self, n_mels=32, classes=12):
        super().__init__()
        self.bn = nn.BatchNorm1d(n_mels)
        self.conv = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, 1, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.fc = nn.Linear(32, classes)

    def forward(self, mel):
        x = self.conv(self.bn(mel).unsqueeze(1))
        return self.fc(x.mean(2).amax(-1))


class RawWave(nn.Module):
    def __init__(self, classes=6):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(1, 24, 32, 8, 12), nn.BatchNorm1d(24)
        self.conv2, self.bn2 = nn.Conv1d(24, 48, 3, 2, 1), nn.BatchNorm1d(48)
        self.fc = nn.Linear(48, classes)

    def forward(self, wave):
        x = F.relu(self.bn1(self.conv1(wave)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean(-1))


class SeasonTrend(nn.Module):
    """DLinear: a moving average and what is left of it."""

    def __init__(self, length=48, horizon=12, kernel=9):
        super().__init__()
        self.kernel = kernel
        self.season, self.trend = nn.Linear(length, horizon), nn.Linear(length, horizon)

    def forward(self, x):
        x = x.transpose(1, 2)
        side = self.kernel // 2
        trend = F.avg_pool1d(F.pad(x, (side, side), mode="replicate"), self.kernel, 1)
        return (self.season(x - trend) + self.trend(trend)).transpose(1, 2)


class NBeats(nn.Module):
    def __init__(self, back=24, ahead=6, width=48, blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(back, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for _ in range(blocks)
        )
        self.theta_b = nn.ModuleList(nn.Linear(width, back) for _ in range(blocks - 1))
        self.theta_f = nn.ModuleList(nn.Linear(width, ahead) for _ in range(blocks))

    def forward(self, series):
        total = 0.0
        for i, block in enumerate(self.blocks):
            h = block(series)
            total = total + self.theta_f[i](h)
            if i < len(self.theta_b):
                series = series - self.theta_b[i](h)
        return total


class SeriesLSTM(nn.Module):
    def __init__(self, channels=5, hidden=48):
        super().__init__()
        self.lstm = nn.LSTM(channels, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x):
        _, (h, _) = self.lstm(x)
        return self.head(h[-1])


class RadianceField(nn.Module):
    def __init__(self, width=64, bands=4):
        super().__init__()
        self.register_buffer("bands", 2.0 ** torch.arange(bands))
        n = 3 * 2 * bands + 3
        self.l1, self.l2, self.l3 = nn.Linear(n, width), nn.Linear(width, width), nn.Linear(width + n, width)
        self.sigma, self.rgb = nn.Linear(width, 1), nn.Linear(width, 3)

    def forward(self, xyz):
        angle = (xyz.unsqueeze(-1) * self.bands).flatten(-2)
        e = torch.cat([xyz, angle.sin(), angle.cos()], -1)
        h = F.relu(self.l2(F.relu(self.l1(e))))
        h = F.relu(self.l3(torch.cat([h, e], -1)))
        return {"density": F.softplus(self.sigma(h)), "color": torch.sigmoid(self.rgb(h))}


class MixtureOfExperts(nn.Module):
    def __init__(self, n_in=20, dim=48, n_experts=4, n_out=5):
        super().__init__()
        self.gate = nn.Linear(n_in, n_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(n_in, dim), nn.ReLU(), nn.Linear(dim, n_out)) for _ in range(n_experts)
        )

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        return torch.einsum("be,beo->bo", weights, torch.stack([e(x) for e in self.experts], 1))


class Denoising(nn.Module):
    def __init__(self, features=40, code=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, 64), nn.GELU(), nn.Linear(64, code))
        self.decoder = nn.Sequential(nn.Linear(code, 64), nn.GELU(), nn.Linear(64, features))

    def forward(self, x):
        noisy = x + 0.1 * torch.randn_like(x) if self.training else x
        return self.decoder(self.encoder(noisy))


NODES = {"adj": adjacency(2, 9)}
ENTRIES = [
    sound(
        "numbers and categories as tokens",
        FTTransformer,
        example_inputs={"x_num": gauss(4, 6), "x_cat": token_ids(4, 3, low=0, high=5)},
    ),
    sound("batch-normed table", TabularMLP),
    sound("factorization machine", DeepFM, example_inputs={"features": token_ids(4, 8, low=0)}),
    sound("collaborative filter", NeuralCF, example_inputs={"user_id": token_ids(6), "item_id": token_ids(6, seed=5)}),
    sound("graph convolution", DenseGCN, example_inputs={"x": gauss(2, 9, 8), **NODES}),
    sound("graph attention", DenseGAT, task="regression", example_inputs={"nodes": gauss(2, 9, 8), **NODES}),
    sound("coupling flow", Flow, example_inputs={"x": gauss(5, 6)}),
    sound("actor and critic", ActorCritic, example_inputs={"obs": gauss(5, 8)}),
    sound("gaussian actor", SacActor, example_inputs={"obs": gauss(5, 11)}),
    sound("radial splines", kan),
    sound("spectrogram", SpectrogramCNN, example_inputs={"mel": gauss(2, 32, 40)}),
    sound("raw wave", RawWave, example_inputs={"wave": gauss(2, 1, 512)}),
    sound("season and trend", SeasonTrend, task="regression", example_inputs={"x": gauss(3, 48, 3)}),
    sound("doubly residual forecast", NBeats, task="regression"),
    sound("recurrent regression", SeriesLSTM, task="regression"),
    sound("radiance field", RadianceField, task="regression", example_inputs={"xyz": gauss(16, 3).tanh()}),
    sound("mixture of experts", MixtureOfExperts),
    sound("denoising autoencoder", Denoising, example_inputs={"x": gauss(4, 40)}),
]
