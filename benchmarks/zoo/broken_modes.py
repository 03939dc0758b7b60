"""Models with hidden state, noise at inference, changed inputs, or a cost that need not be."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import broken
from benchmarks.zoo.families import (
    Bert,
    ConvLm,
    Gpt,
    LstmLm,
    Mlp,
    ResNet,
    SsmLm,
    Tabular,
    Vit,
    table_example,
)  # fmt: skip
from benchmarks.zoo.parts import Attention, Bidirectional, FeedForward, FusedAttention, ResidualConv, StateSpace


class AlwaysDropped(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.2)


class FusedDropout(FusedAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)


class FreshDropout(ResNet):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(nn.Dropout(0.3)(x.mean((2, 3))))


class StubbornDropout(LstmLm):
    """Calls train() on its dropout in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.25)

    def forward(self, tokens: Tensor) -> Any:
        self.drop.train()
        return self.decoder(self.drop(self.rnn(self.embedding(tokens))[0]))


class HandmadeDropout(Mlp):
    """Masks units by hand and never asks for the mode."""

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = F.relu(layer(x))
            x = x * torch.bernoulli(torch.full_like(x, 0.8)) / 0.8
        return self.head(x)


class DroppedPaths(Vit):
    """Skips blocks at random, also at inference."""

    def forward(self, pixel_values: Tensor) -> Any:
        x = self.embed(pixel_values)
        for block in self.blocks:
            keep = (torch.rand(x.shape[0], 1, 1, device=x.device) > 0.2).to(x.dtype)
            x = x + (block(x) - x) * keep
        return self.head(self.norm(x)[:, 0])


DROPOUT = [
    broken("dropout_in_eval", "functional dropout in a feed-forward", lambda: Gpt(feed=AlwaysDropped), "blocks.*.feed", task="causal_lm"),
    broken("dropout_in_eval", "sdpa dropout", lambda: Gpt(FusedDropout), "blocks.*.attention", task="causal_lm"),
    broken("dropout_in_eval", "dropout made in forward", FreshDropout, ""),
    broken("dropout_in_eval", "dropout switched to train", StubbornDropout, ("", "drop"), ("train_eval_ignored",), task="causal_lm"),
    broken("dropout_in_eval", "dropout by hand", HandmadeDropout, "", ("nondeterministic_forward",)),
    broken("dropout_in_eval", "drop path at inference", DroppedPaths, "", ("nondeterministic_forward",)),
]  # fmt: skip


class NoisyRouter(nn.Module):
    """Adds noise to its router, also at inference."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4)
        self.experts = nn.ModuleList(FeedForward(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        shares = (scores + torch.randn_like(scores)).softmax(-1)
        return torch.stack([expert(x) for expert in self.experts], -1).mul(shares[..., None, :]).sum(-1)


class RandomCrop(ResNet):
    """Flips pictures at random inside the model."""

    def forward(self, x: Tensor) -> Any:
        if random.random() < 0.5:
            x = x.flip(-1)
        return super().forward(x)


class Sampler(nn.Module):
    """A variational encoder that samples at inference."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 32), nn.ReLU())
        self.mean, self.spread = nn.Linear(32, 8), nn.Linear(32, 8)
        self.decoder = nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        mean, spread = self.mean(hidden), self.spread(hidden)
        return self.decoder(mean + torch.randn_like(mean) * torch.exp(0.5 * spread))


class RandomStart(LstmLm):
    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens)
        h = torch.randn(2, x.shape[0], x.shape[2], device=x.device, dtype=x.dtype)
        return self.decoder(self.rnn(x, (h, torch.zeros_like(h)))[0])


class RandomOrder(Gpt):
    """Looks at a random subset of positions, drawn anew in each pass."""

    def embed(self, idx: Tensor) -> Tensor:
        places = torch.randperm(64, device=idx.device)[: idx.shape[1]].sort().values
        return self.tokens(idx) + self.positions(places)


NOISE = [
    broken("nondeterministic_forward", "noisy router", lambda: Bert(feed=NoisyRouter), "layers.*.feed", ("dropout_in_eval",), task="masked_lm"),
    broken("nondeterministic_forward", "random flips", RandomCrop, ""),
    broken("nondeterministic_forward", "sampling encoder", Sampler, ""),
    broken("nondeterministic_forward", "random first state", RandomStart, "", task="causal_lm"),
    broken("nondeterministic_forward", "random positions", RandomOrder, "", task="causal_lm"),
]  # fmt: skip


class DropoutOnlyInEval(Gpt):
    """The flag is the wrong way round."""

    def features(self, idx: Tensor) -> Tensor:
        return F.dropout(super().features(idx), 0.1, training=not self.training)


class FixedNorm(ResNet):
    """Normalises by the running statistics while training too, as a constant says."""

    def forward(self, x: Tensor) -> Any:
        bn = self.stem[1]
        x = F.relu(F.batch_norm(self.stem[0](x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False))
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class BatchStatistics(nn.Module):
    """Calls batch norm as in training, always."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, True)
        return x + F.relu(y)


class NeverEval(Mlp):
    """Overrides train so that eval has no effect on the dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = self.drop(F.relu(layer(x)))
        return self.head(x)


class SwitchedOff(Vit):
    """Calls eval() on its blocks in forward, so that their dropout never drops."""

    def forward(self, pixel_values: Tensor) -> Any:
        self.blocks.eval()
        return super().forward(pixel_values)


MODES = [
    broken("train_eval_ignored", "dropout in eval only", DropoutOnlyInEval, "", ("dropout_in_eval",), task="causal_lm"),
    broken("train_eval_ignored", "running statistics in training", FixedNorm, ("", "stem*")),
    broken("train_eval_ignored", "batch statistics at inference", lambda: ResNet(BatchStatistics), ("stages.*",), ("batch_leakage", "state_across_calls")),
    broken("train_eval_ignored", "eval has no effect", NeverEval, ("", "drop"), ("dropout_in_eval",)),
    broken("train_eval_ignored", "blocks switched to eval", SwitchedOff, ("", "blocks*")),
]  # fmt: skip


class KeptState(LstmLm):
    """Starts from where the last batch ended."""

    def __init__(self) -> None:
        super().__init__()
        self.state = None

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens)
        if self.state is not None and self.state[0].shape[1] != x.shape[0]:
            self.state = None
        out, state = self.rnn(x, self.state)
        self.state = tuple(part.detach() for part in state)
        return self.decoder(out)


class Counting(Gpt):
    """Scales by the number of calls so far."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def features(self, idx: Tensor) -> Tensor:
        self.calls += 1
        return super().features(idx) * (1 + 0.1 * self.calls)


class RunningMean(nn.Module):
    """Updates its running mean at inference too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.centre.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
        return x + F.relu(y - self.centre[:, None, None])


class KeptKeys(Attention):
    """Keeps the first key of the last call and attends to it as well."""

    last: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        if self.last is not None:
            y = y + self.last
        self.last = y.detach().mean((0, 1))
        return y


class Drifting(Tabular):
    """Updates its table a little in each pass."""

    def join(self, categories: Tensor, numbers: Tensor) -> Tensor:
        with torch.no_grad():
            self.tables[0].weight.mul_(0.99)
        return super().join(categories, numbers)


STATE = [
    broken("state_across_calls", "lstm keeps its state", KeptState, "", task="causal_lm"),
    broken("state_across_calls", "calls are counted", Counting, "", task="causal_lm"),
    broken("state_across_calls", "running mean at inference", lambda: ResNet(RunningMean), ("stages.*",)),
    broken("state_across_calls", "key of the last call", lambda: Gpt(KeptKeys), ("blocks.*.attention",), task="causal_lm"),
    broken("state_across_calls", "weights shrink", Drifting, ("", "tables.0*"), example_inputs=table_example()),
]  # fmt: skip


class MutatedIds(Gpt):
    """Replaces the id 0 in the caller's batch."""

    def features(self, idx: Tensor) -> Tensor:
        idx[idx < 8] = 8
        return super().features(idx)


class MutatedPicture(ResNet):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sub_(0.5).div_(0.25))


class MutatedFeatures(nn.Module):
    """Rectifies its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Linear(18, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.act(x))


class MutatedMask(Bert):
    """Turns the caller's mask into a bias, in place."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        if attention_mask is None:
            return super().forward(input_ids)
        kept = attention_mask.clone()
        attention_mask.sub_(1).mul_(10000)
        return super().forward(input_ids, kept)


class MutatedNumbers(Tabular):
    def join(self, categories: Tensor, numbers: Tensor) -> Tensor:
        numbers[:, 0] = numbers[:, 0].clamp(min=0)
        numbers -= 0.1
        return super().join(categories, numbers)


MUTATION = [
    broken("input_mutation", "ids replaced", MutatedIds, "", task="causal_lm"),
    broken("input_mutation", "picture normalised in place", MutatedPicture, ""),
    broken("input_mutation", "features rectified in place", MutatedFeatures, ("", "act")),
    broken("input_mutation", "mask made a bias", MutatedMask, "", task="masked_lm"),
    broken("input_mutation", "numbers clamped in place", MutatedNumbers, "", example_inputs=table_example()),
]  # fmt: skip


class KeptLogits(Gpt):
    def __init__(self) -> None:
        super().__init__()
        self.history = []

    def forward(self, idx: Tensor) -> Any:
        logits = super().forward(idx)
        self.history.append(logits)
        return logits


class KeptFeatures(ResidualConv):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.seen = {}

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.seen[len(self.seen)] = y.detach().clone()
        return y


class KeptWeights(Bidirectional):
    """Appends its attention maps for a plot."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.maps = []

    def weights(self, scores: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        self.maps.append(weights.detach())
        return weights


class GrownBuffer(Mlp):
    """Concatenates what it saw to a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(0, 64)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = F.relu(layer(x))
        self.memory = torch.cat((self.memory.to(x), x.detach()))
        return self.head(x)


GROWTH = [
    broken("memory_growth", "gpt keeps its logits", KeptLogits, "", task="causal_lm"),
    broken("memory_growth", "convolutions keep features", lambda: ResNet(KeptFeatures), ("stages.*",)),
    broken("memory_growth", "attention keeps its maps", lambda: Bert(KeptWeights), ("layers.*.attention",), task="masked_lm"),
    broken("memory_growth", "memory concatenated", GrownBuffer, ("", "memory")),
]  # fmt: skip


class OuterGate(StateSpace):
    """Forms all pairs of steps although a scan would do."""

    def mix(self, x: Tensor) -> Tensor:
        pairs = x[:, :, None, :] * torch.sigmoid(self.decay)
        past = torch.ones(x.shape[1], x.shape[1], device=x.device, dtype=x.dtype).tril()
        return (pairs.transpose(1, 2).expand(-1, x.shape[1], -1, -1) * past[..., None]).mean(2)


class LinearInName(FusedAttention):
    """Kernel features, multiplied in the wrong order."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
        scores = scores.tril()
        return (scores @ v) / (scores.sum(-1, keepdim=True) + 1e-6)


class PairwiseEncoder(nn.Module):
    """Adds a feature of all pairs of steps, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 24)
        self.pair = nn.Linear(24, 24)
        self.rnn = nn.GRU(24, 24, batch_first=True)
        self.head = nn.Linear(24, 80)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.rnn(self.embedding(input_ids))[0]
        gap = torch.tanh(self.pair(x)[:, :, None] - self.pair(x)[:, None])
        return self.head(x + gap.mean(2))


class WindowByMask(Attention):
    """A sliding window that is cut out of the full square."""

    def allowed(self, length: int, device: torch.device) -> Tensor:
        square = torch.ones(length, length, dtype=torch.bool, device=device)
        return square.tril() & square.triu(-8)


def long_gpt(attention: type) -> nn.Module:
    return Gpt(attention, length=2048)


QUADRATIC = [
    broken("quadratic_memory", "pairs of steps", lambda: SsmLm(OuterGate), ("mixers.*", ""), task="causal_lm", linear_memory=True),
    broken("quadratic_memory", "linear attention in the wrong order", lambda: long_gpt(LinearInName), ("blocks.*.attention", ""), task="causal_lm", linear_memory=True),
    broken("quadratic_memory", "differences of all steps", PairwiseEncoder, "", task="masked_lm", linear_memory=True),
    broken("quadratic_memory", "window cut from the square", lambda: long_gpt(WindowByMask), ("blocks.*.attention", ""), task="causal_lm", linear_memory=True),
]  # fmt: skip


class LoopedAttention(Attention):
    """Computes each score in Python."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        rows = [[(q[:, :, i] * k[:, :, j]).sum(-1) for j in range(k.shape[2])] for i in range(q.shape[2])]
        return torch.stack([torch.stack(row, -1) for row in rows], -2) / q.shape[-1] ** 0.5


class LoopedEmbedding(LstmLm):
    """Looks words up one at a time, sample by sample."""

    def forward(self, tokens: Tensor) -> Any:
        rows = [torch.stack([self.embedding(token) for token in row]) for row in tokens]
        return self.decoder(self.rnn(torch.stack(rows))[0])


class LoopedConv(nn.Module):
    """A causal convolution written as a loop over steps and taps."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Linear(width, width) for _ in range(kernel))
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        steps = []
        for t in range(x.shape[1]):
            step = torch.zeros_like(x[:, 0])
            for number, tap in enumerate(self.taps):
                if t - number * self.dilation >= 0:
                    step = step + tap(x[:, t - number * self.dilation])
            steps.append(step)
        return torch.stack(steps, 1)


class LoopedFeed(FeedForward):
    """Applies the feed-forward to each token alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(LoopedFeed, self).forward(x[:, t]) for t in range(x.shape[1])], 1)


SLOW = [
    broken("slow_python_loop", "scores one by one", lambda: Gpt(LoopedAttention), ("blocks.*.attention",), task="causal_lm"),
    broken("slow_python_loop", "words one by one", LoopedEmbedding, ("", "embedding"), task="causal_lm"),
    broken("slow_python_loop", "convolution by loop", lambda: ConvLm(LoopedConv), ("convs.*",), task="causal_lm"),
    broken("slow_python_loop", "feed-forward per token", lambda: Bert(feed=LoopedFeed), ("layers.*.feed",), task="masked_lm"),
]  # fmt: skip

ENTRIES = DROPOUT + NOISE + MODES + STATE + MUTATION + GROWTH + QUADRATIC + SLOW
