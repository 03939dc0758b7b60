"""Sound models over images."""

# ruff: noqa: D102

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.zoo.entry import sound


class Unit(nn.Module):
    """Residual unit; its last norm starts at zero, so that the branch starts silent."""

    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.a = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn_a = nn.BatchNorm2d(cout)
        self.b = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn_b = nn.BatchNorm2d(cout)
        nn.init.zeros_(self.bn_b.weight)
        self.skip = nn.Identity() if cin == cout and stride == 1 else nn.Conv2d(cin, cout, 1, stride)

    def forward(self, x):
        return F.relu(self.skip(x) + self.bn_b(self.b(F.relu(self.bn_a(self.a(x))))))


class ResNetty(nn.Module):
    """Small residual network."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stages = nn.Sequential(Unit(16, 16), Unit(16, 32, 2), Unit(32, 64, 2))
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        return self.fc(self.stages(F.relu(self.stem(x))).mean((2, 3)))


class ChannelsLastNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtish(nn.Module):
    """Depthwise block with a small learned scale on its branch."""

    def __init__(self, c):
        super().__init__()
        self.dw = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.ln = ChannelsLastNorm(c)
        self.up, self.down = nn.Conv2d(c, 4 * c, 1), nn.Conv2d(4 * c, c, 1)
        self.gamma = nn.Parameter(torch.full((c, 1, 1), 1e-6))

    def forward(self, x):
        return x + self.gamma * self.down(F.gelu(self.up(self.ln(self.dw(x)))))


class ConvNeXtNet(nn.Module):
    """Patch stem and two such blocks."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Sequential(nn.Conv2d(3, 32, 4, 4), ChannelsLastNorm(32))
        self.blocks = nn.Sequential(ConvNeXtish(32), ConvNeXtish(32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 12)

    def forward(self, pixel_values):
        return self.head(self.norm(self.blocks(self.patch(pixel_values)).mean((-2, -1))))


class TinyViT(nn.Module):
    """Vision transformer with a class token."""

    def __init__(self, image=32, patch=8, dim=48, depth=2, classes=10):
        super().__init__()
        self.to_patch = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos = nn.Parameter(torch.randn(1, 1 + (image // patch) ** 2, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def tokens(self, img):
        x = self.to_patch(img).flatten(2).mT
        return torch.cat((self.cls.expand(len(x), -1, -1), x), 1) + self.pos

    def forward(self, img):
        return self.head(self.encoder(self.tokens(img))[:, 0])


class MixerLayer(nn.Module):
    """Mixes patches, then channels."""

    def __init__(self, n, d):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.over_patches = nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))
        self.over_channels = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = x + self.over_patches(self.n1(x).mT).mT
        return x + self.over_channels(self.n2(x))


class Mixer(nn.Module):
    """MLP-mixer for images of 32 pixels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 8, 8)
        self.layers = nn.Sequential(*[MixerLayer(16, 40) for _ in range(3)])
        self.out = nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 10))

    def forward(self, x):
        return self.out(self.layers(self.stem(x).flatten(2).mT).mean(1))


def vgg():
    """Plain convolutions with dropout before the classifier, He start."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )
    for m in net:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
    return net


class GroupNormNet(nn.Module):
    """Group norm and standardised convolution weights."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.g1, self.g2 = nn.GroupNorm(4, 16), nn.GroupNorm(8, 32)
        self.cls = nn.Linear(32, 5)

    @staticmethod
    def standard(conv, x):
        w = conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w / w[0].numel() ** 0.5, conv.bias, conv.stride, conv.padding)

    def forward(self, x):
        x = F.silu(self.g1(self.standard(self.c1, x)))
        x = F.silu(self.g2(self.standard(self.c2, x)))
        return self.cls(x.mean((2, 3)))


class SmallUNet(nn.Module):
    """Encoder and decoder with skips; pads odd sizes."""

    def __init__(self, cin=3, classes=4, w=16):
        super().__init__()
        self.d1 = self.pair(cin, w)
        self.d2 = self.pair(w, 2 * w)
        self.u1 = self.pair(3 * w, w)
        self.final = nn.Conv2d(w, classes, 1)

    @staticmethod
    def pair(i, o):
        return nn.Sequential(
            nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(4, o), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1)
        )

    def forward(self, image):
        a = self.d1(image)
        b = self.d2(F.max_pool2d(a, 2))
        up = F.interpolate(b, size=a.shape[-2:], mode="nearest")
        return self.final(F.relu(self.u1(torch.cat((a, up), 1))))


class BetaVAE(nn.Module):
    """Draws its code only while it trains."""

    def __init__(self, z=8):
        super().__init__()
        self.enc = nn.Sequential(nn.Flatten(), nn.Linear(784, 96), nn.ReLU())
        self.mu, self.logvar = nn.Linear(96, z), nn.Linear(96, z)
        self.dec = nn.Sequential(nn.Linear(z, 96), nn.ReLU(), nn.Linear(96, 784))

    def forward(self, x):
        h = self.enc(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp() if self.training else mu
        return {"reconstruction": self.dec(z).view_as(x), "mu": mu, "logvar": logvar}


class NoisePredictor(nn.Module):
    """Predicts the noise from an image and a time."""

    def __init__(self, c=24):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, c), nn.SiLU(), nn.Linear(c, c))
        self.first = nn.Conv2d(3, c, 3, padding=1)
        self.mid = nn.Sequential(nn.GroupNorm(4, c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1))
        self.last = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x, t):
        freq = torch.exp(-torch.arange(8, device=x.device) / 2.0).to(x.dtype)
        ang = t.to(x.dtype)[:, None] * freq
        emb = self.time(torch.cat((ang.sin(), ang.cos()), 1))
        h = self.first(x) + emb[:, :, None, None]
        return self.last(F.silu(h + self.mid(h)))


class SqueezeExcite(nn.Module):
    """Channel gates on separable convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.depth = nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.point = nn.Conv2d(24, 48, 1)
        self.bn = nn.BatchNorm2d(48)
        self.squeeze, self.excite = nn.Linear(48, 12), nn.Linear(12, 48)
        self.logits = nn.Linear(48, 7)

    def forward(self, x):
        x = F.hardswish(self.bn(self.point(self.depth(F.hardswish(self.stem(x))))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.logits((x * gate[..., None, None]).mean((2, 3)))


class WeightNormNet(nn.Module):
    """Weights split into length and direction."""

    def __init__(self):
        super().__init__()
        self.c = weight_norm(nn.Conv2d(1, 12, 5, 2))
        self.f = weight_norm(nn.Linear(12 * 4, 10))

    def forward(self, x):
        return self.f(F.adaptive_avg_pool2d(F.elu(self.c(x)), 2).flatten(1))


class TwoTasks(nn.Module):
    """A class and a box from one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
        self.kind, self.box = nn.Linear(32, 6), nn.Linear(32, 4)

    def forward(self, images):
        h = F.relu(self.trunk(images)).mean((2, 3))
        return self.kind(h), self.box(h).sigmoid()


class FrozenTrunk(nn.Module):
    """Probe on a backbone that is frozen on purpose."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        for p in self.backbone.parameters():
            p.requires_grad = False
        self.probe = nn.Linear(32, 10)

    def forward(self, x):
        return self.probe(self.backbone(x).flatten(1))


def conv_autoencoder():
    """Strided convolutions down, transposed ones up."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(12, 24, 3, 2, 1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(24, 12, 4, 2, 1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(12, 1, 4, 2, 1),
    )


ENTRIES = [
    sound("zero_last_norm", ResNetty),
    sound("layer_scale", ConvNeXtNet),
    sound("tiny_vit", TinyViT),
    sound("image_mixer", Mixer),
    sound("vgg_dropout", vgg),
    sound("group_norm_standardised", GroupNormNet),
    sound("padded_unet", SmallUNet),
    sound("vae_draws_in_training", BetaVAE, example_inputs={"x": torch.linspace(0, 1, 1568).view(2, 1, 28, 28)}),
    sound(
        "noise_predictor",
        NoisePredictor,
        example_inputs={"x": torch.linspace(0, 90, 1536).sin().view(2, 3, 16, 16), "t": torch.tensor([3, 40])},
    ),
    sound("squeeze_excite", SqueezeExcite),
    sound("weight_norm", WeightNormNet),
    sound("class_and_box", TwoTasks),
    sound("frozen_backbone_probe", FrozenTrunk, frozen=("backbone",)),
    sound("conv_autoencoder", conv_autoencoder),
]
