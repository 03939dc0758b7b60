"""Models whose numbers overflow, and models with the wrong loss."""

# ruff: noqa: D102

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_a.broken_information import with_attention, with_heads
from benchmarks.unseen_a.sound_language import Heads, Llamaish, PocketGPT
from benchmarks.unseen_a.sound_others import MeanPooled, SelfAttend
from benchmarks.zoo.entry import broken, initialised


class MaskTimesInf(Heads):
    """Zero times minus infinity in the additive mask."""

    def mix(self, q, k, v):
        t = q.shape[2]
        later = torch.ones(t, t, device=q.device, dtype=q.dtype).triu(1)
        return ((q @ k.mT) / math.sqrt(q.shape[-1]) + later * float("-inf")).softmax(-1) @ v


class EntropyGate(nn.Module):
    """The entropy of masked attention: zero times the log of zero."""

    def __init__(self, vocab=60, d=32):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Parameter(torch.zeros(64, d).normal_(std=0.1))
        self.qk = nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, vocab)

    def forward(self, idx):
        x = self.emb(idx) + self.pos[: idx.shape[1]]
        q, k = self.qk(x).chunk(2, -1)
        hide = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
        p = (q @ k.mT / 32**0.5).masked_fill(hide, float("-inf")).softmax(-1)
        certainty = torch.exp((p * p.log()).sum(-1, keepdim=True))
        return self.out(x + certainty * (p @ x))


class SpatialStd(nn.Module):
    """Divides by the unbiased deviation of a map that has shrunk to one pixel."""

    def __init__(self):
        super().__init__()
        self.c = nn.ModuleList([nn.Conv2d(3, 16, 3, 2, 1)] + [nn.Conv2d(16, 16, 3, 2, 1) for _ in range(3)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        for conv in self.c:
            x = F.relu(conv(x))
        x = self.pool(x)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-5)
        return self.fc(x.flatten(1))


class DecayedSums(nn.Module):
    """Retention by a ratio of powers: the powers underflow in a long sequence."""

    def __init__(self, vocab=60, d=32, gamma=0.6):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.mix = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)
        self.unembed = nn.Linear(d, vocab)
        self.gamma = gamma

    def forward(self, input_ids):
        x = self.embed(input_ids)
        power = self.gamma ** torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        summed = power * (self.mix(x) / power).cumsum(1)
        return self.unembed(self.norm(x + summed))


class ExpPositions(Heads):
    """A recency bias through exp without subtracting the largest exponent."""

    def mix(self, q, k, v):
        t = q.shape[2]
        at = torch.arange(t, device=q.device, dtype=q.dtype)
        near = (torch.exp(1.5 * at) * torch.ones_like(at)[:, None]).tril()
        w = torch.exp(q @ k.mT / math.sqrt(q.shape[-1])) * near
        return (w / w.sum(-1, keepdim=True)) @ v


class RunningSoftmax(nn.Module):
    """Causal pooling by unnormalised exponentials of growing positions."""

    def __init__(self, vocab=55, d=24):
        super().__init__()
        self.e = nn.Embedding(vocab, d)
        self.score = nn.Linear(d, 1)
        self.o = nn.Linear(2 * d, vocab)

    def forward(self, tokens):
        x = self.e(tokens)
        steps = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        w = torch.exp(self.score(x) + 0.7 * steps[:, None])
        return self.o(torch.cat((x, (w * x).cumsum(1) / w.cumsum(1)), -1))


class BothSidesMasked(SelfAttend):
    """Masks queries as well as keys: rows of padding have nothing to attend to."""

    def weights(self, scores, mask):
        both = mask[:, None, :, None] * mask[:, None, None, :]
        return scores.masked_fill(both == 0, float("-inf")).softmax(-1)


class LeftPadded(nn.Module):
    """Causal and padding masks together leave left padding without keys."""

    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(85, 32), nn.Embedding(64, 32)
        self.proj_in, self.proj_out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.ln, self.head = nn.LayerNorm(32), nn.Linear(32, 85)

    def layer(self, x, keep):
        q, k, v = self.proj_in(self.ln(x)).chunk(3, -1)
        score = (q @ k.mT / 32**0.5).masked_fill(~keep, float("-inf"))
        return x + self.proj_out(score.softmax(-1) @ v)

    def forward(self, input_ids, attention_mask=None):
        t = input_ids.shape[1]
        keep = torch.ones(1, t, t, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            keep = keep & attention_mask[:, None, :].bool()
        x = self.emb(input_ids) + self.pos.weight[:t]
        return self.head(self.layer(self.layer(x, keep), keep))


class DividesByCount(MeanPooled):
    """Mean of real tokens without a floor under the count."""

    def pool(self, x, mask):
        m = mask[..., None].to(x.dtype)
        return (x * m).sum(1) / m.sum(1)


class MinusBillion(Heads):
    """Fills with -1e9, which half precision cannot hold."""

    def mix(self, q, k, v):
        t = q.shape[2]
        hide = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hide, -1e9).softmax(-1) @ v


class SquaredSum(nn.Module):
    """Sums squares in the precision of the input, which overflows in half."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * self.weight


class LoudStream(nn.Module):
    """Pixel values up to 255 enter as they are; their squares overflow in the norm."""

    def __init__(self):
        super().__init__()
        self.scale = 255.0
        self.embed = nn.Linear(28, 64)
        self.norm = SquaredSum(64)
        self.mlp = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def forward(self, features):
        return self.mlp(self.norm(self.embed(features * self.scale)))


class Kelvin(nn.Module):
    """Variance as the mean of squares less the square of the mean, far from zero."""

    def __init__(self, sensors=18):
        super().__init__()
        self.hidden = nn.Linear(sensors, 48)
        self.cls = nn.Linear(48, 4)

    def standard(self, kelvin):
        mean = kelvin.mean(-1, keepdim=True)
        return (kelvin - mean) / ((kelvin * kelvin).mean(-1, keepdim=True) - mean * mean + 1e-3).sqrt()

    def forward(self, celsius):
        return self.cls(F.gelu(self.hidden(self.standard(10.0 * celsius + 273.15))))


class SoftmaxThenCE(nn.Module):
    """Softmax in `forward`, cross entropy over its result in `loss`."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(24, 10)

    def forward(self, x, labels=None):
        probs = self.fc(self.conv(x).mean((2, 3))).softmax(1)
        if labels is not None:
            return probs, F.cross_entropy(probs, labels)
        return probs


def softmax_last():
    """A classifier that ends in a softmax, for a trainer with cross entropy."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 8),
        nn.Softmax(dim=1),
    )


class SoftmaxLM(PocketGPT):
    """Next-token probabilities where logits are expected."""

    def forward(self, idx):
        return super().forward(idx).softmax(-1)


class RawNLL(nn.Module):
    """Negative log-likelihood of raw logits."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(66, 32)
        self.lstm = nn.LSTM(32, 48, batch_first=True)
        self.out = nn.Linear(48, 66)

    def forward(self, input_ids, labels=None):
        logits = self.out(self.lstm(self.emb(input_ids))[0])
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.nll_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


class ScrambledView(Llamaish):
    """Transposes for cross entropy and then flattens: classes and positions mix."""

    def loss_of(self, logits, labels):
        flat = logits[:, :-1].transpose(1, 2).reshape(-1, logits.shape[-1])
        return F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)


class SumOfAll(Llamaish):
    """The loss is a sum, so it grows with batch and length."""

    def loss_of(self, logits, labels):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


class NoShift(Llamaish):
    """Asks each position for the token it has just read."""

    def loss_of(self, logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


class Backwards(Llamaish):
    """Shifts the wrong side: asks for the token before."""

    def loss_of(self, logits, labels):
        return F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten(), ignore_index=-100)


class TwiceShifted(Llamaish):
    """Shifted in the collator of another project, and twice here."""

    def loss_of(self, logits, labels):
        return F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten(), ignore_index=-100)


ENTRIES = [
    broken("nan_output", "mask_times_infinity", lambda: with_heads(MaskTimesInf), "layers.*.att*"),
    broken("nan_output", "entropy_of_masked", EntropyGate, ""),
    broken("nan_output", "deviation_of_one_pixel", SpatialStd, ("pool*", "")),
    broken("nan_long_sequence", "powers_underflow", DecayedSums, ("mix*", "norm*", ""), max_length=512),
    broken("nan_long_sequence", "exp_of_positions", lambda: with_heads(ExpPositions), "layers.*.att*", max_length=64),
    broken("nan_long_sequence", "running_exponentials", RunningSoftmax, ("score*", "", "o*"), max_length=256),
    broken("nan_padding", "queries_masked", lambda: with_attention(BothSidesMasked), "layers.*.self_attn*"),
    broken("nan_padding", "left_padding_without_keys", LeftPadded, ("proj_*", "")),
    broken("nan_padding", "count_without_floor", lambda: initialised(DividesByCount()), ""),
    broken("low_precision_unsafe", "minus_a_billion", lambda: with_heads(MinusBillion), "layers.*.att*"),
    broken("low_precision_unsafe", "sum_of_loud_squares", LoudStream, ("norm*", "embed*", "")),
    broken("low_precision_unsafe", "variance_far_from_zero", Kelvin, ("", "hidden*")),
    broken("double_softmax", "softmax_then_cross_entropy", SoftmaxThenCE, ("", "fc*")),
    broken("double_softmax", "sequential_softmax", softmax_last, ("", "7", "6"), task="image_classification"),
    broken("double_softmax", "probabilities_of_tokens", lambda: initialised(SoftmaxLM()), ("", "head*")),
    broken("wrong_builtin_loss", "nll_of_logits", RawNLL, ""),
    broken("wrong_builtin_loss", "transposed_flatten", lambda: initialised(ScrambledView()), ""),
    broken("wrong_builtin_loss", "summed", lambda: initialised(SumOfAll()), ""),
    broken("label_shift", "not_shifted", lambda: initialised(NoShift()), "", task="causal_lm"),
    broken("label_shift", "wrong_side", lambda: initialised(Backwards()), "", task="causal_lm"),
    broken("label_shift", "twice", lambda: initialised(TwiceShifted()), "", task="causal_lm"),
]
