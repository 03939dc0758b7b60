"""Signals that die, explode, lose their way around a block, or choose along the wrong axis."""
# ruff: noqa: D102

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.holdout.bodies_pictures import ResNet, ResUnit
from benchmarks.holdout.bodies_readers import HandReader, MhaReader, Perceiver
from benchmarks.holdout.bodies_text import EinsumGpt, Fused, FusedGpt, PreNorm
from benchmarks.holdout.broken_information import FEATURES, MASKED
from benchmarks.holdout.broken_starts import BYTES, HIDDEN, Plain
from benchmarks.holdout.samples import noise
from benchmarks.zoo.entry import broken


class ChaoticCell(nn.Module):
    """Plain recurrent net whose recurrence is drawn far too large."""

    def __init__(self) -> None:
        super().__init__()
        self.wx = nn.Linear(6, 40)
        self.wh = nn.Parameter(torch.randn(40, 40) * 4 * 40**-0.5)
        self.read = nn.Linear(40, 3)

    def forward(self, series: Tensor) -> Tensor:
        h = series.new_zeros(series.shape[0], 40)
        for t in range(series.shape[1]):
            h = torch.tanh(self.wx(series[:, t]) + h @ self.wh)
        return self.read(h)


class Siren(nn.Module):
    """Sine layers at frequency 30 whose weights were not divided by it."""

    def __init__(self, width: int = 40, omega: float = 30.0) -> None:
        super().__init__()
        self.omega = omega
        self.layers = nn.ModuleList(nn.Linear(4 if i == 0 else width, width) for i in range(5))
        self.out = nn.Linear(width, 3)
        for layer in self.layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(self.omega * layer(x))
        return self.out(x)


class SigmoidConvs(nn.Module):
    """Eight sigmoid convolutions on top of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 12, 12, 3, padding=1) for i in range(8))
        self.fc = nn.Linear(12, 10)

    def forward(self, image: Tensor) -> Tensor:
        for conv in self.convs:
            image = torch.sigmoid(conv(image))
        return self.fc(image.mean((2, 3)))


class ShutGate(HandReader):
    """A gate on the trunk that starts almost closed, rescued by a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((32,), -18.0))
        self.after = nn.LayerNorm(32, eps=1e-5)

    def pool(self, x: Tensor) -> Tensor:
        return self.after(super().pool(x) * torch.sigmoid(self.gate))


class NoSkipAttention(PreNorm):
    """Attention replaces its input."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.ln_a(x))
        return x + self.mlp(self.ln_m(x))


def one_block_without_skip() -> nn.Module:
    """Return a GPT whose middle block forgot one of its skips."""
    model = FusedGpt(depth=5)
    block = NoSkipAttention(48, 4)
    block.apply(model.begin)
    model.layers[2] = block
    return model


class NoJoin(ResUnit):
    """Residual unit without the sum."""

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(y)


def res_net_without_one_skip() -> nn.Module:
    """Return a residual net with one plain unit."""
    model = ResNet()
    model.stage2[1] = NoJoin(32, 32)
    return model


class PostNormSlip(MhaReader):
    """Normalises the feed-forward part alone in its second layer."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids)
        for i, mha in enumerate(self.mha):
            x = self.norm1[i](x + mha(x, x, x, key_padding_mask=self.hidden_keys(mask), need_weights=False)[0])
            y = self.fc2[i](F.relu(self.fc1[i](x)))
            x = self.norm2[i](y if i == 1 else x + y)
        return {"logits": self.classifier(self.pool(x, mask))}


class Unscaled(HandReader):
    """Dot products of long vectors as they are."""

    def __init__(self) -> None:
        super().__init__(width=64, heads=1)
        for q, k in zip(self.to_q, self.to_k, strict=True):
            nn.init.xavier_normal_(q.weight)
            nn.init.xavier_normal_(k.weight)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT


class ScaleOne(Fused):
    """Passes a scale of one to the kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, 1)
        self.qn, self.kn = nn.LayerNorm(width), nn.LayerNorm(width)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.qn(q), self.kn(k), v, is_causal=True, scale=1.0)


class TimesRoot(EinsumGpt):
    """Multiplies by the root where it should divide."""

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.inner**0.5
        return scores.masked_fill(~self.visible(q.shape[1], q.device), torch.finfo(q.dtype).min).softmax(-1)


class OverQueries(HandReader):
    """Softmax over the queries."""

    def normalise(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, dim=-2)


class OverHeads(HandReader):
    """Softmax over the heads."""

    def normalise(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, dim=1)


class CrossWrong(Perceiver):
    """Hand-written cross attention whose weights sum to one over the latents."""

    def __init__(self) -> None:
        super().__init__()
        del self.cross
        self.cross_q, self.cross_kv, self.cross_o = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, byte_ids: Tensor) -> Tensor:
        x = self.norm_x(self.content(byte_ids))
        z = self.latents.expand(x.shape[0], -1, -1)
        k, v = self.cross_kv(x).chunk(2, -1)
        q = self.cross_q(self.norm_l(z))
        a = F.softmax(torch.einsum("bld,btd->blt", q, k) / 32**0.5, dim=1)
        z = z + self.cross_o(torch.einsum("blt,btd->bld", a, v))
        s = self.norm_s(z)
        z = z + self.own(s, s, s, need_weights=False)[0]
        return self.head((z + self.ff(z)).mean(1))


ENTRIES = [
    broken(
        "exploding_gradient",
        "chaotic recurrence",
        ChaoticCell,
        ("", "wh", "wx*"),
        ("exploding_init",),
        example_inputs={"series": noise(4, 40, 6)},
    ),
    broken(
        "exploding_gradient",
        "tanh with large gain",
        lambda: Plain(torch.tanh, 8.0, depth=16),
        HIDDEN,
        ("exploding_init",),
    ),
    broken("exploding_gradient", "sines", Siren, ("", "layers*"), task="regression"),
    broken(
        "vanishing_gradient",
        "sigmoid convolutions",
        SigmoidConvs,
        ("", "convs*"),
        ("constant_output", "ignored_input", "vanishing_init"),
    ),
    broken(
        "vanishing_gradient",
        "sigmoid net",
        lambda: Plain(torch.sigmoid, 1.0),
        HIDDEN,
        ("constant_output", "ignored_input", "vanishing_init"),
    ),
    broken(
        "vanishing_gradient",
        "shut gate",
        ShutGate,
        ("", "gate", "after", "score*", "inp*", "to_*"),
        ("vanishing_init", "constant_output", "ignored_input"),
        example_inputs=FEATURES,
    ),
    broken("missing_residual", "one attention of five", one_block_without_skip, ("layers.2*",)),
    broken("missing_residual", "one unit of a residual net", res_net_without_one_skip, ("stage2.1*",)),
    broken(
        "missing_residual",
        "feed-forward alone in post-norm",
        PostNormSlip,
        ("fc1.1", "fc2.1", "norm2.1", ""),
        example_inputs=MASKED,
    ),
    broken("missing_attention_scale", "long dot products", Unscaled, ("", "to_*"), example_inputs=FEATURES),
    broken(
        "missing_attention_scale",
        "scale one in the kernel",
        lambda: FusedGpt(width=64, attention=ScaleOne),
        ("", "*attn*"),
    ),
    broken(
        "missing_attention_scale", "times the root", lambda: TimesRoot(width=64, heads=2), ("", "w[qk]*"), vocab_size=97
    ),
    broken("wrong_softmax_dim", "over queries", OverQueries, ("", "to_*"), example_inputs=FEATURES),
    broken("wrong_softmax_dim", "over heads", OverHeads, ("", "to_*"), example_inputs=FEATURES),
    broken("wrong_softmax_dim", "over latents", CrossWrong, ("", "cross*"), example_inputs=BYTES),
]
