"""Sound models whose weights, starts and scales look odd and are right."""
# ruff: noqa: D102

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.holdout.bodies_pictures import Mixer, ResNet, Vit
from benchmarks.holdout.bodies_readers import HandReader, MaskedReader, MhaReader
from benchmarks.holdout.bodies_tables import Tabular
from benchmarks.holdout.bodies_text import EinsumGpt, Fused, FusedGpt, LabelLm, RetNet
from benchmarks.holdout.samples import ids, mask, noise
from benchmarks.zoo.entry import initialised, sinusoids, sound

MASKED = {"input_ids": ids(4, 12), "attention_mask": mask(4, 12)}
FEATURES = {"features": noise(4, 16, 12)}


class Alibi(Fused):
    """Positions as a penalty on distance, none elsewhere."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = torch.arange(q.shape[2], device=q.device)
        gap = t[:, None] - t
        slope = 2.0 ** -torch.arange(1, self.heads + 1, device=q.device)[:, None, None]
        bias = (-gap * slope).masked_fill(gap < 0, float("-inf")).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class AlibiGpt(FusedGpt):
    """GPT with such attention and no table of positions."""

    def __init__(self) -> None:
        super().__init__(attention=Alibi)
        del self.pos

    def pos(self, steps: Tensor) -> float:
        return 0.0


class NopeGpt(AlibiGpt):
    """No positions at all: the causal mask alone tells the order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusedGpt().layers[i] for i in range(3))


class ReZero(nn.Module):
    """Residual layers that begin as nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(20, 32), nn.Linear(32, 4)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        self.alphas = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer, alpha in zip(self.layers, self.alphas, strict=True):
            x = x + alpha * torch.relu(layer(x))
        return self.out(x)


class AdaptiveZero(Mixer):
    """Diffusion-like gates whose projection is zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(24, 24)
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x * (1 + self.gates(x.mean(1, keepdim=True)))
        for i in range(self.depth):
            x = x + (F.gelu(self.ln[2 * i](x).mT @ self.time_in[i]) @ self.time_out[i]).mT
            x = x + F.gelu(self.ln[2 * i + 1](x) @ self.chan_in[i]) @ self.chan_out[i]
        return self.head(self.ln[-1](x).mean(1))


class LayerScale(ResNet):
    """Last norm of each unit begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        for unit in (*self.stage1, *self.stage2):
            nn.init.zeros_(unit.bn2.weight)


class Lora(nn.Module):
    """Frozen layer with a trained addition of low rank, one side zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def lora_gpt() -> nn.Module:
    """Return a frozen GPT with adapters at its attention."""
    model = FusedGpt().requires_grad_(False)
    for layer in model.layers:
        layer.attn.qkv = Lora(layer.attn.qkv)
        layer.attn.proj = Lora(layer.attn.proj)
    return model


def probe() -> nn.Module:
    """Return a frozen residual net with a new head."""
    model = ResNet().requires_grad_(False)
    model.fc = nn.Linear(32, 6)
    return model


def frozen_words() -> nn.Module:
    """Return a reader whose word vectors stay as they came."""
    model = MhaReader()
    model.embedding.requires_grad_(False)
    return model


def frozen_lower() -> nn.Module:
    """Return a vision transformer whose stem and first layer are frozen."""
    model = Vit()
    for part in (model.patch, model.attns[0], model.mlps[0], model.norms[0], model.norms[1]):
        part.requires_grad_(False)
    return model


class Albert(nn.Module):
    """One layer used three times, openly."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.widen = nn.Embedding(100, 12), nn.Linear(12, 32)
        self.position = nn.Embedding(48, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.out = nn.Linear(32, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.widen(self.small(input_ids)) + self.position.weight[: input_ids.shape[1]]
        for _ in range(3):
            x = self.layer(x)
        return self.out(x)


class ScaledWords(nn.Module):
    """Tied words at small scale, multiplied by the root of the width before sinusoids are added."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.word = nn.Embedding(100, width)
        nn.init.normal_(self.word.weight, std=width**-0.5)
        self.register_buffer("wave", sinusoids(64, width), persistent=False)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        n = input_ids.shape[1]
        x = self.word(input_ids) * self.word.embedding_dim**0.5 + self.wave[:n]
        future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        return F.linear(self.body(x, mask=future), self.word.weight)


class NoScaleSmallQueries(HandReader):
    """No scale in the scores; the queries are drawn smaller in its place, as T5 does."""

    def __init__(self) -> None:
        super().__init__(width=32, heads=2)
        for q in self.to_q:
            nn.init.normal_(q.weight, std=(32 * 16) ** -0.5)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT


class CosineScores(HandReader):
    """Normalised queries and keys with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.log_tau = nn.Parameter(torch.tensor(2.0))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.log_tau.clamp(max=4.6).exp()


class SlotAttention(HandReader):
    """Weights shared out over slots, then over time: competition on purpose."""

    def __init__(self) -> None:
        super().__init__()
        del self.score
        self.slots = nn.Parameter(torch.randn(4, 32))

    def pool(self, x: Tensor) -> Tensor:
        shared = torch.softmax(torch.einsum("sc,btc->bst", self.slots, x) / 32**0.5, dim=1) + 1e-4
        shared = shared / shared.sum(-1, keepdim=True)
        return torch.einsum("bst,btc->bsc", shared, x).mean(1)


class WeightNormed(Tabular):
    """Weights in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = parametrizations.weight_norm(self.fc1), parametrizations.weight_norm(self.fc2)


class DeepPlain(nn.Module):
    """Ten plain layers, drawn as He et al. say."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(10):
            layer = nn.Linear(16 if i == 0 else 96, 96)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(96, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ZeroHead(EinsumGpt):
    """The last matrix begins at zero, so the first loss is the logarithm of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.unembed)


class EmaTeacher(nn.Module):
    """Student and teacher; the teacher's weights follow and are never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(18, 40), nn.GELU(), nn.Linear(40, 12))
        self.teacher = nn.Sequential(nn.Linear(18, 40), nn.GELU(), nn.Linear(40, 12)).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.predict = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            target = self.teacher(x)
        return {"prediction": self.predict(self.student(x)), "target": target}


class DeadByChance(nn.Module):
    """Narrow ReLU features of which some are off for any one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 24), nn.Linear(24, 24), nn.Linear(24, 2)
        nn.init.constant_(self.a.bias, -0.3)

    def forward(self, x: Tensor) -> Any:
        return [self.c(F.relu(self.b(F.relu(self.a(x)))))]


class SoftmaxLog(LabelLm):
    """Log-softmax and negative log-likelihood, which is cross entropy in two steps."""

    def logits(self, input_ids: Tensor) -> Tensor:
        return torch.log_softmax(super().logits(input_ids), -1)

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.nll_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def quiet(build: Any) -> Any:
    """Return a builder that initialises like GPT-2."""
    return lambda: initialised(build())


ENTRIES = [
    sound("alibi", AlibiGpt, task="causal_lm"),
    sound("no positions, causal", NopeGpt, task="causal_lm"),
    sound("rezero", ReZero),
    sound("gates from zero", AdaptiveZero),
    sound("last norms from zero", LayerScale),
    sound("lora", lora_gpt, task="causal_lm"),
    sound("linear probe", probe),
    sound("frozen words", frozen_words, example_inputs=MASKED, frozen=("embedding",)),
    sound("frozen words unsaid", frozen_words, example_inputs=MASKED),
    sound("frozen lower part", frozen_lower, frozen=("patch", "attns.0", "mlps.0", "norms.0", "norms.1")),
    sound("albert", Albert, task="masked_lm"),
    sound("scaled tied words", ScaledWords, task="causal_lm"),
    sound("no scale, small queries", NoScaleSmallQueries, example_inputs=FEATURES),
    sound("cosine scores", CosineScores, example_inputs=FEATURES),
    sound("slots", SlotAttention, example_inputs=FEATURES),
    sound("weight norm", WeightNormed),
    sound("deep plain by he", DeepPlain),
    sound("zero head", ZeroHead, vocab_size=97),
    sound("teacher and student", EmaTeacher, task="embedding", frozen=("teacher",)),
    sound("some units off", DeadByChance),
    sound("log-softmax and nll", SoftmaxLog, task="causal_lm"),
    sound("masked model like gpt-2", quiet(MaskedReader), task="masked_lm"),
    sound("retention like gpt-2", quiet(RetNet), task="causal_lm"),
]
