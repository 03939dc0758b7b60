"""Sound models of images and signals."""
# ruff: noqa: D102

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResUnit(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, cin: int, cout: int, stride: int = 1, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = norm(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = norm(cout)
        self.down = nn.Conv2d(cin, cout, 1, stride, bias=False) if stride > 1 or cin != cout else nn.Identity()

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(y + self.down(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """Small residual net."""

    def __init__(self, unit: Any = ResUnit, labels: int = 10, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU())
        self.stage1 = nn.Sequential(unit(16, 16, norm=norm), unit(16, 16, norm=norm))
        self.stage2 = nn.Sequential(unit(16, 32, 2, norm=norm), unit(32, 32, norm=norm))
        self.fc = nn.Linear(32, labels)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.fc(self.pool(self.stage2(self.stage1(self.stem(pixels)))))


def bottleneck(cin: int, cout: int, stride: int) -> nn.Sequential:
    """Return an inverted bottleneck."""
    mid = cin * 3
    return nn.Sequential(
        nn.Conv2d(cin, mid, 1, bias=False),
        nn.BatchNorm2d(mid),
        nn.ReLU6(),
        nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False),
        nn.BatchNorm2d(mid),
        nn.ReLU6(),
        nn.Conv2d(mid, cout, 1, bias=False),
        nn.BatchNorm2d(cout),
    )


class Mobile(nn.Module):
    """Depthwise separable net with inverted bottlenecks."""

    def __init__(self, labels: int = 8) -> None:
        super().__init__()
        self.features = nn.ModuleList([bottleneck(16, 16, 1), bottleneck(16, 24, 2), bottleneck(24, 24, 1)])
        self.entry = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, labels))

    def flat(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.entry(image)
        for block in self.features:
            y = block(x)
            x = x + y if x.shape == y.shape else y
        return self.classifier(self.flat(x))


class Vit(nn.Module):
    """Vision transformer with a class token."""

    def __init__(self, width: int = 32, depth: int = 3, labels: int = 10, size: int = 32, patch: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.attns = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, labels)

    def tokens(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        return torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.pos

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        x = self.tokens(pixel_values)
        for i, (attn, mlp) in enumerate(zip(self.attns, self.mlps, strict=True)):
            h = self.norms[2 * i](x)
            x = x + attn(h, h, h)[0]
            x = x + mlp(self.norms[2 * i + 1](x))
        x = self.norms[-1](x)
        return {"logits": self.head(x[:, 0]), "last_hidden_state": x}


class Mixer(nn.Module):
    """MLP-mixer in parameter matrices."""

    def __init__(self, width: int = 24, depth: int = 3, labels: int = 10) -> None:
        super().__init__()
        self.width, self.depth, patches = width, depth, 64
        self.embed = nn.Conv2d(3, width, 4, 4)

        def matrices(a: int, b: int) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.randn(a, b) * a**-0.5) for _ in range(depth))

        self.time_in, self.time_out = matrices(patches, 48), matrices(48, patches)
        self.chan_in, self.chan_out = matrices(width, 48), matrices(48, width)
        self.ln = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.head = nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i in range(self.depth):
            x = x + (F.gelu(self.ln[2 * i](x).mT @ self.time_in[i]) @ self.time_out[i]).mT
            x = x + F.gelu(self.ln[2 * i + 1](x) @ self.chan_in[i]) @ self.chan_out[i]
        return self.head(self.ln[-1](x).mean(1))


class Unet(nn.Module):
    """Two levels down and up, a mask of the image's size comes out."""

    def __init__(self, cin: int = 3, base: int = 12, classes: int = 2) -> None:
        super().__init__()

        def double(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1), nn.SiLU()
            )

        self.enc1, self.enc2, self.mid = double(cin, base), double(base, 2 * base), double(2 * base, 2 * base)
        self.dec2, self.dec1 = double(4 * base, base), double(2 * base, base)
        self.last = nn.Conv2d(base, classes, 1)

    def grow(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[-2:], mode="nearest")

    def forward(self, image: Tensor) -> Tensor:
        a = self.enc1(image)
        b = self.enc2(F.max_pool2d(a, 2))
        c = self.mid(F.max_pool2d(b, 2))
        b = self.dec2(torch.cat((self.grow(c, b), b), 1))
        return self.last(self.dec1(torch.cat((self.grow(b, a), a), 1)))


class Denoiser(nn.Module):
    """Predicts the noise in an image at a time step."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.inp = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(3))
        self.out = nn.Conv2d(width, 1, 3, padding=1)

    def clock(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(1000.0) * torch.arange(8, device=t.device) / 8)
        angles = t.float()[:, None] * rates
        return torch.cat((angles.sin(), angles.cos()), -1).to(self.out.weight.dtype)

    def modulate(self, h: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.time(self.clock(t)).chunk(2, -1)
        return h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        x = self.inp(noisy)
        for conv, norm in zip(self.body, self.norms, strict=True):
            x = x + conv(F.silu(self.modulate(norm(x), t)))
        return self.out(F.silu(x))


class Generator(nn.Module):
    """Turns a code into a picture."""

    def __init__(self, code: int = 20, base: int = 16) -> None:
        super().__init__()
        self.base = base
        self.start = nn.Linear(code, 4 * base * 16)
        self.up1 = nn.ConvTranspose2d(4 * base, 2 * base, 4, 2, 1)
        self.up2 = nn.ConvTranspose2d(2 * base, base, 4, 2, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(2 * base), nn.BatchNorm2d(base)
        self.rgb = nn.Conv2d(base, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.start(z).view(-1, 4 * self.base, 4, 4)
        x = F.leaky_relu(self.bn1(self.up1(x)), 0.2)
        x = F.leaky_relu(self.bn2(self.up2(x)), 0.2)
        return torch.tanh(self.rgb(x))


class Spectrogram(nn.Module):
    """Speech commands from the waveform, through a short-time Fourier transform."""

    def __init__(self, labels: int = 7) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.c1, self.c2 = nn.Conv2d(1, 12, 3, 2, 1), nn.Conv2d(12, 24, 3, 2, 1)
        self.b1, self.b2 = nn.BatchNorm2d(12), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, labels)

    def picture(self, wave: Tensor) -> Tensor:
        parts = torch.stft(wave.float(), 64, 32, window=self.window.float(), return_complex=True)
        return torch.log(parts.abs().pow(2) + 1e-3)[:, None].to(self.fc.weight.dtype)

    def forward(self, waveform: Tensor) -> Tensor:
        x = F.relu(self.b1(self.c1(self.picture(waveform))))
        return self.fc(F.relu(self.b2(self.c2(x))).mean((2, 3)))


class Capsules(nn.Module):
    """Capsules with two rounds of routing; class scores are lengths."""

    def __init__(self, labels: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 5, 2)
        self.primary = nn.Conv2d(16, 32, 5, 2)
        self.w = nn.Parameter(torch.randn(4 * 16, labels, 8, 8) * 0.3)

    def squash(self, s: Tensor) -> Tensor:
        n2 = s.pow(2).sum(-1, keepdim=True)
        return n2 / (1 + n2) * s / torch.sqrt(n2 + 1e-6)

    def agree(self, logits: Tensor) -> Tensor:
        return logits.softmax(2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.primary(F.relu(self.conv(image)))
        u = self.squash(x.unflatten(1, (4, 8)).flatten(3).permute(0, 1, 3, 2).flatten(1, 2))
        votes = torch.einsum("bnd,nlde->bnle", u, self.w)
        logits = votes.new_zeros(*votes.shape[:3])
        for _ in range(2):
            v = self.squash((self.agree(logits)[..., None] * votes).sum(1))
            logits = logits + torch.einsum("bnle,ble->bnl", votes, v)
        return torch.sqrt(v.pow(2).sum(-1) + 1e-6)
