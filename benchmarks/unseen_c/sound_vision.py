"""Sound models of pictures, as people write them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, gauss
from benchmarks.zoo.entry import sound


class BasicBlock(nn.Module):
    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNetCifar(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


@dataclass
class ViTConfig:
    image_size: int = 32
    patch_size: int = 8
    hidden_size: int = 48
    depth: int = 3
    num_labels: int = 10


class VisionTransformer(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        n = (config.image_size // config.patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.hidden_size) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, n + 1, config.hidden_size) * 0.02)
        self.blocks = nn.Sequential(*[Block(config.hidden_size, 4) for _ in range(config.depth)])
        self.norm, self.head = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pixel_values, labels=None):
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        logits = self.head(self.norm(self.blocks(x))[:, 0])
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


class WindowBlock(nn.Module):
    def __init__(self, dim, window, shift):
        super().__init__()
        self.window, self.shift = window, shift
        self.block = Block(dim, 4)
        self.bias = nn.Parameter(torch.randn(window * window, dim) * 0.02)

    def forward(self, x):
        b, h, w, c = x.shape
        s = self.window
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(b, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)
        x = self.block(x + self.bias)
        x = x.view(b, h // s, w // s, s, s, c).transpose(2, 3).reshape(b, h, w, c)
        return torch.roll(x, (self.shift, self.shift), (1, 2))


class SwinLike(nn.Module):
    def __init__(self, dim=32, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.stage1 = nn.Sequential(WindowBlock(dim, 4, 0), WindowBlock(dim, 4, 2))
        self.merge = nn.Sequential(nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False))
        self.stage2 = nn.Sequential(WindowBlock(2 * dim, 4, 0))
        self.norm, self.head = nn.LayerNorm(2 * dim), nn.Linear(2 * dim, classes)

    def forward(self, x):
        x = self.stage1(self.patch(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.norm(self.stage2(self.merge(x))).mean((1, 2)))


class MixerBlock(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.channel = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.token(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel(self.norm2(x))


class MLPMixer(nn.Module):
    def __init__(self, dim=48, depth=4, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 8, 8)
        self.mixer = nn.Sequential(*[MixerBlock(16, dim) for _ in range(depth)])
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        return self.fc(self.norm(self.mixer(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


class TimeResBlock(nn.Module):
    def __init__(self, cin, cout, tdim):
        super().__init__()
        self.n1, self.c1 = nn.GroupNorm(8, cin), nn.Conv2d(cin, cout, 3, 1, 1)
        self.n2, self.c2 = nn.GroupNorm(8, cout), nn.Conv2d(cout, cout, 3, 1, 1)
        self.t = nn.Linear(tdim, cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, t):
        h = self.c1(F.silu(self.n1(x))) + self.t(F.silu(t))[:, :, None, None]
        return self.c2(F.silu(self.n2(h))) + self.skip(x)


class DiffusionUNet(nn.Module):
    def __init__(self, channels=3, base=32):
        super().__init__()
        self.base = base
        self.temb = nn.Sequential(nn.Linear(base, base), nn.SiLU(), nn.Linear(base, base))
        self.conv_in = nn.Conv2d(channels, base, 3, 1, 1)
        self.d1, self.d2 = TimeResBlock(base, base, base), TimeResBlock(base, 2 * base, base)
        self.mid = TimeResBlock(2 * base, 2 * base, base)
        self.u2, self.u1 = TimeResBlock(4 * base, base, base), TimeResBlock(2 * base, base, base)
        self.norm_out, self.conv_out = nn.GroupNorm(8, base), nn.Conv2d(base, channels, 3, 1, 1)

    def forward(self, x, timesteps):
        freq = torch.exp(-math.log(1e4) * torch.arange(self.base // 2, device=x.device) / (self.base // 2))
        angle = timesteps.float()[:, None] * freq
        t = self.temb(torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype))
        h1 = self.d1(self.conv_in(x), t)
        h2 = self.d2(F.avg_pool2d(h1, 2), t)
        h = self.mid(F.avg_pool2d(h2, 2), t)
        h = self.u2(torch.cat([F.interpolate(h, scale_factor=2.0), h2], 1), t)
        h = self.u1(torch.cat([F.interpolate(h, scale_factor=2.0), h1], 1), t)
        return self.conv_out(F.silu(self.norm_out(h)))


def double_conv(cin, cout):
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, padding=1),
        nn.BatchNorm2d(cout),
        nn.ReLU(inplace=True),
        nn.Conv2d(cout, cout, 3, padding=1),
        nn.BatchNorm2d(cout),
        nn.ReLU(inplace=True),
    )


class SegUNet(nn.Module):
    def __init__(self, n_channels=3, n_classes=4):
        super().__init__()
        self.inc, self.down1, self.down2 = double_conv(n_channels, 12), double_conv(12, 24), double_conv(24, 48)
        self.up1, self.dec1 = nn.ConvTranspose2d(48, 24, 2, 2), double_conv(48, 24)
        self.up2, self.dec2 = nn.ConvTranspose2d(24, 12, 2, 2), double_conv(24, 12)
        self.outc = nn.Conv2d(12, n_classes, 1)

    def forward(self, x):
        a = self.inc(x)
        b = self.down1(F.max_pool2d(a, 2))
        c = self.down2(F.max_pool2d(b, 2))
        y = self.dec1(torch.cat([b, self.up1(c)], 1))
        return self.outc(self.dec2(torch.cat([a, self.up2(y)], 1)))


class KeypointNet(nn.Module):
    """Heatmaps and their soft-argmax: softmax over the pixels."""

    def __init__(self, joints=7):
        super().__init__()
        self.backbone = nn.Sequential(
            double_conv(3, 16), nn.MaxPool2d(2), double_conv(16, 32), nn.MaxPool2d(2), double_conv(32, 32)
        )
        self.heatmap = nn.Conv2d(32, joints, 1)

    def forward(self, image):
        maps = self.heatmap(self.backbone(image))
        b, j, h, w = maps.shape
        p = maps.flatten(2).softmax(-1).view(b, j, h, w)
        xs = torch.linspace(-1, 1, w, device=maps.device, dtype=maps.dtype)
        ys = torch.linspace(-1, 1, h, device=maps.device, dtype=maps.dtype)
        return {"heatmaps": maps, "points": torch.stack([(p.sum(2) * xs).sum(-1), (p.sum(3) * ys).sum(-1)], -1)}


class ConvVAE(nn.Module):
    def __init__(self, latent=12):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.fc_mu, self.fc_logvar = nn.Linear(32 * 49, latent), nn.Linear(32 * 49, latent)
        self.fc_dec = nn.Linear(latent, 32 * 49)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1))

    def forward(self, x):
        h = self.encoder(x)
        mu, logvar = self.fc_mu(h), self.fc_logvar(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        return torch.sigmoid(self.decoder(F.relu(self.fc_dec(z)).view(-1, 32, 7, 7))), mu, logvar


class SiameseNet(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, 2, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.embed, self.score = nn.Linear(128, dim, bias=False), nn.Linear(dim, 1)

    def forward(self, left, right):
        a, b = self.embed(self.cnn(left)), self.embed(self.cnn(right))
        return self.score((a - b).abs())


class InvertedResidual(nn.Module):
    def __init__(self, cin, cout, stride, expand=4):
        super().__init__()
        mid = cin * expand
        self.same = stride == 1 and cin == cout
        self.conv = nn.Sequential(
            nn.Conv2d(cin, mid, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU6(),
            nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU6(),
            nn.Conv2d(mid, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        )

    def forward(self, x):
        return x + self.conv(x) if self.same else self.conv(x)


class MobileNetish(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            InvertedResidual(16, 16, 1),
            InvertedResidual(16, 24, 2),
            InvertedResidual(24, 24, 1),
            InvertedResidual(24, 48, 2),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(48, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, cin, growth):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(cin), nn.Conv2d(cin, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class SmallDenseNet(nn.Module):
    def __init__(self, classes=10, growth=12):
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, 2, 1)
        self.block1 = nn.Sequential(*[DenseLayer(24 + i * growth, growth) for i in range(3)])
        self.trans = nn.Sequential(nn.BatchNorm2d(60), nn.ReLU(), nn.Conv2d(60, 30, 1), nn.AvgPool2d(2))
        self.block2 = nn.Sequential(*[DenseLayer(30 + i * growth, growth) for i in range(3)])
        self.norm, self.fc = nn.BatchNorm2d(66), nn.Linear(66, classes)

    def forward(self, x):
        x = self.block2(self.trans(self.block1(self.stem(x))))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


class SingleShotDetector(nn.Module):
    """A small pyramid with a class and a box for each cell."""

    def __init__(self, classes=5):
        super().__init__()
        self.c2, self.c3 = (
            nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), double_conv(16, 32)),
            nn.Sequential(nn.MaxPool2d(2), double_conv(32, 48)),
        )
        self.l2, self.l3 = nn.Conv2d(32, 32, 1), nn.Conv2d(48, 32, 1)
        self.cls_head, self.box_head = nn.Conv2d(32, classes, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, images):
        c2 = self.c2(images)
        c3 = self.c3(c2)
        p3 = self.l3(c3)
        p2 = self.l2(c2) + F.interpolate(p3, size=c2.shape[-2:])
        scores = torch.cat([self.cls_head(F.relu(p)).flatten(2) for p in (p2, p3)], -1)
        boxes = torch.cat([self.box_head(F.relu(p)).flatten(2) for p in (p2, p3)], -1)
        return scores.transpose(1, 2), boxes.transpose(1, 2)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 24, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(24, 48, 4, 2, 1),
            nn.BatchNorm2d(48),
            nn.LeakyReLU(0.2),
            nn.Conv2d(48, 48, 4, 2, 1),
            nn.BatchNorm2d(48),
            nn.LeakyReLU(0.2),
            nn.Conv2d(48, 1, 4),
        )

    def forward(self, img):
        return self.main(img).flatten(1)


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


ENTRIES = [
    sound("residual network", ResNetCifar),
    sound("vision transformer with a config", lambda: VisionTransformer(ViTConfig())),
    sound("shifted windows", SwinLike, example_inputs={"x": gauss(2, 3, 32, 32)}),
    sound("mixer", MLPMixer),
    sound(
        "diffusion unet", DiffusionUNet, example_inputs={"x": gauss(2, 3, 16, 16), "timesteps": torch.tensor([12, 870])}
    ),
    sound("segmentation unet", SegUNet),
    sound("keypoints", KeypointNet),
    sound("convolutional vae", ConvVAE, example_inputs={"x": gauss(2, 1, 28, 28).sigmoid()}),
    sound("siamese", SiameseNet, example_inputs={"left": gauss(2, 1, 28, 28), "right": gauss(2, 1, 28, 28, seed=5)}),
    sound("inverted residuals", MobileNetish),
    sound("dense connections", SmallDenseNet),
    sound("detector", SingleShotDetector),
    sound("discriminator", Discriminator, example_inputs={"img": gauss(4, 3, 32, 32)}),
    sound("lenet", lenet),
]
