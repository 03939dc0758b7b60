"""NaN, low precision, and losses that are not what they seem."""
# ruff: noqa: D102

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.holdout.bodies_pictures import Capsules, Spectrogram
from benchmarks.holdout.bodies_readers import HandReader, MhaReader
from benchmarks.holdout.bodies_tables import Tabular, TwoTower
from benchmarks.holdout.bodies_text import EinsumGpt, Fused, FusedGpt, LabelLm, LmOutput, PreNorm, Retention, RetNet
from benchmarks.holdout.broken_information import FEATURES, MASKED, PAIR
from benchmarks.holdout.samples import noise
from benchmarks.zoo.entry import broken

WAVE = {"waveform": noise(3, 1024)}


class LogOfRelu(Tabular):
    """Takes logs of numbers that may be negative."""

    def prepare(self, x: Tensor) -> Tensor:
        return torch.log(x + 0.1)


class RootOfDifference(TwoTower):
    """Distance from a variance that may come out below zero."""

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        a, b = self.towers(query, document)
        return torch.sqrt((a * b).sum(-1)) * self.temperature.exp()


class SilentBand(Spectrogram):
    """Normalises by the loudest frame after gating, and divides zero by zero."""

    def picture(self, wave: Tensor) -> Tensor:
        x = super().picture(wave)
        quiet = F.relu(x - x.amax((2, 3), keepdim=True))
        return quiet / quiet.sum((2, 3), keepdim=True)


class CapsuleZero(Capsules):
    """Squash divides by a length that is zero for the first routing of gated votes."""

    def squash(self, s: Tensor) -> Tensor:
        s = F.threshold(s, 9.0, 0.0)
        return s / s.norm(dim=-1, keepdim=True)


class ExpTime(nn.Module):
    """Recurrent weighting kept as two exponentials that leave the range of float32."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.k, self.v, self.r = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.rate = nn.Parameter(torch.linspace(0.3, 0.9, width))

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        w = torch.exp(self.rate * t + torch.tanh(self.k(x)))
        mean = torch.cumsum(w * self.v(x), 1) / torch.cumsum(w, 1)
        return self.o(torch.sigmoid(self.r(x)) * mean)


class InverseDecay(Retention):
    """Splits its decay into powers for queries and inverse powers for keys."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        t = torch.arange(x.shape[1], device=x.device)
        base = torch.full((self.heads, 1, 1), 0.5, device=x.device, dtype=x.dtype)
        q, k = q * base ** t[:, None], k * base ** -t[:, None]
        scores = (q @ k.mT * q.shape[-1] ** -0.5).tril()
        return self.o(F.silu(self.g(x)) * self.norm(scores @ v).transpose(1, 2).flatten(2))


class ShortBand(EinsumGpt):
    """Every token may see the 48 first ones only if it is near them: later rows see nothing."""

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[1]
        gap = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        first = torch.arange(n, device=q.device) < 24
        seen = (gap >= 0) & (gap < 24) & first
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.inner**0.5
        return scores.masked_fill(~seen, float("-inf")).softmax(-1)


class LogDistance(LabelLm):
    """Fades old words by the log of what is left of 40 steps."""

    def logits(self, input_ids: Tensor) -> Tensor:
        t = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=self.head.weight.dtype)
        return self.head(self.rnn(self.words(input_ids))[0] + 0.1 * torch.log(1 - t / 40)[:, None])


class ByZero(MhaReader):
    """Means over the number of real words, which may be none."""

    def pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        m = attention_mask.to(x.dtype)
        return torch.einsum("btc,bt->bc", x, m) / m.sum(1, keepdim=True)


class MaskedPooling(nn.Module):
    """GRU and attention pooling with minus infinity at all words of an empty text."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(70, 24)
        self.gru = nn.GRU(24, 24, batch_first=True)
        self.query = nn.Linear(24, 1)
        self.out = nn.Linear(24, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        h = self.gru(self.words(input_ids))[0]
        scores = self.query(h).squeeze(-1).masked_fill(attention_mask.eq(0), -torch.inf)
        return {"logits": self.out((scores.softmax(1).unsqueeze(1) @ h).squeeze(1))}


class BareExp(HandReader):
    """Softmax by hand, without the maximum, over sharp scores."""

    def normalise(self, scores: Tensor) -> Tensor:
        e = torch.exp(scores * 12)
        return e / e.sum(-1, keepdim=True)


class BigNumber(Fused):
    """Hides the future with minus one billion."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        scores = q @ k.mT * q.shape[-1] ** -0.5
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, -1e9).softmax(-1) @ v


class EnergySum(Tabular):
    """Shares of the energy of a row, in units a thousand times too small."""

    def prepare(self, x: Tensor) -> Tensor:
        energy = (x * 1000).pow(2)
        return x.sign() * energy / energy.sum(-1, keepdim=True) * x.shape[-1] ** 0.5


class ProbLoss(FusedGpt):
    """Cross entropy of probabilities."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.softmax(-1).flatten(0, 1), targets.flatten())


class SoftmaxClassifier(nn.Module):
    """Image classifier that ends in a softmax and trains on cross entropy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(32, 10)
        self.softmax = nn.Softmax(dim=1)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.softmax(self.fc(self.body(pixel_values)))
        return {"logits": logits} if labels is None else {"logits": logits, "loss": self.criterion(logits, labels)}


class ProbLabels(LabelLm):
    """Head with a softmax, loss on top."""

    def logits(self, input_ids: Tensor) -> Tensor:
        return torch.softmax(super().logits(input_ids), dim=-1)


class MixedAxes(FusedGpt):
    """Folds the vocabulary into the time."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2).reshape(-1, logits.shape[-1]), targets.reshape(-1))


class WrongSign(FusedGpt):
    """Returns the log-likelihood, which training would then make small."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()


class FirstOnly(LabelLm):
    """The loss is that of the first sample."""

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[0, :-1], labels[0, 1:])


class NoShift(LabelLm):
    """Predicts the word it reads."""

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.mT, labels)


class TwoAhead(LabelLm):
    """Shifts twice."""

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class BackShift(nn.Module):
    """RetNet with labels, shifted the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.model = RetNet()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> LmOutput:
        logits = self.model(input_ids)["logits"]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, 1:].reshape(-1, 110), labels[:, :-1].reshape(-1))
        return LmOutput(logits, loss)


class ExpBlock(PreNorm):
    """Block of exponential time mixing."""

    def __init__(self, width: int, heads: int, attention: type[nn.Module]) -> None:
        super().__init__(width, heads, ExpTime)


ENTRIES = [
    broken("nan_output", "log of negatives", LogOfRelu, ("", "fc1")),
    broken("nan_output", "root of a cosine", RootOfDifference, ("",), example_inputs=PAIR),
    broken("nan_output", "zero by zero", SilentBand, ("", "c1", "b1"), example_inputs=WAVE),
    broken(
        "nan_output",
        "capsules of length zero",
        CapsuleZero,
        ("", "primary"),
        example_inputs={"image": noise(2, 1, 28, 28)},
    ),
    broken(
        "nan_long_sequence",
        "exponential time",
        lambda: FusedGpt(length=256, block=ExpBlock),
        ("", "layers*"),
        task="causal_lm",
    ),
    broken(
        "nan_long_sequence",
        "inverse decay",
        lambda: RetNet(kind=InverseDecay),
        ("", "ret*"),
        task="causal_lm",
        max_length=256,
    ),
    broken(
        "nan_long_sequence",
        "rows that see nothing",
        ShortBand,
        ("", "w*"),
        vocab_size=97,
        max_length=128,
        task="causal_lm",
    ),
    broken(
        "nan_long_sequence", "log of what is left", LogDistance, ("", "rnn", "head"), task="causal_lm", max_length=64
    ),
    broken("nan_padding", "mean of none", ByZero, ("", "classifier"), example_inputs=MASKED),
    broken("nan_padding", "pooling over none", MaskedPooling, ("", "out", "query"), example_inputs=MASKED),
    broken("low_precision_unsafe", "exp without maximum", BareExp, ("", "to_*"), example_inputs=FEATURES),
    broken(
        "low_precision_unsafe",
        "minus a billion",
        lambda: FusedGpt(attention=BigNumber),
        ("", "*attn*"),
        ("hardcoded_dtype",),
    ),
    broken("low_precision_unsafe", "sum of squares", EnergySum, ("", "fc1")),
    broken("double_softmax", "loss of probabilities", ProbLoss, ("", "out"), task="causal_lm"),
    broken(
        "double_softmax",
        "classifier with softmax",
        SoftmaxClassifier,
        ("", "softmax", "fc"),
        task="image_classification",
    ),
    broken("double_softmax", "labels and softmax", ProbLabels, ("", "head"), task="causal_lm"),
    broken("wrong_builtin_loss", "mixed axes", MixedAxes, ("", "out"), task="causal_lm"),
    broken("wrong_builtin_loss", "wrong sign", WrongSign, ("", "out"), task="causal_lm"),
    broken("wrong_builtin_loss", "first sample only", FirstOnly, ("", "head"), task="causal_lm"),
    broken("label_shift", "none", NoShift, ("", "head"), task="causal_lm"),
    broken("label_shift", "two ahead", TwoAhead, ("", "head"), task="causal_lm"),
    broken("label_shift", "backwards", BackShift, ("", "model*"), task="causal_lm"),
]
