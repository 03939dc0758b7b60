"""Models with parts that never train, by accident, or that saving, moving and sharing lose."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import broken, initialised, sinusoids
from benchmarks.zoo.families import (
    Bert,
    Gpt,
    LstmLm,
    Mlp,
    ResNet,
    Seq2Seq,
    Tabular,
    TorchEncoder,
    Vit,
    pair_example,
    table_example,
)  # fmt: skip
from benchmarks.zoo.parts import Block, FeedForward, FusedAttention, ResidualConv


class DetachedFeed(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)).detach())


class FrozenInForward(Seq2Seq):
    """Encodes under no_grad, left over from generation."""

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        with torch.no_grad():
            memory = self.transformer.encoder(self.place(self.source(src)))
        out = self.transformer.decoder(self.place(self.target(tgt)), memory, tgt_mask=self.tgt_mask(tgt))
        return self.generator(out)


class DataStem(ResNet):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).data
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class ArgmaxRouter(nn.Module):
    """Chooses one expert by argmax and does not weigh its answer, so that the router learns nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 2)
        self.experts = nn.ModuleList(FeedForward(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.router(x).argmax(-1, keepdim=True)
        return torch.where(choice == 0, self.experts[0](x), self.experts[1](x))


class ItemScale(Vit):
    """Scales its features by a learned number, read with item()."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, pixel_values: Tensor) -> Any:
        x = self.embed(pixel_values)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0] * self.scale.item())


class RewrappedTabular(Tabular):
    """Makes a new tensor from the embeddings."""

    def join(self, categories: Tensor, numbers: Tensor) -> Tensor:
        words = super().join(categories, numbers)
        return torch.tensor(words.tolist(), dtype=words.dtype, device=words.device)


DETACHED = [
    broken("detached_submodule", "feed-forward detached", lambda: Gpt(feed=DetachedFeed), ("blocks.*.feed*",), task="causal_lm"),
    broken("detached_submodule", "encoder under no_grad", FrozenInForward, ("", "transformer.encoder*", "source*"), example_inputs=pair_example(), task="seq2seq"),
    broken("detached_submodule", "stem through data", DataStem, ("", "stem*")),
    broken("detached_submodule", "router by argmax", lambda: Bert(feed=ArgmaxRouter), ("layers.*.feed", "layers.*.feed.router*"), task="masked_lm"),
    broken("detached_submodule", "scale read by item", ItemScale, ("", "scale"), ("unused_parameter",)),
    broken("detached_submodule", "tabular through lists", RewrappedTabular, ("", "tables*"), example_inputs=table_example()),
]  # fmt: skip


def frozen(model: nn.Module, *names: str) -> nn.Module:
    """Switch off the gradient of parts that the rest of training needs."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def left_frozen_block() -> nn.Module:
    model = Gpt()
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad = False
    return model


class FrozenWeight(Mlp):
    """Wraps its own weight as a parameter without gradient."""

    def __init__(self) -> None:
        super().__init__()
        first = torch.randn(64, 20) * (2 / 20) ** 0.5
        self.layers[0].weight = nn.Parameter(first, requires_grad=False)


FROZEN = [
    broken("frozen_parameter", "one block of a gpt", left_frozen_block, "blocks.1*", task="causal_lm"),
    broken("frozen_parameter", "query weights of bert", lambda: frozen(Bert(), "layers.1.attention.qkv.weight"), "layers.1.attention*", task="masked_lm"),
    broken("frozen_parameter", "first weight of an mlp", FrozenWeight, "layers.0*"),
    broken("frozen_parameter", "middle convolution", lambda: frozen(ResNet(), "stages.1.conv1.weight"), "stages.1.conv1*"),
    broken("frozen_parameter", "recurrent weight of an lstm", lambda: frozen(LstmLm(), "rnn.weight_hh_l0"), "rnn*", task="causal_lm"),
    broken("frozen_parameter", "head of a vit", lambda: frozen(Vit(), "head.weight"), "head*"),
]  # fmt: skip


class TwoNorms(Gpt):
    def __init__(self) -> None:
        super().__init__()
        self.norm_out = nn.LayerNorm(48)


class SkippedFeed(Block):
    """Forgets the feed-forward."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.norm2(x)


class LastBlockSkipped(Vit):
    def forward(self, pixel_values: Tensor) -> Any:
        x = self.embed(pixel_values)
        for number in range(len(self.blocks) - 1):
            x = self.blocks[number](x)
        return self.head(self.norm(x)[:, 0])


class WrongShortcut(ResidualConv):
    """Has a projection for the shortcut, and adds the plain input."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.shortcut = nn.Conv2d(width, width, 1)


class TwiceTheSame(Mlp):
    """Calls the second layer twice, the third never."""

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.layers[0](x))
        x = F.relu(self.layers[1](x))
        x = F.relu(self.layers[1](x))
        return self.head(x)


UNUSED = [
    broken("unused_parameter", "second final norm", TwoNorms, "norm_out*", task="causal_lm"),
    broken("unused_parameter", "feed-forward skipped", lambda: Bert(block=SkippedFeed), "layers.*.feed*", task="masked_lm"),
    broken("unused_parameter", "last block skipped", LastBlockSkipped, "blocks.2*"),
    broken("unused_parameter", "shortcut not used", lambda: ResNet(WrongShortcut), "stages.*.shortcut*"),
    broken("unused_parameter", "layer called twice, another never", TwiceTheSame, "layers.2*"),
]  # fmt: skip


class ListGpt(Gpt):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = None
        self.blocks = [initialised(Block(48)) for _ in range(3)]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "blocks" and value is None:
            del self._modules["blocks"]
            return
        super().__setattr__(name, value)


class ListMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(20, 32)
        self.hidden = [nn.Linear(32, 32) for _ in range(3)]
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.head(x)


class DictHeads(nn.Module):
    """Keeps its branches in a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.branches = {size: nn.Conv2d(16, 8, size, padding=size // 2) for size in (1, 3, 5)}
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.cat([F.relu(branch(x)).mean((2, 3)) for branch in self.branches.values()], 1))


class TensorParameter(TorchEncoder):
    """Positions that should be learned are a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        del self.pos
        self.pos = (torch.randn(64, 32) * 0.02).requires_grad_()


class ClosureExperts(nn.Module):
    """Holds its second layer in a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.tail = (nn.GELU(), initialised(nn.Linear(4 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        activation, down = self.tail
        return down(activation(self.up(x)))


class MadeInForward(LstmLm):
    """Makes a projection at each call."""

    def forward(self, tokens: Tensor) -> Any:
        torch.manual_seed(1)
        x = self.rnn(self.embedding(tokens))[0]
        return self.decoder(nn.Linear(48, 48).to(x)(x))


UNREGISTERED = [
    broken("unregistered_layer", "gpt blocks in a list", ListGpt, ("", "blocks*"), task="causal_lm"),
    broken("unregistered_layer", "mlp layers in a list", ListMlp, ("", "hidden*")),
    broken("unregistered_layer", "branches in a dict", DictHeads, ("", "branches*")),
    broken("unregistered_layer", "positions as a plain tensor", TensorParameter, ("", "pos"), ("buffer_not_registered",), task="masked_lm"),
    broken("unregistered_layer", "layer in a tuple", lambda: Bert(feed=ClosureExperts), "layers.*.feed*", task="masked_lm"),
    broken("unregistered_layer", "layer made in forward", MadeInForward, "", task="causal_lm"),
]  # fmt: skip


class LazyHead(Vit):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(10)


def lazy_cnn() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.LazyLinear(10))


class LateProjection(nn.Module):
    """Creates its projection on the first call, when the width is known."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(12, 24, batch_first=True)
        self.project = None
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rnn(x)[0][:, -1]
        if self.project is None:
            self.project = nn.Linear(x.shape[-1], 16).to(x.device)
        return self.head(F.relu(self.project(x)))


class LateScale(Gpt):
    """Makes a parameter in the first forward pass."""

    def features(self, idx: Tensor) -> Tensor:
        x = super().features(idx)
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(x.shape[-1], device=x.device, dtype=x.dtype))
        return x * self.scale


class LazyMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.body = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x))


LAZY = [
    broken("lazy_parameter", "vit with a lazy head", LazyHead, "head*"),
    broken("lazy_parameter", "lazy cnn", lazy_cnn, ("0*", "4*", ""), example_inputs={"input": torch.arange(2 * 3 * 256.0).sin().view(2, 3, 16, 16)}),
    broken("lazy_parameter", "projection made on first call", LateProjection, ("", "project*")),
    broken("lazy_parameter", "scale made on first call", LateScale, ("", "scale"), task="causal_lm"),
    broken("lazy_parameter", "lazy linear in an mlp", LazyMlp, "body*"),
]  # fmt: skip


class RepeatedBlocks(Gpt):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([initialised(Block(48))] * 3)


class CommonNorm(ResNet):
    """All stages were given one batch norm."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(24)
        for stage in self.stages:
            stage.bn1 = norm


class MirroredBranches(nn.Module):
    """Two towers that should differ, made with `[tower] * 2`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = [nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))] * 2
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat((self.left(x), self.right(x)), -1))


class OneExpert(nn.Module):
    """Experts that are one and the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4)
        self.experts = nn.ModuleList([FeedForward(width)] * 4)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        return torch.stack([expert(x) for expert in self.experts], -1).mul(shares[..., None, :]).sum(-1)


class SharedProjections(FusedAttention):
    """Queries, keys and values come from one projection."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.q = self.k = self.v = nn.Linear(width, width)


SHARED = [
    broken("shared_weight", "one block three times", RepeatedBlocks, ("blocks*", ""), task="causal_lm"),
    broken("shared_weight", "one batch norm for all stages", CommonNorm, ("stages*", "")),
    broken("shared_weight", "two towers are one", MirroredBranches, ("left*", "right*", "")),
    broken("shared_weight", "four experts are one", lambda: Bert(feed=OneExpert), ("layers.*.feed*",), task="masked_lm"),
    broken("shared_weight", "query, key and value are one", lambda: Gpt(SharedProjections), ("blocks.*.attention*",), task="causal_lm"),
]  # fmt: skip


class PlainNoise(Bert):
    """Random features are drawn once and kept as a plain tensor: a reloaded model draws others."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.randn(48, 48) * 48**-0.5

    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids) @ self.mix.to(self.tokens.weight)


class PlainStatistics(nn.Module):
    """Normalises features by random, stored statistics that are not in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = torch.randn(20), torch.rand(20) + 0.5
        self.body = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - self.mean) / self.std)


class PlainTable(Gpt):
    """Sinusoids as a plain attribute: they stay on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        del self.positions
        self.table = sinusoids(64, 48) * 0.02

    def embed(self, idx: Tensor) -> Tensor:
        return self.tokens(idx) + self.table[: idx.shape[1]]


class PlainFilter(ResNet):
    """A fixed random filter bank that was not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = torch.randn(3, 3, 5, 5) * 0.1

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + F.conv2d(x, self.bank.to(x), padding=2))


class VolatileBuffer(LstmLm):
    """The random permutation of the vocabulary is a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(96), persistent=False)

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(self.order[tokens])


BUFFERS = [
    broken("buffer_not_registered", "random mixing matrix", PlainNoise, ("", "mix"), task="masked_lm"),
    broken("buffer_not_registered", "statistics of features", PlainStatistics, ("", "mean", "std")),
    broken("buffer_not_registered", "sinusoids left on the cpu", PlainTable, ("", "table"), ("hardcoded_device",), task="causal_lm"),
    broken("buffer_not_registered", "random filter bank", PlainFilter, ("", "bank")),
    broken("buffer_not_registered", "random order not saved", VolatileBuffer, ("", "order"), task="causal_lm"),
]  # fmt: skip


class RandomPad(Bert):
    """The pad row was drawn again by a custom initialization and gets no gradient, so it stays random."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(96, 48, padding_idx=0)
        nn.init.normal_(self.tokens.weight, std=0.02)


def lstm_with_wrong_pad() -> nn.Module:
    """Pads with 0, but row 1 is the one that never learns."""
    model = LstmLm()
    model.embedding = nn.Embedding(96, 48, padding_idx=1)
    return model


def gpt_with_wrong_pad() -> nn.Module:
    """Pads with 3, but the last row is the one that never learns."""
    model = Gpt()
    model.tokens = nn.Embedding(96, 48, padding_idx=95)
    return initialised(model)


class ClassifierWrongPad(nn.Module):
    """A bag of words that leaves out the word 5 rather than the padding 0."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 24, padding_idx=5)
        self.head = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids).mean(1))


def encoder_with_wrong_pad() -> nn.Module:
    model = TorchEncoder()
    model.embed = nn.Embedding(96, 32, padding_idx=2)
    return model


PADS = [
    broken("padding_idx_wrong", "lstm, another row", lstm_with_wrong_pad, "embedding*", pad_token_id=0, task="causal_lm"),
    broken("padding_idx_wrong", "gpt, last row", gpt_with_wrong_pad, "tokens*", pad_token_id=3, task="causal_lm"),
    broken("padding_idx_wrong", "bag of words", ClassifierWrongPad, "words*", pad_token_id=0, task="text_classification", num_labels=3),
    broken("padding_idx_wrong", "torch encoder", encoder_with_wrong_pad, "embed*", config={"vocab_size": 96, "pad_token_id": 0}, task="masked_lm"),
    broken("padding_idx_wrong", "pad row overwritten", RandomPad, "tokens*", pad_token_id=0, task="masked_lm"),
]  # fmt: skip

ENTRIES = DETACHED + FROZEN + UNUSED + UNREGISTERED + LAZY + SHARED + BUFFERS + PADS
