"""Sound models of images, rows and signals that look as if something were wrong."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from benchmarks.zoo.entry import sound


def conv_bn(i, o, stride=1, k=3):
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class FrozenBackbone(nn.Module):
    """Transfer learning: all of the trunk is frozen, with its norms in eval."""

    def __init__(self, classes=10):
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 16, 2), conv_bn(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(32, classes)
        for p in self.backbone.parameters():
            p.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            f = self.backbone(x)
        return self.head(f)


class LoRALinear(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + 2.0 * self.up(self.down(x))


class LoRANet(nn.Module):
    def __init__(self, n=24, h=48, classes=5):
        super().__init__()
        self.fc1, self.fc2 = LoRALinear(nn.Linear(n, h)), LoRALinear(nn.Linear(h, h))
        self.head = nn.Linear(h, classes)

    def forward(self, x):
        return self.head(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class ZeroGammaBlock(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.c2, self.b2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.down = (
            nn.Identity()
            if i == o and stride == 1
            else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        )
        nn.init.zeros_(self.b2.weight)

    def forward(self, x):
        y = self.b2(self.c2(F.relu(self.b1(self.c1(x)))))
        return F.relu(y + self.down(x))


class ZeroGammaResNet(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.layers = nn.Sequential(ZeroGammaBlock(16, 16, 1), ZeroGammaBlock(16, 32, 2), ZeroGammaBlock(32, 32, 1))
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class LogProbs(nn.Module):
    """log_softmax for NLLLoss."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.drop1, self.drop2 = nn.Dropout2d(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(16 * 12 * 12, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = self.drop2(F.relu(self.fc1(torch.flatten(self.drop1(x), 1))))
        return F.log_softmax(self.fc2(x), dim=1)


class WeightNormTCN(nn.Module):
    """Weight norm, causal padding, classification from the last step."""

    def __init__(self, channels=4, classes=5):
        super().__init__()
        self.convs = nn.ModuleList(
            parametrizations.weight_norm(nn.Conv1d(channels if i == 0 else 24, 24, 3, dilation=2**i)) for i in range(3)
        )
        self.skip, self.fc = nn.Conv1d(channels, 24, 1), nn.Linear(24, classes)

    def forward(self, x):
        y = self.skip(x)
        for i, conv in enumerate(self.convs):
            h = F.relu(conv(F.pad(x if i == 0 else y, (2 * 2**i, 0))))
            y = y + h
        return self.fc(y[..., -1])


class SpectralNet(nn.Module):
    def __init__(self, n=20, h=64):
        super().__init__()
        sn = parametrizations.spectral_norm
        self.net = nn.Sequential(
            sn(nn.Linear(n, h)), nn.LeakyReLU(0.2), sn(nn.Linear(h, h)), nn.LeakyReLU(0.2), nn.Linear(h, 1)
        )

    def forward(self, x):
        return self.net(x)


class DropPathMixer(nn.Module):
    """Whole branches are dropped by sample, in training only; layer scale at 1e-2."""

    def __init__(self, d=48, tokens=16, classes=10, depth=3):
        super().__init__()
        self.embed = nn.Conv2d(3, d, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2 * depth + 1))
        self.tok = nn.ModuleList(
            nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens)) for _ in range(depth)
        )
        self.chan = nn.ModuleList(nn.Sequential(nn.Linear(d, 96), nn.GELU(), nn.Linear(96, d)) for _ in range(depth))
        self.scale = nn.ParameterList(nn.Parameter(torch.full((d,), 1e-2)) for _ in range(2 * depth))
        self.fc = nn.Linear(d, classes)

    def drop(self, y):
        if not self.training:
            return y
        keep = torch.rand(y.size(0), 1, 1, device=y.device) < 0.9
        return y * keep / 0.9

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i, (tok, chan) in enumerate(zip(self.tok, self.chan, strict=False)):
            x = x + self.drop(self.scale[2 * i] * tok(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2))
            x = x + self.drop(self.scale[2 * i + 1] * chan(self.norms[2 * i + 1](x)))
        return self.fc(self.norms[-1](x).mean(1))


class PoliteVAE(nn.Module):
    """Samples in training, takes the mean in eval."""

    def __init__(self, n=40, z=8):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(n, 64), nn.SiLU())
        self.mu, self.logvar = nn.Linear(64, z), nn.Linear(64, z)
        self.dec = nn.Sequential(nn.Linear(z, 64), nn.SiLU(), nn.Linear(64, n))

    def forward(self, x):
        h = self.enc(x)
        mu, logvar = self.mu(h), self.logvar(h).clamp(-8, 8)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp() if self.training else mu
        return self.dec(z), mu, logvar


class MomentumTarget(nn.Module):
    """Self-supervised pair: the target branch is a frozen copy by design."""

    def __init__(self, n=30, d=32):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(n, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, d))
        self.predictor = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x):
        p = F.normalize(self.predictor(self.online(x)), dim=-1)
        with torch.no_grad():
            t = F.normalize(self.target(x), dim=-1)
        return p, t


class DeepSet(nn.Module):
    def __init__(self, n=6, d=32, out=3):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(n, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU())
        self.rho = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, out))

    def forward(self, points):
        return self.rho(self.phi(points).mean(dim=1))


class FourierBuffer(nn.Module):
    """Fixed random frequencies, registered; the sine network regresses a value."""

    def __init__(self, n=3, m=24):
        super().__init__()
        self.register_buffer("B", torch.randn(m, n))
        self.net = nn.Sequential(nn.Linear(2 * m, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x):
        a = 2 * math.pi * F.linear(x, self.B)
        return self.net(torch.cat((a.sin(), a.cos()), -1)).squeeze(-1)


class NoisyInTraining(nn.Module):
    """Mixture with noise on its gate in training only, and a dense mixture."""

    def __init__(self, n=18, classes=4, experts=4):
        super().__init__()
        self.norm = nn.BatchNorm1d(n)
        self.gate = nn.Linear(n, experts)
        self.w1 = nn.Parameter(torch.randn(experts, n, 32) / n**0.5)
        self.w2 = nn.Parameter(torch.randn(experts, 32, classes) / 32**0.5)

    def forward(self, x):
        x = self.norm(x)
        g = self.gate(x)
        if self.training:
            g = g + 0.1 * torch.randn_like(g)
        h = torch.einsum("bn,enh->beh", x, self.w1).relu()
        return torch.einsum("beh,ehc,be->bc", h, self.w2, g.softmax(-1))


class CosineHead(nn.Module):
    """Normalised features and class vectors, scale of ten."""

    def __init__(self, classes=10):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.GroupNorm(8, 32),
            nn.SiLU(),
        )
        self.prototypes = nn.Parameter(torch.randn(classes, 32))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, image):
        f = F.normalize(self.trunk(image).mean((2, 3)), dim=1)
        return self.log_scale.exp() * f @ F.normalize(self.prototypes, dim=1).t()


class AuxiliaryHead(nn.Module):
    """A second output in training only, with dropout."""

    def __init__(self, classes=10):
        super().__init__()
        self.one, self.two = conv_bn(3, 16, 2), conv_bn(16, 32, 2)
        self.aux, self.fc = nn.Linear(16, classes), nn.Linear(32, classes)

    def forward(self, x):
        a = self.one(x)
        out = self.fc(F.dropout(self.two(a).mean((2, 3)), 0.2, self.training))
        return (out, self.aux(a.mean((2, 3)))) if self.training else out


class StraightThrough(nn.Module):
    """VQ autoencoder: nearest code forward, identity backward; the codes learn by the second output."""

    def __init__(self, n=32, d=8, codes=16):
        super().__init__()
        self.enc, self.dec = (
            nn.Sequential(nn.Linear(n, 48), nn.ReLU(), nn.Linear(48, d)),
            nn.Sequential(nn.Linear(d, 48), nn.ReLU(), nn.Linear(48, n)),
        )
        self.codebook = nn.Parameter(torch.randn(codes, d) * 0.5)

    def forward(self, x):
        z = self.enc(x)
        index = (z[:, None] - self.codebook).square().sum(-1).argmin(-1)
        q = self.codebook[index]
        commitment = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return self.dec(z + (q - z).detach()), commitment


class GraphLayerNet(nn.Module):
    """Graph convolution with a dense adjacency; the order of nodes is free by design."""

    def __init__(self, n=6, d=32, classes=3):
        super().__init__()
        self.lin1, self.lin2, self.out = nn.Linear(n, d), nn.Linear(d, d), nn.Linear(d, classes)

    def forward(self, nodes, adjacency):
        a = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1)
        h = F.relu(self.lin1(nodes) + a @ self.lin1(nodes))
        return self.out(F.relu(h + a @ self.lin2(h)).mean(1))


def graph():
    made = torch.Generator().manual_seed(8)
    return {
        "example_inputs": {
            "nodes": torch.randn(3, 7, 6, generator=made),
            "adjacency": (torch.rand(3, 7, 7, generator=made) > 0.5).float(),
        }
    }


ENTRIES = [
    sound("frozen_backbone", FrozenBackbone),
    sound("lora_up_at_zero", LoRANet),
    sound("resnet_zero_gamma", ZeroGammaResNet),
    sound("log_softmax_for_nll", LogProbs),
    sound("weight_norm_tcn", WeightNormTCN),
    sound("spectral_norm", SpectralNet, task="regression"),
    sound("mixer_drop_path_layer_scale", DropPathMixer),
    sound("vae_mean_in_eval", PoliteVAE, task="regression"),
    sound("momentum_target", MomentumTarget, task="embedding"),
    sound(
        "deep_set", DeepSet, example_inputs={"points": torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(2))}
    ),
    sound("fourier_features_as_buffer", FourierBuffer, task="regression"),
    sound("noise_in_training_only", NoisyInTraining),
    sound("cosine_head_group_norm", CosineHead),
    sound("auxiliary_head_in_training", AuxiliaryHead),
    sound("straight_through_codes", StraightThrough, task="regression"),
    sound("graph_convolution", GraphLayerNet, **graph()),
]
