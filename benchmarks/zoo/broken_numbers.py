"""Models that give NaN, fail in low precision, or are tied to one device or dtype, or cannot go backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import broken, sinusoids
from benchmarks.zoo.families import (
    Bert,
    Gpt,
    LstmLm,
    Mlp,
    ResNet,
    SsmLm,
    Tabular,
    TorchEncoder,
    Vit,
    table_example,
)  # fmt: skip
from benchmarks.zoo.parts import (
    Attention,
    Bidirectional,
    FusedAttention,
    ResidualConv,
    StateSpace,
)  # fmt: skip


class LogOfRelu(Mlp):
    """Takes the logarithm of what ReLU set to zero, and its differences."""

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        logs = x.log()
        return self.head(F.relu(self.layers[-1](logs - logs.mean(-1, keepdim=True))))


class RootOfDifference(ResNet):
    """A variance that rounding makes negative, under a root."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        spread = (x.mean((2, 3)) - x.amax((2, 3))).sqrt()
        return self.fc(spread)


class DoubleInfinity(Attention):
    """Hides with infinity times the mask: zero times infinity is NaN."""

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        hidden = ~self.allowed(scores.shape[-1], scores.device)
        return scores + hidden.to(scores.dtype) * float("-inf")


class ZeroNorm(nn.Module):
    """Divides by a norm without epsilon; the rectified features are sometimes all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 24, padding_idx=0)
        self.head = nn.Linear(24, 90)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        gate = (x - x).sum(-1, keepdim=True)
        return self.head(x * gate / gate.norm(dim=-1, keepdim=True))


def uninitialised_bias() -> nn.Module:
    """Holds a NaN in one weight, as a failed checkpoint leaves it."""
    model = Vit()
    with torch.no_grad():
        model.blocks[1].feed.up.bias[3] = float("nan")
    return model


NAN = [
    broken("nan_output", "logarithm of a rectified zero", LogOfRelu, ""),
    broken("nan_output", "root of a negative number", RootOfDifference, ""),
    broken("nan_output", "infinity times zero", lambda: Gpt(DoubleInfinity), "blocks.*.attention", task="causal_lm"),
    broken("nan_output", "division by a norm of zero", ZeroNorm, "", task="masked_lm"),
    broken("nan_output", "NaN in a bias", uninitialised_bias, "blocks.1.feed*"),
]  # fmt: skip


class GrowingBias(Attention):
    """A distance bias that grows exponentially with the distance."""

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        steps = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
        gap = (steps[:, None] - steps[None, :]).clamp(min=0)
        return super().masked(scores - torch.exp(3.0 * gap) + torch.exp(3.0 * gap), mask)


class RunningProduct(StateSpace):
    """Divides by a decay that has underflowed after some tens of steps."""

    def mix(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        decay = torch.exp(-2.0 * steps * torch.sigmoid(self.decay))
        return (x / decay).cumsum(1) * decay


class ExpPositions(TorchEncoder):
    """Weighs positions by exp(2 t), which overflows at 45."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids) + self.pos[: input_ids.shape[1]]
        weight = torch.exp(2.0 * torch.arange(x.shape[1], device=x.device, dtype=x.dtype))
        share = weight.cumsum(0) / weight.cumsum(0).flip(0).sum()
        x = x * (1 + share * 0.0)[:, None]
        mask = self.mask(input_ids.shape[1], x.device)
        return self.proj(self.encoder(x, mask=mask, src_key_padding_mask=self.hide(attention_mask)))


class ExplodingState(nn.Module):
    """A linear recurrence with a factor of five per step."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, width)
        self.loop = nn.Linear(width, width, bias=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 80)
        nn.init.orthogonal_(self.loop.weight, gain=8.0)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        state, states = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = self.loop(state) + x[:, step]
            states.append(state)
        return self.head(self.norm(torch.stack(states, 1)))


NAN_LONG = [
    broken("nan_long_sequence", "bias exponential in the distance", lambda: Gpt(GrowingBias), "blocks.*.attention", task="causal_lm", max_length=64),
    broken("nan_long_sequence", "division by a vanished decay", lambda: SsmLm(RunningProduct), "mixers.*", task="causal_lm", max_length=256),
    broken("nan_long_sequence", "positions weighted by exp", ExpPositions, "", task="masked_lm", max_length=64),
    broken("nan_long_sequence", "recurrence times eight", ExplodingState, ("", "loop*"), ("exploding_gradient",), task="causal_lm", max_length=256),
]  # fmt: skip


class InfiniteMask(Bidirectional):
    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return scores
        return scores.masked_fill(~mask.bool()[:, None, None, :], float("-inf"))


class CausalAndPadding(Attention):
    """With left padding the first rows see nothing."""

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        allowed = self.allowed(scores.shape[-1], scores.device)
        if mask is not None:
            allowed = allowed & mask.bool()[:, None, None, :]
        return scores.masked_fill(~allowed, float("-inf"))


class MaskedGpt(Gpt):
    """A decoder that takes a mask of real tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.head(self.norm(x))


class MeanOfNone(Bert):
    """Divides by the number of real tokens, which may be zero."""

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x.mean(1)
        share = mask.to(x.dtype)[..., None]
        return (x * share).sum(1) / share.sum(1)


class PoolOfNone(nn.Module):
    """Attention pooling with infinities over a padded text."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, width)
        self.conv = nn.Conv1d(width, width, 1)
        self.query = nn.Linear(width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = F.gelu(self.conv(self.embedding(input_ids).transpose(1, 2))).transpose(1, 2)
        scores = self.query(x)[..., 0]
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask == 0, float("-inf"))
        return self.head((x * scores.softmax(1)[..., None]).sum(1))


class HeadMha(nn.Module):
    """`nn.MultiheadAttention` with weights, whose softmax over padding only is NaN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(x, x, x, key_padding_mask=None if mask is None else mask == 0)[0]


NAN_PADDING = [
    broken("nan_padding", "bert masks with infinity", lambda: Bert(InfiniteMask), "layers.*.attention*", task="masked_lm"),
    broken("nan_padding", "causal mask and left padding", lambda: MaskedGpt(CausalAndPadding), "blocks.*.attention*", task="causal_lm"),
    broken("nan_padding", "mean of no tokens", lambda: MeanOfNone(labels=4), "", task="text_classification", num_labels=4),
    broken("nan_padding", "pooling of no tokens", PoolOfNone, "", ("position_absent",), task="text_classification"),
    broken("nan_padding", "multihead attention", lambda: Bert(HeadMha), ("layers.*.attention*",), task="masked_lm"),
]  # fmt: skip


class BigNegative(Attention):
    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.masked_fill(~self.allowed(scores.shape[-1], scores.device), -1e9)


class ExpWithoutMax(Bidirectional):
    """A softmax of its own, on scores that were scaled up."""

    def weights(self, scores: Tensor) -> Tensor:
        powers = torch.exp(scores + 12.0)
        return powers / powers.sum(-1, keepdim=True)


class SquaredNorm(nn.Module):
    """A norm that sums squares of numbers near a thousand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = 1000.0 * x
        return x / (x * x).sum(-1, keepdim=True).sqrt().clamp(min=1e-6) * self.weight * x.shape[-1] ** 0.5


class LoudResNet(ResNet):
    """Works on pictures in units of 1e5."""

    def forward(self, x: Tensor) -> Any:
        return super().forward((x * 1e5) * 1e-5)


class TinyEpsilon(nn.Module):
    """Batch of features over their own spread, whose epsilon is zero in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inlet(x))
        low = x - x.amax(-1, keepdim=True)
        return self.head(low / (low * 0 + 1e-9) * 1e-9)


def gpt_with_squared_norm() -> nn.Module:
    model = Gpt()
    model.norm = SquaredNorm(48)
    return model


LOW = [
    broken("low_precision_unsafe", "mask of -1e9", lambda: Gpt(BigNegative), "blocks.*.attention", ("hardcoded_dtype",), task="causal_lm"),
    broken("low_precision_unsafe", "exp without a maximum", lambda: Bert(ExpWithoutMax), "layers.*.attention", task="masked_lm"),
    broken("low_precision_unsafe", "sum of squares overflows", gpt_with_squared_norm, "norm", task="causal_lm"),
    broken("low_precision_unsafe", "pictures times 1e5", LoudResNet, ""),
    broken("low_precision_unsafe", "epsilon of zero", TinyEpsilon, ""),
]  # fmt: skip


class CpuPositions(Gpt):
    def embed(self, idx: Tensor) -> Tensor:
        return self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device="cpu"))


class CpuState(LstmLm):
    def forward(self, tokens: Tensor) -> Any:
        h = torch.zeros(2, tokens.shape[0], 48, device=torch.device("cpu"))
        return self.decoder(self.rnn(self.embedding(tokens), (h, h.clone()))[0])


class CpuMask(FusedAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        allowed = torch.ones(q.shape[-2], q.shape[-2]).tril().bool()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


class DeviceFromStart(ResNet):
    """Remembers the device at construction and moves its features there."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)).to(self.device))


class CpuNoise(Tabular):
    """Adds a constant column that is made on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body[0] = nn.LayerNorm(31), nn.Linear(31, 64)

    def join(self, categories: Tensor, numbers: Tensor) -> Tensor:
        return torch.cat((super().join(categories, numbers), torch.ones(len(numbers), 1).type(numbers.dtype)), -1)


DEVICE = [
    broken("hardcoded_device", "gpt positions on the cpu", CpuPositions, ("", "positions"), task="causal_lm"),
    broken("hardcoded_device", "lstm state on the cpu", CpuState, ("", "rnn"), ("hardcoded_dtype",), task="causal_lm"),
    broken("hardcoded_device", "sdpa mask on the cpu", lambda: Gpt(CpuMask), "blocks.*.attention", task="causal_lm"),
    broken("hardcoded_device", "device remembered", DeviceFromStart, ("", "fc")),
    broken("hardcoded_device", "constant column on the cpu", CpuNoise, "", example_inputs=table_example()),
]  # fmt: skip


class FloatState(LstmLm):
    def forward(self, tokens: Tensor) -> Any:
        h = torch.zeros(2, tokens.shape[0], 48, device=tokens.device, dtype=torch.float32)
        return self.decoder(self.rnn(self.embedding(tokens), (h, h))[0])


class FloatSinusoids(Bert):
    def embed(self, input_ids: Tensor) -> Tensor:
        table = sinusoids(input_ids.shape[1], 48).to(input_ids.device)
        return self.tokens(input_ids) + 0.02 * table


class FloatSoftmax(Attention):
    """Computes weights in float32 and does not cast back."""

    def weights(self, scores: Tensor) -> Tensor:
        return scores.float().softmax(-1)


class FloatPool(ResNet):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.float().mean((2, 3)))


class FloatTime(nn.Module):
    """Concatenates a float32 clock to its features."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.out = nn.Linear(9, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        clock = torch.linspace(0, 1, x.shape[1], device=x.device).expand(x.shape[0], -1)[..., None]
        return self.out(F.relu(self.inlet(torch.cat((x, clock), -1))).mean(1))


DTYPE = [
    broken("hardcoded_dtype", "lstm state in float32", FloatState, ("", "rnn"), task="causal_lm"),
    broken("hardcoded_dtype", "sinusoids in float32", FloatSinusoids, ("", "norm"), task="masked_lm"),
    broken("hardcoded_dtype", "weights not cast back", lambda: Gpt(FloatSoftmax), "blocks.*.attention", task="causal_lm"),
    broken("hardcoded_dtype", "pooling in float32", FloatPool, ("", "fc")),
    broken("hardcoded_dtype", "clock in float32", FloatTime, ("", "inlet"), example_inputs={"x": torch.arange(2 * 12 * 8.0).sin().view(2, 12, 8)}),
]  # fmt: skip


class InPlaceSigmoid(Mlp):
    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
            x += 1
        return self.head(x)


class InPlaceSoftmax(Bidirectional):
    def weights(self, scores: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        weights *= 0.5
        return weights


class ReluThenAdd(ResidualConv):
    """Changes in place what the ReLU before it needs."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        z = self.conv2(y)
        y.mul_(2)
        return F.relu(x + self.bn2(z))


class NoGradGpt(Gpt):
    """Decorated for inference."""

    @torch.no_grad()
    def forward(self, idx: Tensor) -> Any:
        return super().forward(idx)


class WrongBackward(torch.autograd.Function):
    """Straight-through rounding whose backward returns two gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient


class QuantisedLstm(LstmLm):
    def forward(self, tokens: Tensor) -> Any:
        return self.decoder(WrongBackward.apply(self.rnn(self.embedding(tokens))[0] * 8) / 8)


BACKWARD = [
    broken("backward_crash", "sigmoid changed in place", InPlaceSigmoid, ""),
    broken("backward_crash", "softmax changed in place", lambda: Bert(InPlaceSoftmax), "layers.*.attention", task="masked_lm"),
    broken("backward_crash", "convolution's input changed", lambda: ResNet(ReluThenAdd), "stages.*"),
    broken("backward_crash", "whole model under no_grad", NoGradGpt, "", ("detached_submodule",), task="causal_lm"),
    broken("backward_crash", "wrong backward function", QuantisedLstm, "", task="causal_lm"),
]  # fmt: skip

ENTRIES = NAN + NAN_LONG + NAN_PADDING + LOW + DEVICE + DTYPE + BACKWARD
