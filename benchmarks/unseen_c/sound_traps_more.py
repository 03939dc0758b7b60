"""Sound models that look like a fault, second part: pictures, tables and others."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import gauss
from benchmarks.zoo.entry import sound


class DiTBlock(nn.Module):
    """The gates start at zero, so each block is the identity at first."""

    def __init__(self, dim, heads=4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.ada = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.ada.weight)
        nn.init.zeros_(self.ada.bias)

    def forward(self, x, c):
        s1, b1, g1, s2, b2, g2 = self.ada(F.silu(c)).unsqueeze(1).chunk(6, -1)
        h = self.norm1(x) * (1 + s1) + b1
        x = x + g1 * self.attn(h, h, h, need_weights=False)[0]
        return x + g2 * self.mlp(self.norm2(x) * (1 + s2) + b2)


class TinyDiT(nn.Module):
    def __init__(self, dim=48, classes=10):
        super().__init__()
        self.dim = dim
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.pos = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.label = nn.Embedding(classes, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(DiTBlock(dim) for _ in range(3))
        self.norm, self.final = nn.LayerNorm(dim), nn.Linear(dim, 48)
        self.time_out = nn.Linear(dim, dim)

    def forward(self, x, t, y):
        freq = torch.exp(-math.log(1e4) * torch.arange(self.dim // 2, device=t.device) / (self.dim // 2))
        angle = t[:, None] * freq
        c = self.time(torch.cat([angle.cos(), angle.sin()], -1).to(self.pos.dtype)) + self.label(y)
        h = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            h = block(h, c)
        h = self.final(self.norm(h + self.time_out(c).unsqueeze(1)))
        return F.fold(h.transpose(1, 2), x.shape[-2:], 4, stride=4)


class SlotAttention(nn.Module):
    """Softmax over the slots, which compete, then a mean over the inputs: as published."""

    def __init__(self, dim=32, slots=4, rounds=3):
        super().__init__()
        self.rounds = rounds
        self.slots = nn.Parameter(torch.randn(1, slots, dim))
        self.norm_in, self.norm_slot = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)

    def forward(self, x):
        x = self.norm_in(x)
        k, v = self.k(x), self.v(x)
        slots = self.slots.expand(x.shape[0], -1, -1)
        for _ in range(self.rounds):
            scores = self.q(self.norm_slot(slots)) @ k.transpose(1, 2) * k.shape[-1] ** -0.5
            weights = scores.softmax(dim=1) + 1e-4
            update = (weights / weights.sum(-1, keepdim=True)) @ v
            slots = self.gru(update.flatten(0, 1), slots.reshape(-1, slots.shape[-1])).view_as(slots)
        return slots


class SlotClassifier(nn.Module):
    def __init__(self, classes=6):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 32, 5, 2, 2), nn.ReLU())
        self.place = nn.Parameter(torch.randn(1, 32, 8, 8) * 0.1)
        self.slots = SlotAttention()
        self.fc = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, x):
        x = (self.conv(x) + self.place).flatten(2).transpose(1, 2)
        return self.fc(self.slots(x)).mean(1)


class StraightThroughVQ(nn.Module):
    """The nearest code on a sphere, with the gradient passed straight through, and both losses."""

    def __init__(self, codes=32, dim=16):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 24, 4, 2, 1), nn.ReLU(), nn.Conv2d(24, dim, 4, 2, 1))
        self.codebook = nn.Embedding(codes, dim)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(dim, 24, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(24, 1, 4, 2, 1)
        )

    def forward(self, x):
        z = F.normalize(self.encoder(x).permute(0, 2, 3, 1), dim=-1)
        codes = F.normalize(self.codebook.weight, dim=-1)
        q = F.embedding((z @ codes.T).argmax(-1), codes)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        q = z + (q - z).detach()
        y = self.decoder(q.permute(0, 3, 1, 2))
        return {"loss": loss + F.mse_loss(y, x), "reconstruction": y}


class MomentumPair(nn.Module):
    """The target network is a frozen copy, moved by hand; the projection of it is detached on purpose."""

    def __init__(self, features=24, dim=32):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(features, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, dim))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, dim))

    def forward(self, view1, view2):
        p = F.normalize(self.predictor(self.online(view1)), dim=-1)
        with torch.no_grad():
            z = F.normalize(self.target(view2), dim=-1)
        return {"loss": 2 - 2 * (p * z).sum(-1).mean(), "prediction": p}


class ConvPositionViT(nn.Module):
    """Positions come from a depthwise convolution with zero padding."""

    def __init__(self, dim=48, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.peg = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 96, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, images):
        x = self.patch(images)
        x = x + self.peg(x)
        return self.head(self.body(x.flatten(2).transpose(1, 2)).mean(1))


class SetNet(nn.Module):
    """A set has no order, and this model has none on purpose."""

    def __init__(self, coords=3, width=64):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(coords, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.rho = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, points):
        h = self.phi(points)
        return self.rho(torch.cat([h.mean(1), h.amax(1)], -1)).squeeze(-1)


class SampledInTraining(nn.Module):
    """Noise while training only."""

    def __init__(self, features=30, latent=6):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(features, 64), nn.ReLU())
        self.mu, self.logvar = nn.Linear(64, latent), nn.Linear(64, latent)
        self.dec = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, features))

    def forward(self, x):
        h = self.enc(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp() if self.training else mu
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()
        return self.dec(z), kl


class SineLayer(nn.Module):
    def __init__(self, n_in, n_out, omega=30.0, first=False):
        super().__init__()
        self.omega, self.linear = omega, nn.Linear(n_in, n_out)
        bound = 1 / n_in if first else math.sqrt(6 / n_in) / omega
        nn.init.uniform_(self.linear.weight, -bound, bound)
        nn.init.uniform_(self.linear.bias, -bound, bound)

    def forward(self, x):
        return torch.sin(self.omega * self.linear(x))


class Siren(nn.Module):
    """Frequencies of 30, with the initialization that belongs to them."""

    def __init__(self, width=64, depth=3):
        super().__init__()
        self.net = nn.Sequential(SineLayer(2, width, first=True), *[SineLayer(width, width) for _ in range(depth)])
        self.rgb = nn.Linear(width, 3)

    def forward(self, coords):
        return self.rgb(self.net(coords))


class ConvNeXtBlock(nn.Module):
    """Layer scale starts at 1e-6, so the branch is all but silent at first."""

    def __init__(self, dim):
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.pw1, self.pw2 = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x):
        h = self.norm(self.dw(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pw2(F.gelu(self.pw1(h)))).permute(0, 3, 1, 2)


class MiniConvNeXt(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.stage1 = nn.Sequential(ConvNeXtBlock(32), ConvNeXtBlock(32))
        self.down = nn.Conv2d(32, 64, 2, 2)
        self.stage2 = nn.Sequential(ConvNeXtBlock(64), ConvNeXtBlock(64))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean((2, 3))))


class RevIN(nn.Module):
    """Each series loses its own mean and gets it back: nothing passes between samples."""

    def __init__(self, channels=3, length=48, horizon=12):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.net = nn.Sequential(nn.Linear(length, 64), nn.ReLU(), nn.Linear(64, horizon))

    def forward(self, past):
        mean = past.mean(1, keepdim=True)
        std = (past.var(1, keepdim=True, unbiased=False) + 1e-4).sqrt()
        x = (past - mean) / std * self.gain + self.shift
        y = self.net(x.transpose(1, 2)).transpose(1, 2)
        return (y - self.shift) / self.gain * std + mean


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()) ** 2


class Spiking(nn.Module):
    """A step forward and a smooth slope backward, with a state that lives in one call only."""

    def __init__(self, n_in=16, hidden=64, classes=4, steps=4):
        super().__init__()
        self.fc1, self.fc2, self.steps = nn.Linear(n_in, hidden), nn.Linear(hidden, classes), steps

    def forward(self, x):
        current = self.fc1(x)
        level, total = torch.zeros_like(current), 0
        for _ in range(self.steps):
            level = 0.9 * level + current
            spikes = Surrogate.apply(level - 0.5)
            level = level - spikes * 0.5
            total = total + self.fc2(spikes)
        return total / self.steps


ENTRIES = [
    sound(
        "diffusion transformer with zero gates",
        TinyDiT,
        example_inputs={"x": gauss(2, 3, 16, 16), "t": torch.tensor([3.0, 700.0]), "y": torch.tensor([1, 7])},
    ),
    sound("softmax over slots", SlotClassifier),
    sound("codes with straight-through", StraightThroughVQ, example_inputs={"x": gauss(2, 1, 28, 28)}),
    sound(
        "momentum target",
        MomentumPair,
        frozen=("target",),
        example_inputs={"view1": gauss(4, 24), "view2": gauss(4, 24, seed=5)},
    ),
    sound("positions from a convolution", ConvPositionViT),
    sound("set without order", SetNet, task="regression", example_inputs={"points": gauss(3, 20, 3)}),
    sound("samples in training only", SampledInTraining),
    sound("sine layers", Siren, task="regression", example_inputs={"coords": gauss(16, 2).tanh()}),
    sound("layer scale of a millionth", MiniConvNeXt),
    sound("series normalised by itself", RevIN, task="regression", example_inputs={"past": gauss(3, 48, 3)}),
    sound("spikes with a surrogate", Spiking),
]
