"""Broken models written out in full around modules of torch.nn, with outputs of several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import broken, initialised


@dataclass
class Output:
    """What several of these models return."""

    logits: Tensor
    hidden: Tensor | None = None


class MhaDecoder(nn.Module):
    """GPT on `nn.MultiheadAttention`, which wants True where it must not look."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(100, width), nn.Embedding(48, width)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 80), nn.GELU(), nn.Linear(80, width)) for _ in range(2)
        )
        self.lm_head = nn.Linear(width, 100, bias=False)
        initialised(self)

    def forbidden(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()

    def forward(self, input_ids: Tensor) -> Any:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for number, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            y = self.norms[2 * number](x)
            hidden = self.forbidden(x) & ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            x = x + attention(y, y, y, attn_mask=hidden, need_weights=False)[0]
            x = x + mlp(self.norms[2 * number + 1](x))
        return Output(self.lm_head(x))


class FourierMixer(nn.Module):
    """Mixes over time by a Fourier transform, in a model that predicts the next token."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(90, width), nn.Embedding(64, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 90)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids) + 0.1 * self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = norm(x + torch.fft.fft2(x.float()).real.to(x.dtype))
            x = x + F.gelu(layer(x))
        return {"logits": self.head(x)}


class InstanceConvLm(nn.Module):
    """Causal convolutions whose instance norm takes its mean over all of time."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, width)
        self.conv, self.norm = nn.Conv1d(width, width, 4), nn.InstanceNorm1d(width, affine=True)
        self.head = nn.Linear(width, 90)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens).transpose(1, 2)
        y = self.norm(x) if x.shape[-1] > 1 else x
        return (self.head((x + F.gelu(self.conv(F.pad(y, (3, 0))))).transpose(1, 2)),)


class LastToken(nn.Module):
    """Classifies by the last position, padded or not."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.pos = nn.Embedding(80, width), nn.Parameter(torch.randn(64, width) * 0.5)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = None if attention_mask is None else attention_mask == 0
        x = self.encoder(self.embed(input_ids) + self.pos[: input_ids.shape[1]], src_key_padding_mask=hidden)
        return self.classifier(x[:, -1]), x


class Perceiver(nn.Module):
    """Latents that were meant to attend to the picture attend to themselves."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.latents = nn.Parameter(torch.randn(1, 6, width) * 0.5)
        self.cross = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        latents = self.latents.expand(x.shape[0], -1, -1)
        return self.head(self.norm(latents + self.cross(latents, latents, latents)[0]).mean(1))


class FeatureTransformer(nn.Module):
    """A transformer over columns of a table; it keeps its column weights in a list."""

    def __init__(self, columns: int = 8, width: int = 24) -> None:
        super().__init__()
        self.weights = [nn.Parameter(torch.randn(width) * 0.3) for _ in range(columns)]
        self.bias = nn.Parameter(torch.randn(columns, width) * 0.3)
        layer = nn.TransformerEncoderLayer(width, 4, 48, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        columns = x[..., None] * torch.stack([w.to(x) for w in self.weights]) + self.bias
        return self.head(self.encoder(columns).mean(1))


class RecurrentTranslator(nn.Module):
    """GRU encoder and decoder with attention whose weights sum to one over the batch."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(60, width), nn.Embedding(60, width)
        self.encoder, self.decoder = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(2 * width, 60)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        memory, state = self.encoder(self.source(src))
        states, _ = self.decoder(self.target(tgt), state)
        scores = states @ memory.transpose(1, 2) / states.shape[-1] ** 0.5
        return self.out(torch.cat((states, torch.softmax(scores, dim=0) @ memory), -1))


class BalancedExperts(nn.Module):
    """Collects its balance loss of each call in a list that nobody empties."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.inlet, self.router = nn.Linear(18, width), nn.Linear(width, 3)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 4)
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inlet(x))
        shares = self.router(x).softmax(-1)
        self.losses.append(shares.mean(0).square().sum())
        mixed = torch.stack([F.relu(expert(x)) for expert in self.experts], -1)
        return self.head((mixed * shares[:, None]).sum(-1))


class MaskedShift(nn.Module):
    """A masked language model whose loss shifts labels, as if it predicted the next token."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.pos = nn.Embedding(90, width), nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 90)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        places = self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        logits = self.head(self.encoder(self.embed(input_ids) + places))
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}


class CachedDecoder(nn.Module):
    """Keeps keys and values between calls although nobody asked for a cache."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.pos = nn.Embedding(70, width), nn.Embedding(512, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 70)
        self.cache: tuple[Tensor, Tensor] | None = None

    def forward(self, idx: Tensor) -> Any:
        x = self.embed(idx) + self.pos(torch.arange(idx.shape[1], device=idx.device))
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        past = 0
        if self.cache is not None and self.cache[0].shape[0] == k.shape[0] and self.cache[0].dtype == k.dtype:
            past = min(self.cache[0].shape[1], 64)
            k, v = (torch.cat((old[:, -64:], new), 1) for old, new in zip(self.cache, (k, v), strict=True))
        self.cache = (k.detach(), v.detach())
        allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(past)
        return self.head(x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)))


class HalfUpdated(nn.Module):
    """An autoencoder whose code is turned to numbers and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 24))

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        return self.decoder((code > 0).to(x.dtype))


class SegmentNet(nn.Module):
    """A U-Net that joins the upper half with itself and loses the skip, leaving its projection unused."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.side = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.down, self.up = (
            nn.Conv2d(12, 24, 4, stride=2, padding=1),
            nn.ConvTranspose2d(24, 12, 4, stride=2, padding=1),
        )
        self.out = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        top = F.relu(self.inlet(x))
        low = F.relu(self.up(F.relu(self.down(top))))
        return self.out(torch.cat((low, low), 1))


def texts() -> dict[str, Tensor]:
    return {"src": torch.arange(27).view(3, 9), "tgt": torch.arange(30, 51).view(3, 7)}


ENTRIES = [
    broken("future_leakage", "multihead attention, mask inverted", MhaDecoder, ("", "attentions*"), task="causal_lm"),
    broken("future_leakage", "fourier mixing", FourierMixer, "", task="causal_lm"),
    broken("future_leakage", "instance norm over time", InstanceConvLm, ("", "norm"), task="causal_lm"),
    broken("padding_leakage", "last position, padded or not", LastToken, "", task="text_classification", num_labels=3),
    broken("constant_output", "perceiver without cross attention", Perceiver, "", ("ignored_input",)),
    broken("unregistered_layer", "column weights in a list", FeatureTransformer, ("", "weights*"), example_inputs={"x": torch.arange(32.0).sin().view(4, 8)}),
    broken("wrong_softmax_dim", "translator over the batch", RecurrentTranslator, "", ("batch_leakage",), example_inputs=texts(), task="seq2seq"),
    broken("memory_growth", "balance losses kept", BalancedExperts, ("", "losses")),
    broken("label_shift", "masked model shifts", MaskedShift, "", ("wrong_builtin_loss",), task="masked_lm"),
    broken("state_across_calls", "cache nobody asked for", CachedDecoder, "", ("memory_growth",), task="causal_lm", max_length=64),
    broken("detached_submodule", "code by a comparison", HalfUpdated, ("", "encoder*"), task="regression"),
    broken("unused_parameter", "u-net without its skip", SegmentNet, "side*"),
]  # fmt: skip
