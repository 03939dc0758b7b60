"""Sound models of images, rows, series and pairs in many styles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entry import sound


class TabularMLP(nn.Module):
    def __init__(self, n=14, h=64, classes=3):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(n),
            nn.Linear(n, h),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(h, h),
            nn.ReLU(),
            nn.Linear(h, classes),
        )

    def forward(self, x):
        return self.layers(x)


class FTTransformer(nn.Module):
    """A token for each column, and a class token."""

    def __init__(self, n=11, d=32, out=1):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(n, d) * 0.3), nn.Parameter(torch.randn(n, d) * 0.3)
        self.cls = nn.Parameter(torch.randn(1, 1, d) * 0.3)
        layer = nn.TransformerEncoderLayer(d, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
        self.enc, self.head = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, out)),
        )

    def forward(self, x):
        tokens = x.unsqueeze(-1) * self.w + self.b
        z = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.enc(z)[:, 0])


class Dense(nn.Module):
    def __init__(self, i, grow=12):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(i), nn.Conv2d(i, grow, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class DenseNet(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False),
            Dense(16),
            Dense(28),
            Dense(40),
            nn.BatchNorm2d(52),
            nn.ReLU(),
            nn.Conv2d(52, 26, 1),
            nn.AvgPool2d(2),
            Dense(26),
            Dense(38),
            nn.BatchNorm2d(50),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(50, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class ViT(nn.Module):
    def __init__(self, size=32, patch=8, d=48, classes=10, depth=2):
        super().__init__()
        self.patch = nn.Conv2d(3, d, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, d) * 0.02)
        layer = nn.TransformerEncoderLayer(d, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.norm = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.LayerNorm(d)
        self.head = nn.Linear(d, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.size(0), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class WindowAttention(nn.Module):
    """Swin: windows, shifted every other block, a relative bias table."""

    def __init__(self, d, w=4, heads=4, shift=0):
        super().__init__()
        self.w, self.heads, self.shift = w, heads, shift
        self.norm, self.qkv, self.proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.table = nn.Parameter(torch.randn((2 * w - 1) ** 2, heads) * 0.02)
        at = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
        far = (at[:, :, None] - at[:, None, :]) + w - 1
        self.register_buffer("index", far[0] * (2 * w - 1) + far[1], persistent=False)
        self.n2, self.mlp = nn.LayerNorm(d), nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(b, h // self.w, self.w, w // self.w, self.w, c).transpose(2, 3).reshape(-1, self.w**2, c)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].permute(2, 0, 1)[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        y = self.proj(y).view(b, h // self.w, w // self.w, self.w, self.w, c).transpose(2, 3).reshape(b, h, w, c)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.n2(x))


class SwinLike(nn.Module):
    def __init__(self, d=32, classes=10):
        super().__init__()
        self.embed = nn.Conv2d(3, d, 4, 4)
        self.blocks = nn.Sequential(WindowAttention(d), WindowAttention(d, shift=2))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, img):
        x = self.embed(img).permute(0, 2, 3, 1)
        return self.head(self.norm(self.blocks(x)).mean((1, 2)))


class ConvNeXtLike(nn.Module):
    def __init__(self, d=32, classes=10, depth=3):
        super().__init__()
        self.stem = nn.Conv2d(3, d, 4, 4)
        self.dw = nn.ModuleList(nn.Conv2d(d, d, 7, padding=3, groups=d) for _ in range(depth))
        self.ln = nn.ModuleList(nn.LayerNorm(d) for _ in range(depth))
        self.pw = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)) for _ in range(depth)
        )
        self.norm, self.fc = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, x):
        x = self.stem(x)
        for dw, ln, pw in zip(self.dw, self.ln, self.pw, strict=False):
            x = x + pw(ln(dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.fc(self.norm(x.mean((2, 3))))


class UNet(nn.Module):
    """Segments into four classes."""

    def __init__(self, c=12, classes=4):
        super().__init__()

        def double(i, o):
            return nn.Sequential(
                nn.Conv2d(i, o, 3, padding=1),
                nn.BatchNorm2d(o),
                nn.ReLU(),
                nn.Conv2d(o, o, 3, padding=1),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            )

        self.d1, self.d2, self.mid = double(3, c), double(c, 2 * c), double(2 * c, 4 * c)
        self.u2, self.u1 = double(6 * c, 2 * c), double(3 * c, c)
        self.out = nn.Conv2d(c, classes, 1)

    def forward(self, x):
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        m = self.mid(F.max_pool2d(b, 2))
        y = self.u2(torch.cat([F.interpolate(m, size=b.shape[-2:], mode="nearest"), b], 1))
        y = self.u1(torch.cat([F.interpolate(y, size=a.shape[-2:], mode="nearest"), a], 1))
        return self.out(y)


class SqueezeMobile(nn.Module):
    """Depthwise blocks with squeeze and excitation."""

    def __init__(self, c=24, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(2 * c, 2 * c, 3, 1, 1, groups=2 * c, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU6()
        )
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * c, 8, 1), nn.ReLU(), nn.Conv2d(8, 2 * c, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(2 * c, c, 1, bias=False), nn.BatchNorm2d(c))
        self.fc = nn.Linear(c, classes)

    def forward(self, x):
        x = self.stem(x)
        y = self.depth(self.expand(x))
        return self.fc((x + self.project(y * self.se(y))).mean((2, 3)))


class ConvAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ELU())
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ELU(), nn.ConvTranspose2d(8, 1, 4, 2, 1))

    def forward(self, x):
        return self.up(self.down(x))


class SiamesePair(nn.Module):
    def __init__(self, n=20, d=24):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(n, 48), nn.ReLU(), nn.Linear(48, d))
        self.judge = nn.Linear(2 * d, 1)

    def forward(self, left, right):
        a, b = self.branch(left), self.branch(right)
        return self.judge(torch.cat([(a - b).abs(), a * b], -1)).squeeze(-1)


class Recommender(nn.Module):
    """Factorisation with a small network: ids of users and of items."""

    def __init__(self, users=60, items=80, d=16):
        super().__init__()
        self.user, self.item = nn.Embedding(users, d), nn.Embedding(items, d)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        self.deep = nn.Sequential(nn.Linear(2 * d, 32), nn.ReLU(), nn.Linear(32, 1))
        for e in (self.user, self.item, self.user_bias, self.item_bias):
            nn.init.normal_(e.weight, std=0.1)

    def forward(self, user, item):
        u, i = self.user(user), self.item(item)
        deep = self.deep(torch.cat([u, i], -1)).squeeze(-1)
        return (u * i).sum(-1) + self.user_bias(user).squeeze(-1) + self.item_bias(item).squeeze(-1) + deep


class AudioCNN(nn.Module):
    """M5 on a waveform."""

    def __init__(self, classes=12):
        super().__init__()

        def part(i, o, k, s):
            return [nn.Conv1d(i, o, k, s, padding=k // 2), nn.BatchNorm1d(o), nn.ReLU()]

        self.net = nn.Sequential(*part(1, 24, 31, 4), *part(24, 32, 3, 2), *part(32, 48, 3, 2), nn.AdaptiveAvgPool1d(1))
        self.fc = nn.Linear(48, classes)

    def forward(self, waveform):
        return self.fc(self.net(waveform).squeeze(-1))


class Forecaster(nn.Module):
    """LSTM over a series, next three values."""

    def __init__(self, n=5, h=32):
        super().__init__()
        self.lstm, self.head = nn.LSTM(n, h, batch_first=True), nn.Linear(h, 3)

    def forward(self, series):
        return self.head(self.lstm(series)[0][:, -1])


class PerceiverLike(nn.Module):
    """Learned queries read a sequence of features."""

    def __init__(self, n=16, d=32, slots=6, classes=4):
        super().__init__()
        self.lift, self.slots = nn.Linear(n, d), nn.Parameter(torch.randn(slots, d))
        self.pos = nn.Parameter(torch.randn(64, d) * 0.5)
        self.read, self.n1, self.n2 = nn.MultiheadAttention(d, 4, batch_first=True), nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp, self.out = nn.Sequential(nn.Linear(d, 64), nn.GELU(), nn.Linear(64, d)), nn.Linear(d, classes)

    def forward(self, frames):
        x = self.n1(self.lift(frames) + self.pos[: frames.size(1)])
        s = self.slots.expand(x.size(0), -1, -1)
        s = s + self.read(s, x, x, need_weights=False)[0]
        return self.out((s + self.mlp(self.n2(s))).mean(1))


class Radial(nn.Module):
    """Radial basis functions with learned centres and widths."""

    def __init__(self, n=4, k=24, out=1):
        super().__init__()
        self.centres, self.log_width, self.w = (
            nn.Parameter(torch.randn(k, n)),
            nn.Parameter(torch.zeros(k)),
            nn.Linear(k, out),
        )

    def forward(self, x):
        d = (x[:, None] - self.centres).square().sum(-1)
        return self.w(torch.exp(-0.5 * d * torch.exp(-2 * self.log_width) / 4))


class Inception(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.InstanceNorm2d(12, affine=True), nn.ReLU())
        self.b1, self.b3, self.b5 = nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(12, 8, 5, padding=2)
        self.pool, self.fc = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(12, 8, 1)), nn.Linear(32, classes)

    def forward(self, x):
        x = self.stem(x)
        y = torch.cat([F.relu(f(x)) for f in (self.b1, self.b3, self.b5, self.pool)], 1)
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


class ResMLP(nn.Module):
    """Pre-activation residual blocks over rows."""

    def __init__(self, n=25, d=48, classes=6, depth=4):
        super().__init__()
        self.inp = nn.Linear(n, d)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d)) for _ in range(depth)
        )
        self.out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, classes))

    def forward(self, x, labels=None):
        h = self.inp(x)
        for f in self.blocks:
            h = h + f(h)
        logits = self.out(h)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Generator(nn.Module):
    """Conditional generator: noise and a label give a picture."""

    def __init__(self, z=16, classes=10):
        super().__init__()
        self.label, self.start = nn.Embedding(classes, z), nn.Linear(2 * z, 32 * 16)
        self.up = nn.Sequential(
            nn.BatchNorm2d(32),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(16, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise, label):
        h = self.start(torch.cat([noise, self.label(label)], 1))
        return self.up(h.view(-1, 32, 4, 4))


class NoisePredictor(nn.Module):
    """Small diffusion network: rows and a step, modulated by the step."""

    def __init__(self, n=8, d=48, steps=100):
        super().__init__()
        self.inp, self.time = nn.Linear(n, d), nn.Sequential(nn.Embedding(steps, d), nn.SiLU(), nn.Linear(d, 2 * d))
        self.norm, self.mid, self.out = nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(d, n)

    def forward(self, x, step):
        h = self.inp(x)
        shift, scale = self.time(step).chunk(2, -1)
        return self.out(h + F.silu(self.mid(self.norm(h) * (1 + scale) + shift)))


def labelled(width, high, first, second):
    made = torch.Generator().manual_seed(9)
    return {
        "example_inputs": {
            first: torch.randn(6, width, generator=made),
            second: torch.randint(0, high, (6,), generator=made),
        }
    }


def rows(**shapes):
    made = torch.Generator().manual_seed(6)
    return {"example_inputs": {n: torch.randn(*s, generator=made) for n, s in shapes.items()}}


def pairs():
    made = torch.Generator().manual_seed(7)
    return {
        "example_inputs": {
            "user": torch.randint(0, 60, (8,), generator=made),
            "item": torch.randint(0, 80, (8,), generator=made),
        }
    }


ENTRIES = [
    sound("tabular_mlp_batch_norm", TabularMLP),
    sound("ft_transformer", FTTransformer, task="regression", **rows(x=(4, 11))),
    sound("densenet", DenseNet),
    sound("vit", ViT),
    sound("swin_like", SwinLike),
    sound("convnext_like", ConvNeXtLike),
    sound("unet", UNet),
    sound("mobile_squeeze_excite", SqueezeMobile),
    sound("conv_autoencoder", ConvAutoencoder, task="regression"),
    sound("siamese_pair", SiamesePair, **rows(left=(4, 20), right=(4, 20))),
    sound("recommender", Recommender, task="regression", **pairs()),
    sound("m5_waveform", AudioCNN),
    sound("forecaster", Forecaster, task="regression"),
    sound("perceiver_like", PerceiverLike, **rows(frames=(3, 20, 16))),
    sound("radial_basis", Radial, task="regression", **rows(x=(16, 4))),
    sound("inception", Inception),
    sound("res_mlp_own_loss", ResMLP),
    sound(
        "lenet_as_sequential",
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(5),
            nn.Flatten(),
            nn.Linear(400, 84),
            nn.Tanh(),
            nn.Linear(84, 10),
        ),
    ),
    sound("conditional_generator", Generator, task="regression", **labelled(16, 10, "noise", "label")),
    sound("noise_predictor", NoisePredictor, task="regression", **labelled(8, 100, "x", "step")),
]
