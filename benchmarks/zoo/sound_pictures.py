"""Sound models of pictures, sound and tables."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.zoo.entry import sound
from benchmarks.zoo.families import Mlp, ResNet, Tabular, Vit, table_example
from benchmarks.zoo.parts import FusedBidirectional


class Vgg(nn.Module):
    """Plain convolutions without skips, drawn after He et al. 2015."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 16, 32, 32)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.fc = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc[3].weight, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        for number, conv in enumerate(self.convs):
            x = F.relu(conv(x))
            if number % 2:
                x = F.max_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))


def lenet() -> nn.Module:
    """The classic for digits."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


class ZeroLast(nn.Module):
    """A residual block whose last norm starts at zero (Goyal et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Inverted(nn.Module):
    """Depthwise block with squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.SiLU())
        self.depth = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.squeeze = nn.Sequential(nn.Conv2d(2 * width, 8, 1), nn.SiLU(), nn.Conv2d(8, 2 * width, 1), nn.Sigmoid())
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        return x + self.project(y * self.squeeze(y.mean((2, 3), keepdim=True)))


class GroupNormBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class StochasticDepth(GroupNormBlock):
    """Skips itself at random in training only."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) - x
        if not self.training:
            return x + y
        keep = (torch.rand(x.shape[0], 1, 1, 1, device=x.device) > 0.2).to(x.dtype)
        return x + y * keep / 0.8


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 4, stride=2, padding=1)
        self.norm = nn.InstanceNorm2d(32, affine=True)
        self.up, self.out = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = F.relu(self.inlet(x))
        low = F.relu(self.norm(self.down(top)))
        return self.out(torch.cat((top, F.relu(self.up(low))), 1))


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 5, padding=2), nn.Tanh(), nn.Conv2d(24, 12, 3, padding=1))
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.body(x))


class MixerLayer(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.along = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm2(x))


class Mixer(nn.Module):
    """MLP mixer, whose head starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, stride=8)
        self.layers = nn.Sequential(*(MixerLayer(16, 48) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 30))

    def forward(self, x: Tensor) -> Any:
        code = self.encoder(x)
        return self.decoder(code), code


class Variational(nn.Module):
    """Samples in training, returns the mean at inference."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 12))
        self.decoder = nn.Linear(6, 30)

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.encoder(x).chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + noise * (0.5 * spread).exp())


class Regressor(nn.Module):
    """One number per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


class DeepMlp(nn.Module):
    """Ten plain layers, drawn after He."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(20, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(10))
        self.head = nn.Linear(64, 5)
        for layer in (self.inlet, *self.layers):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inlet(x))
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


class SelfNormalising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(6))
        self.head = nn.Linear(24, 3)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=24**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.selu(layer(x))
        return self.head(x)


class GatedTable(nn.Module):
    """Highway layers over a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(18)
        self.gates, self.values = (nn.ModuleList(nn.Linear(18, 18) for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for gate, value in zip(self.gates, self.values, strict=True):
            share = torch.sigmoid(gate(x) - 1)
            x = share * F.relu(value(x)) + (1 - share) * x
        return self.head(x)


class Frames(nn.Module):
    """Audio frames to a class by a GRU and attention pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(20, 32, batch_first=True, bidirectional=True)
        self.score, self.head = nn.Linear(64, 1), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(x)
        return self.head((x * self.score(x).softmax(1)).sum(1))


class AudioConv(nn.Module):
    """Mel bins to a class."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(40, 48, 5, stride=2, padding=2), nn.BatchNorm1d(48), nn.ReLU(),
            nn.Conv1d(48, 48, 5, stride=2, padding=2), nn.BatchNorm1d(48), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        return self.fc(torch.cat((x.mean(2), x.std(2, unbiased=False)), 1))


class WaveNet(nn.Module):
    """Gated causal convolutions with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(8, 24, 1)
        self.gated = nn.ModuleList(nn.Conv1d(24, 48, 2, dilation=2**i) for i in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(24, 24, 1) for _ in range(4))
        self.out = nn.Conv1d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inlet(x), 0.0
        for level, (conv, skip) in enumerate(zip(self.gated, self.skips, strict=True)):
            a, b = conv(F.pad(x, (2**level, 0))).chunk(2, 1)
            y = skip(torch.tanh(a) * torch.sigmoid(b))
            x, total = x + y, total + y
        return self.out(F.relu(total))


class WeightNormed(nn.Module):
    """Temporal convolutions with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        convs = (nn.Conv1d(6 if i == 0 else 24, 24, 3, padding=2**i, dilation=2**i) for i in range(3))
        self.convs = nn.ModuleList(parametrizations.weight_norm(conv) for conv in convs)
        self.fc = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.fc(x.mean(2))


class Critic(nn.Module):
    """A discriminator with spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            parametrizations.spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in ((3, 16), (16, 32))
        )
        self.out = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        return self.out(x.mean((2, 3)))


class Forecast(nn.Module):
    """An LSTM over a series, the last state forecasts."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(7, 24, batch_first=True), nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


ENTRIES = [
    sound("vit", Vit), sound("vit, fused", lambda: Vit(FusedBidirectional)), sound("resnet", ResNet), sound("vgg", Vgg),
    sound("resnet, last norm zero", lambda: ResNet(ZeroLast)), sound("inverted blocks", lambda: ResNet(Inverted)),
    sound("group norm", lambda: ResNet(GroupNormBlock)), sound("stochastic depth", lambda: ResNet(StochasticDepth)),
    sound("lenet", lenet), sound("u-net", UNet, task="regression"),
    sound("super resolution", SuperResolution, task="regression"), sound("mixer", Mixer),
    sound("critic", Critic, task="regression"),
    sound("mlp", Mlp), sound("deep mlp", DeepMlp), sound("selu", SelfNormalising), sound("highway", GatedTable),
    sound("tabular", Tabular, example_inputs=table_example()), sound("regressor", Regressor, task="regression"),
    sound("autoencoder", Autoencoder, task="regression"), sound("variational", Variational, task="regression"),
    sound("audio frames", Frames, task="audio_classification"),
    sound("audio convolutions", AudioConv, task="audio_classification"),
    sound("wavenet", WaveNet, task="regression"), sound("weight norm", WeightNormed), sound("forecast", Forecast, task="regression"),
]  # fmt: skip
