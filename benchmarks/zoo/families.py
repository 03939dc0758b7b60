"""Small sound models of many families; the zoo's faults are put into these or written out in full."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import initialised
from benchmarks.zoo.parts import Attention, Bidirectional, Block, CausalConv, FeedForward, ResidualConv, StateSpace


class Gpt(nn.Module):
    """Decoder with learned positions."""

    def __init__(
        self, attention: type = Attention, feed: type = FeedForward, block: type = Block, vocab: int = 96,
        width: int = 48, depth: int = 3, length: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(block(width, attention, feed) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        initialised(self)

    def embed(self, idx: Tensor) -> Tensor:
        return self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))

    def features(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, idx: Tensor) -> Any:
        return self.head(self.features(idx))


class GptWithLoss(Gpt):
    """Decoder that computes its own loss from targets the caller has shifted, as nanoGPT does."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.head(self.features(idx))
        return logits, None if targets is None else self.loss(logits, targets)


class GptWithLabels(Gpt):
    """Decoder that shifts its labels itself, as transformers does."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.features(input_ids))
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


class Bert(nn.Module):
    """Encoder with a mask of real tokens; a classifier where `labels` is given."""

    def __init__(
        self, attention: type = Bidirectional, feed: type = FeedForward, block: type = Block, vocab: int = 96,
        width: int = 48, depth: int = 2, length: int = 64, labels: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.labels = labels
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(block(width, attention, feed) for _ in range(depth))
        self.final = nn.LayerNorm(width)
        self.head = nn.Linear(width, labels or vocab)
        initialised(self)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x.mean(1)
        share = mask.to(x.dtype)[..., None]
        return (x * share).sum(1) / share.sum(1).clamp(min=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.norm(self.embed(input_ids))
        for layer in self.layers:
            x = layer(x, attention_mask)
        x = self.final(x)
        return self.head(self.pool(x, attention_mask) if self.labels else x)


class Vit(nn.Module):
    """Vision transformer for pictures of 32 by 32."""

    def __init__(
        self, attention: type = Bidirectional, feed: type = FeedForward, block: type = Block, width: int = 48,
        depth: int = 3, classes: int = 10, patch: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (32 // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(block(width, attention, feed) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        initialised(self)

    def embed(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.positions

    def forward(self, pixel_values: Tensor) -> Any:
        x = self.embed(pixel_values)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ResNet(nn.Module):
    """Small residual network."""

    def __init__(self, block: Callable[[int], nn.Module] = ResidualConv, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.ModuleList(block(width) for _ in range(depth))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number % 2 == 0:
                x = F.max_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))


class Mlp(nn.Module):
    """Plain classifier of feature vectors."""

    def __init__(self, inputs: int = 20, width: int = 64, depth: int = 3, classes: int = 5) -> None:
        super().__init__()
        sizes = [inputs] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(width, classes)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


class LstmLm(nn.Module):
    """Recurrent language model."""

    def __init__(self, vocab: int = 96, width: int = 48, bidirectional: bool = False, kind: type = nn.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.rnn = kind(width, width, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.decoder = nn.Linear(width * (2 if bidirectional else 1), vocab)

    def forward(self, tokens: Tensor) -> Any:
        return self.decoder(self.rnn(self.embedding(tokens))[0])


class ConvLm(nn.Module):
    """Dilated causal convolutions with skip connections."""

    def __init__(self, conv: Callable[..., nn.Module] = CausalConv, vocab: int = 96, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.convs = nn.ModuleList(conv(width, 3, 2**level) for level in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.out = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.gelu(conv(norm(x)))
        return self.out(x)


class SsmLm(nn.Module):
    """State-space language model without positions."""

    def __init__(self, mixer: Callable[[int], nn.Module] = StateSpace, vocab: int = 96, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.mixers = nn.ModuleList(mixer(width) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.norm_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        initialised(self)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        for mixer, norm in zip(self.mixers, self.norms, strict=True):
            x = x + mixer(norm(x))
        return self.lm_head(self.norm_f(x))


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` over tokens with a padding mask."""

    def __init__(self, vocab: int = 96, width: int = 32, causal: bool = False, **layer: Any) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocab, width)
        self.pos = nn.Parameter(torch.randn(64, width) * 0.02)
        settings = {"batch_first": True, "norm_first": True, **layer}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 4, 64, **settings), 3, enable_nested_tensor=False
        )
        self.proj = nn.Linear(width, vocab)
        nn.init.normal_(self.embed.weight, std=0.02)

    def mask(self, length: int, device: torch.device) -> Tensor | None:
        return torch.ones(length, length, dtype=torch.bool, device=device).triu(1) if self.causal else None

    def hide(self, attention_mask: Tensor | None) -> Tensor | None:
        return None if attention_mask is None else attention_mask == 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        length = input_ids.shape[1]
        x = self.embed(input_ids) + self.pos[:length]
        mask = self.mask(length, x.device)
        return self.proj(self.encoder(x, mask=mask, src_key_padding_mask=self.hide(attention_mask)))


class Seq2Seq(nn.Module):
    """`nn.Transformer` from source to target tokens."""

    def __init__(self, vocab: int = 64, width: int = 32) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocab, width), nn.Embedding(vocab, width)
        self.positions = nn.Embedding(64, width)
        self.transformer = nn.Transformer(width, 4, 2, 2, 64, batch_first=True, norm_first=True)
        self.generator = nn.Linear(width, vocab)
        for table in (self.source, self.target, self.positions):
            nn.init.normal_(table.weight, std=0.1)

    def place(self, x: Tensor) -> Tensor:
        return x + self.positions(torch.arange(x.shape[1], device=x.device))

    def tgt_mask(self, tgt: Tensor) -> Tensor | None:
        length = tgt.shape[1]
        return torch.ones(length, length, dtype=torch.bool, device=tgt.device).triu(1)

    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        memory = self.transformer.encoder(self.place(self.source(src)))
        out = self.transformer.decoder(self.place(self.target(tgt)), memory, tgt_mask=self.tgt_mask(tgt))
        return self.generator(out)


class Tabular(nn.Module):
    """Classifier over categories and numbers."""

    def __init__(self, sizes: tuple[int, ...] = (8, 5, 12), numbers: int = 6) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 8) for size in sizes)
        self.norm = nn.LayerNorm(8 * len(sizes) + numbers)
        self.body = nn.Sequential(nn.Linear(8 * len(sizes) + numbers, 64), nn.ReLU(), nn.Linear(64, 3))

    def join(self, categories: Tensor, numbers: Tensor) -> Tensor:
        return torch.cat([table(categories[:, i]) for i, table in enumerate(self.tables)] + [numbers], -1)

    def forward(self, categories: Tensor, numbers: Tensor) -> Any:
        return self.body(self.norm(self.join(categories, numbers)))


def table_example(sizes: tuple[int, ...] = (8, 5, 12), numbers: int = 6, batch: int = 4) -> dict[str, Tensor]:
    """Return arguments for `Tabular`."""
    made = torch.Generator().manual_seed(7)
    columns = [torch.randint(size, (batch,), generator=made) for size in sizes]
    return {"categories": torch.stack(columns, 1), "numbers": torch.randn(batch, numbers, generator=made)}


def pair_example(batch: int = 2, source: int = 9, target: int = 7, vocab: int = 64) -> dict[str, Tensor]:
    """Return arguments for `Seq2Seq`."""
    made = torch.Generator().manual_seed(7)
    return {
        "src": torch.randint(vocab, (batch, source), generator=made),
        "tgt": torch.randint(vocab, (batch, target), generator=made),
    }
