"""Sound models of tables, pairs, series and graphs."""
# ruff: noqa: D102

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeepFm(nn.Module):
    """Click prediction from two categories and some numbers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.user, self.ad = nn.Embedding(60, width), nn.Embedding(60, width)
        self.dense = nn.Linear(6, width)
        self.linear = nn.Linear(6, 1)
        self.deep = nn.Sequential(nn.Linear(3 * width, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def fields(self, user_id: Tensor, ad_id: Tensor, numbers: Tensor) -> Tensor:
        return torch.stack((self.user(user_id), self.ad(ad_id), self.dense(numbers)), 1)

    def forward(self, user_id: Tensor, ad_id: Tensor, numbers: Tensor) -> Tensor:
        f = self.fields(user_id, ad_id, numbers)
        pairs = 0.5 * (f.sum(1).pow(2) - f.pow(2).sum(1)).mean(-1, keepdim=True)
        return (pairs + self.deep(f.flatten(1)) + self.linear(numbers)).squeeze(-1)


class TwoTower(nn.Module):
    """Query and document towers and their match."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, width))
        self.document = nn.Sequential(nn.Linear(14, 48), nn.ReLU(), nn.Linear(48, width))
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def towers(self, query: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.query(query), dim=-1), F.normalize(self.document(document), dim=-1)

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        a, b = self.towers(query, document)
        return (a * b).sum(-1) * self.temperature.exp()


class Tabular(nn.Module):
    """Plain net on a table of numbers."""

    def __init__(self, cin: int = 20, width: int = 64, labels: int = 4) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(cin, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, labels)

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(self.prepare(x)))
        h = F.relu(self.fc2(h))
        h = F.relu(self.fc3(h))
        return self.out(h)


class FeatureTokens(nn.Module):
    """Transformer over the columns of a table."""

    def __init__(self, columns: int = 9, width: int = 24, labels: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, width) * 0.5)
        self.bias = nn.Parameter(torch.randn(columns, width) * 0.5)
        self.cls = nn.Parameter(torch.randn(width) * 0.5)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 3, 48, 0.1, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, labels))

    def forward(self, table: Tensor) -> Tensor:
        x = table.unsqueeze(-1) * self.weight + self.bias
        x = torch.cat((self.cls.expand(x.shape[0], 1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Forecaster(nn.Module):
    """Recurrent cell by hand over a series; predicts the next value of each channel."""

    def __init__(self, channels: int = 5, width: int = 24) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.GRUCell(channels, width)
        self.read = nn.Linear(width, channels)

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.width)

    def forward(self, series: Tensor) -> Tensor:
        h = self.start(series)
        for step in series.unbind(1):
            h = self.cell(step, h)
        return self.read(h)


class StateSpace(nn.Module):
    """Diagonal state space as a convolution by FFT over a feature series, many to one."""

    def __init__(self, channels: int = 8, width: int = 24, labels: int = 4) -> None:
        super().__init__()
        self.inp = nn.Linear(channels, width)
        self.log_decay = nn.Parameter(torch.linspace(-4, 0, width))
        self.b, self.skip = nn.Parameter(torch.ones(width) * 0.3), nn.Parameter(torch.ones(width))
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, labels)

    def scan(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        kernel = torch.exp(-self.log_decay.float().exp() * t[:, None]) * self.b.float()
        n = 2 * x.shape[1]
        y = torch.fft.irfft(torch.fft.rfft(x.float(), n, dim=1) * torch.fft.rfft(kernel, n, dim=0), n, dim=1)
        return y[:, : x.shape[1]].to(x.dtype)

    def forward(self, signal: Tensor) -> Tensor:
        x = self.inp(signal)
        h = self.norm(x)
        x = x + F.glu(self.mix(F.gelu(self.scan(h) + self.skip * h)))
        return self.head(x[:, -1])


class GraphNet(nn.Module):
    """Messages along a weighted adjacency; a value per node."""

    def __init__(self, features: int = 7, width: int = 24) -> None:
        super().__init__()
        self.lift = nn.Linear(features, width)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.near = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, 1)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        a = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1e-3)
        x = torch.relu(self.lift(nodes))
        for own, near in zip(self.own, self.near, strict=True):
            x = x + torch.relu(own(x) + a @ near(x))
        return self.out(x).squeeze(-1)


class Experts(nn.Module):
    """Two of four experts for every row."""

    def __init__(self, cin: int = 16, width: int = 32, experts: int = 4, labels: int = 3) -> None:
        super().__init__()
        self.inp = nn.Linear(cin, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, labels)

    def forward(self, rows: Tensor) -> Tensor:
        x = torch.tanh(self.inp(rows))
        top, chosen = self.router(x).topk(2, -1)
        share = torch.zeros_like(self.router(x)).scatter(-1, chosen, top.softmax(-1))
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y = y + share[:, i : i + 1] * expert(x)
        return self.head(x + y)
