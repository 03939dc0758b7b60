"""What bites at saving, moving, casting or the first step."""
# ruff: noqa: D102

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.holdout.bodies_pictures import Denoiser, Generator, Mixer, Unet
from benchmarks.holdout.bodies_readers import HandReader, MhaReader
from benchmarks.holdout.bodies_tables import Forecaster, GraphNet, StateSpace, Tabular, TwoTower
from benchmarks.holdout.bodies_text import EinsumGpt, FusedGpt, LabelLm, PreNorm, Translator, WaveLm
from benchmarks.holdout.broken_information import FEATURES, MASKED, PAIR, TRANSLATION
from benchmarks.holdout.samples import ids, noise
from benchmarks.zoo.entry import broken

SERIES = {"series": noise(4, 10, 5)}
SIGNAL = {"signal": noise(3, 24, 8)}
IMAGE = {"image": noise(2, 3, 32, 32)}


class FourierRows(Tabular):
    """Random Fourier features in a plain attribute."""

    def __init__(self) -> None:
        super().__init__(cin=64)
        self.frequencies = torch.randn(20, 32)

    def prepare(self, x: Tensor) -> Tensor:
        angles = x @ self.frequencies
        return torch.cat((angles.sin(), angles.cos()), -1)


class RandomProjection(HandReader):
    """Keys hashed by a random matrix that no checkpoint keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.hashing = torch.randn(16, 16) / 4

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q @ self.hashing, k @ self.hashing)


class FixedPermutation(WaveLm):
    """Mixes channels by a permutation drawn when the model is made."""

    def __init__(self) -> None:
        super().__init__()
        self.order = torch.randn(32)

    def pad(self, i: int, x: Tensor) -> Tensor:
        return super().pad(i, x * torch.sigmoid(self.order)[:, None])


class NotPersistent(Generator):
    """A random picture that is added to all others, kept out of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("canvas", torch.randn(1, 3, 16, 16), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) + self.canvas


class Repeated(FusedGpt):
    """A list of one block, times four."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PreNorm(48, 4)] * 4)
        self.layers.apply(self.begin)


class Chained(HandReader):
    """Keys and values from one assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = self.to_v = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))


class SameNorm(nn.Module):
    """Convolutions built in a loop around one and the same layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        unit = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.body = nn.Sequential(*[unit for _ in range(3)])
        self.fc = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(image)).mean((2, 3)))


class CpuSteps(EinsumGpt):
    """Positions without a device."""

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1])[:, None] * 100.0 ** -(torch.arange(half) / half)
        cos, sin = angle.cos()[None, :, None].to(x.dtype), angle.sin()[None, :, None].to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class CpuState(Forecaster):
    """Hidden state made on the processor."""

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], self.width, dtype=x.dtype)


class BackToCpu(Unet):
    """Brings the features to the processor between two levels."""

    def grow(self, x: Tensor, like: Tensor) -> Tensor:
        return super().grow(x.to("cpu"), like)


class FloatMessages(GraphNet):
    """Casts its nodes to float32 first."""

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        return super().forward(nodes.to(torch.float32), adjacency.to(torch.float32))


class FloatHot(nn.Module):
    """Bigram model from float32 one-hot rows and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(60, 32) * 0.5)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.out = nn.Linear(32, 60)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.gru(F.one_hot(input_ids, 60).float() @ self.table)[0])


class FloatState(LabelLm):
    """First state in float32, whatever the weights are."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        h0 = torch.zeros(2, x.shape[0], 40, device=x.device)
        return self.head(self.rnn(x, h0)[0])


class FloatClock(Denoiser):
    """The clock comes in float32."""

    def clock(self, t: Tensor) -> Tensor:
        return torch.cat(
            (torch.sin(t.float()[:, None] * self.rates(t)), torch.cos(t.float()[:, None] * self.rates(t))), -1
        )

    def rates(self, t: Tensor) -> Tensor:
        return torch.exp(-0.86 * torch.arange(8, device=t.device, dtype=torch.float32))


class PadElsewhere(nn.Module):
    """Sentence classifier; its table believes that padding is 1, its settings say 0."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.words = nn.Embedding(80, 24, padding_idx=padding)
        self.conv = nn.Conv1d(24, 32, 3, padding=1)
        self.fc = nn.Linear(32, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        m = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.words(input_ids) * m[..., None]
        x = F.relu(self.conv(x.mT)).masked_fill(m[:, None] == 0, 0)
        return self.fc(x.amax(-1))


class PadLast(MhaReader):
    """Padding is the last id, the table says the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32, padding_idx=98)


class PadSource(Translator):
    """The source's table protects the start token."""

    def __init__(self) -> None:
        super().__init__()
        self.src_emb = nn.Embedding(80, 32, padding_idx=2)


class InPlaceSigmoid(StateSpace):
    """Changes in place what a sigmoid keeps for its gradient."""

    def scan(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        y = super().scan(x) * gate
        gate += 1
        return y


class InPlaceNorm(TwoTower):
    """Divides in place after the norm was taken through exp."""

    def towers(self, query: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
        a, b = super().towers(query, document)
        e = torch.exp(a)
        e /= e.sum(-1, keepdim=True)
        return a + e, b


class Floor(torch.autograd.Function):
    """Rounding with a gradient of the wrong shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad * (x.abs() < 4)).sum(0)[1:]


class Quantised(Mixer):
    """Rounds its pooled features by its own function."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(Rounding(), nn.Linear(24, 10))


class Rounding(nn.Module):
    """Layer around that function."""

    def forward(self, x: Tensor) -> Tensor:
        return Floor.apply(x)


class OldGraph(LabelLm):
    """Carries its hidden state over with the graph of the last call, only while training."""

    def __init__(self) -> None:
        super().__init__()
        self.carried: Tensor | None = None

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        h = self.carried
        if not self.training or h is None or h.shape[1] != x.shape[0]:
            h = x.new_zeros(2, x.shape[0], 40)
        y, h = self.rnn(x, h)
        if self.training:
            self.carried = h
        return self.head(y)


NOISY = {"noisy": noise(3, 1, 16, 16), "t": ids(3, high=900)}
NODES = {"nodes": noise(3, 6, 7), "adjacency": noise(3, 6, 6).abs()}
ENTRIES = [
    broken(
        "buffer_not_registered",
        "fourier features",
        FourierRows,
        ("", "frequencies"),
        ("hardcoded_device", "hardcoded_dtype"),
        example_inputs={"x": noise(5, 20)},
    ),
    broken("buffer_not_registered", "random projection", RandomProjection, ("", "hashing"), example_inputs=FEATURES),
    broken("buffer_not_registered", "random gates", FixedPermutation, ("", "order"), task="causal_lm"),
    broken(
        "buffer_not_registered",
        "random canvas not persistent",
        NotPersistent,
        ("", "canvas"),
        example_inputs={"z": noise(4, 20)},
        factory=NotPersistent,
    ),
    broken("shared_weight", "list times four", Repeated, ("layers*", ""), task="causal_lm"),
    broken("shared_weight", "chained assignment", Chained, ("to_k*", "to_v*", ""), example_inputs=FEATURES),
    broken("shared_weight", "one unit three times", SameNorm, ("body*", "")),
    broken("hardcoded_device", "steps without device", CpuSteps, ("", "w*"), vocab_size=97),
    broken("hardcoded_device", "state without device", CpuState, ("", "cell"), example_inputs=SERIES),
    broken("hardcoded_device", "features to the processor", BackToCpu, ("", "dec2*", "dec1*"), example_inputs=IMAGE),
    broken("hardcoded_dtype", "nodes as float32", FloatMessages, ("", "lift"), example_inputs=NODES),
    broken("hardcoded_dtype", "one-hot as float32", FloatHot, ("", "gru", "table"), task="causal_lm", vocab_size=60),
    broken("hardcoded_dtype", "first state as float32", FloatState, ("", "rnn"), task="causal_lm"),
    broken("hardcoded_dtype", "clock as float32", FloatClock, ("", "time*"), example_inputs=NOISY),
    broken("padding_idx_wrong", "one instead of zero", PadElsewhere, ("words*",), config={"pad_token_id": 0}),
    broken("padding_idx_wrong", "last but one", PadLast, ("embedding*",), example_inputs=MASKED, pad_token_id=99),
    broken(
        "padding_idx_wrong",
        "start token of the source",
        PadSource,
        ("src_emb*",),
        example_inputs=TRANSLATION,
        task="seq2seq",
        pad_token_id=0,
    ),
    broken("backward_crash", "sigmoid in place", InPlaceSigmoid, ("", "norm", "inp"), example_inputs=SIGNAL),
    broken("backward_crash", "exp in place", InPlaceNorm, ("", "query*"), example_inputs=PAIR),
    broken("backward_crash", "own function of the wrong shape", Quantised, ("", "head*")),
    broken(
        "backward_crash",
        "graph of the last call",
        OldGraph,
        ("", "rnn", "carried"),
        ("state_across_calls", "memory_growth"),
        task="causal_lm",
    ),
]
