"""Who sees whom: leaks, lost positions, outputs and inputs without influence."""
# ruff: noqa: D102

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.holdout.bodies_pictures import Denoiser, Mobile, ResNet, Vit
from benchmarks.holdout.bodies_readers import HandReader, MhaReader, Perceiver
from benchmarks.holdout.bodies_tables import DeepFm, Forecaster, Tabular, TwoTower
from benchmarks.holdout.bodies_text import EinsumGpt, FusedGpt, LabelLm, PreNorm, Retention, RetNet, Translator, WaveLm
from benchmarks.holdout.samples import ids, mask, noise
from benchmarks.zoo.entry import broken

RAW = ("", "wq*", "wk*", "wv*", "wo*")
MASKED = {"input_ids": ids(4, 12), "attention_mask": mask(4, 12)}
FEATURES = {"features": noise(4, 16, 12)}
CLICKS = {"user_id": ids(6), "ad_id": ids(6, low=5), "numbers": noise(6, 6)}
PAIR = {"query": noise(5, 10), "document": noise(5, 14)}
STEPS = {"noisy": noise(3, 1, 16, 16), "t": ids(3, high=900)}
TRANSLATION = {"src": ids(3, 11), "tgt": ids(3, 9)}


class NextSeen(EinsumGpt):
    """The diagonal of the mask is one too far."""

    def visible(self, n: int, device: Any) -> Tensor:
        return torch.ones(n, n, dtype=torch.bool, device=device).tril(1)


class LongOpen(EinsumGpt):
    """The mask ends at 24 tokens."""

    def visible(self, n: int, device: Any) -> Tensor:
        seen = torch.ones(n, n, dtype=torch.bool, device=device)
        seen[:24, :] = seen[:24, :].tril()
        return seen


class SamePadding(WaveLm):
    """One of four convolutions is centred."""

    def pad(self, i: int, x: Tensor) -> Tensor:
        side = self.dilations[i]
        return F.pad(x, (side, side)) if i == 2 else super().pad(i, x)


class TimeNormed(Retention):
    """Group norm with the time inside the group."""

    def norm(self, y: Tensor) -> Tensor:
        return F.group_norm(y, y.shape[1])


class OpenDecoder(Translator):
    """The decoder has no mask."""

    def causal(self, n: int, device: Any) -> Tensor | None:
        return None


class ExpertsChoose(nn.Module):
    """Each expert picks its tokens among all of a text."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(3, width, 64) * width**-0.5)
        self.down = nn.Parameter(torch.randn(3, 64, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        gate, chosen = share.mT.topk(max(1, x.shape[1] // 2), dim=-1)
        taken = torch.einsum("bent,btw->benw", F.one_hot(chosen, x.shape[1]).to(x.dtype), x)
        made = torch.einsum("benw,ewh->benh", taken, self.up).relu()
        made = torch.einsum("benh,ehw->benw", made, self.down) * gate[..., None]
        return torch.zeros_like(x).scatter_add(
            1, chosen.flatten(1)[..., None].expand(-1, -1, x.shape[-1]), made.flatten(1, 2)
        )


class ExpertBlock(PreNorm):
    """Block whose feed-forward part is such a mixture."""

    def __init__(self, width: int, heads: int, attention: type[nn.Module]) -> None:
        super().__init__(width, heads, attention)
        self.mlp = ExpertsChoose(width)


class BatchFirstForgotten(Vit):
    """Attention that takes the first axis for the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attns[1] = nn.MultiheadAttention(32, 4)


class BatchStandardised(Tabular):
    """Standardises with the batch at hand."""

    def prepare(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-3)


class GruOverBatch(LabelLm):
    """The recurrent layer runs over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(40, 40)


class WrongFlatten(HandReader):
    """Heads split by a reshape over batch and time."""

    def heads_of(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        return x.reshape(t, b, self.heads, c // self.heads).permute(1, 2, 0, 3)


class MaskUpsideDown(MhaReader):
    """Looks at the padding only."""

    def hidden_keys(self, attention_mask: Tensor) -> Tensor | None:
        hidden = attention_mask == 1
        return hidden & ~hidden.all(1, keepdim=True)


class MaskForgotten(MhaReader):
    """The mask reaches the pooling, not the attention."""

    def hidden_keys(self, attention_mask: Tensor) -> Tensor | None:
        return None


class PooledPadding(MhaReader):
    """The mask reaches the attention, not the pooling."""

    def pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return x.mean(1)


class LastState(nn.Module):
    """Weights words by a masked gate, and reads the LSTM after the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(70, 24)
        self.gate = nn.Linear(24, 1)
        self.lstm = nn.LSTM(24, 24, batch_first=True)
        self.fc = nn.Linear(48, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        w = torch.sigmoid(self.gate(x)) * attention_mask[..., None]
        states, _ = self.lstm(x)
        return self.fc(torch.cat(((w * x).sum(1) / w.sum(1).clamp(min=1e-3), states[:, -1]), -1))


class StrippedReader(nn.Module):
    """Masked language model whose author forgot positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(105, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.decoder = nn.Linear(32, 105)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.decoder(self.encoder(self.words(input_ids)))


class BagOfPatches(nn.Module):
    """Vision transformer without positions, mean over patches."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.to_patches = nn.Conv2d(3, width, 8, 8)
        self.body = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 64, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.fc = nn.Linear(width, 10)

    def forward(self, img: Tensor) -> Tensor:
        x = self.to_patches(img).flatten(2).transpose(1, 2)
        for layer in self.body:
            x = layer(x)
        return self.fc(x.mean(1))


class ByteSet(Perceiver):
    """Latents over a set of bytes: the positions are looked up at index 0 only."""

    def content(self, byte_ids: Tensor) -> Tensor:
        return self.bytes(byte_ids) + self.where(torch.zeros_like(byte_ids))


class NoOrderReader(MhaReader):
    """Adds the mean of the positions to every word."""

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids) + self.position.mean(0)


class InstanceThenPool(ResNet):
    """Instance norm just before the global mean, which is then zero."""

    def __init__(self) -> None:
        super().__init__()
        self.last_norm = nn.InstanceNorm2d(32)

    def pool(self, x: Tensor) -> Tensor:
        return self.last_norm(x).mean((2, 3))


class SoftmaxOfOne(nn.Module):
    """Churn probability as a softmax over a single unit."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(18, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        self.prob = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.prob(self.net(x))


class NormOfOne(Forecaster):
    """Layer norm over the one predicted value."""

    def __init__(self) -> None:
        super().__init__(channels=5)
        self.read = nn.Sequential(nn.Linear(24, 1), nn.LayerNorm(1))


class IgnoresAd(DeepFm):
    """The ad is looked up by the user's number."""

    def fields(self, user_id: Tensor, ad_id: Tensor, numbers: Tensor) -> Tensor:
        return super().fields(user_id, user_id, numbers)


class Narcissus(TwoTower):
    """The second tower's answer is overwritten by a constant."""

    def towers(self, query: Tensor, document: Tensor) -> tuple[Tensor, Tensor]:
        a, b = super().towers(query, document)
        return a, torch.ones_like(b) / b.shape[-1] ** 0.5


class Timeless(Denoiser):
    """Forgets which step it is: the clock is always zero."""

    def clock(self, t: Tensor) -> Tensor:
        return super().clock(torch.zeros_like(t))


class Deaf(Translator):
    """The encoder reads the target side's length, not the source's words."""

    def read(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.src_emb(torch.zeros_like(src)) + self.src_pos(self.steps(src))


class SqueezedMobile(Mobile):
    """Squeezes the batch away when it is one."""

    def flat(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).squeeze()


ENTRIES = [
    broken("future_leakage", "diagonal one too far in einsum", NextSeen, RAW, vocab_size=97),
    broken("future_leakage", "mask ends at 24", LongOpen, RAW, vocab_size=97, task="causal_lm", max_length=64),
    broken("future_leakage", "one centred convolution", SamePadding, ("", "convs*"), task="causal_lm"),
    broken("future_leakage", "norm over time", lambda: RetNet(kind=TimeNormed), ("", "ret*"), task="causal_lm"),
    broken(
        "future_leakage",
        "translator without mask",
        OpenDecoder,
        ("", "transformer*"),
        example_inputs=TRANSLATION,
        task="seq2seq",
    ),
    broken("future_leakage", "experts choose tokens", lambda: FusedGpt(block=ExpertBlock), ("layers*", "*mlp*")),
    broken("batch_leakage", "attention over the batch", BatchFirstForgotten, ("attns*",)),
    broken("batch_leakage", "standardised by the batch", BatchStandardised),
    broken("batch_leakage", "recurrent over the batch", GruOverBatch, "rnn*", ("position_absent",)),
    broken("batch_leakage", "reshape over batch and time", WrongFlatten, ("", "to_*"), example_inputs=FEATURES),
    broken(
        "batch_leakage",
        "batch norm without running averages",
        lambda: ResNet(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
        ("*bn*", "stem*"),
    ),
    broken("padding_leakage", "inverted mask", MaskUpsideDown, ("", "mha*"), example_inputs=MASKED),
    broken("padding_leakage", "attention without mask", MaskForgotten, ("", "mha*"), example_inputs=MASKED),
    broken("padding_leakage", "mean over padding", PooledPadding, ("", "classifier"), example_inputs=MASKED),
    broken("padding_leakage", "last state after padding", LastState, ("", "lstm", "fc"), example_inputs=MASKED),
    broken("position_absent", "masked model", StrippedReader, ("", "encoder*", "words"), task="masked_lm"),
    broken("position_absent", "bag of patches", BagOfPatches, ("", "to_patches", "body*")),
    broken(
        "position_absent",
        "positions at index zero",
        ByteSet,
        ("", "where", "cross"),
        example_inputs={"byte_ids": ids(3, 20, high=250)},
    ),
    broken(
        "position_absent", "mean position", NoOrderReader, ("", "position", "embedding", "mha*"), example_inputs=MASKED
    ),
    broken("constant_output", "instance norm then mean", InstanceThenPool, ("", "last_norm", "fc")),
    broken("constant_output", "softmax of one", SoftmaxOfOne, ("", "prob")),
    broken(
        "constant_output", "layer norm of one", NormOfOne, ("", "read*"), example_inputs={"series": noise(4, 10, 5)}
    ),
    broken("ignored_input", "ad by user number", IgnoresAd, ("", "ad_id", "ad"), example_inputs=CLICKS),
    broken(
        "ignored_input",
        "document overwritten",
        Narcissus,
        ("", "document*"),
        ("unused_parameter", "detached_submodule"),
        example_inputs=PAIR,
    ),
    broken("ignored_input", "no time in denoiser", Timeless, ("", "t", "time*"), example_inputs=STEPS),
    broken("ignored_input", "source unread", Deaf, ("", "src", "src_emb"), example_inputs=TRANSLATION, task="seq2seq"),
    broken("shape_crash", "squeeze of one", SqueezedMobile, ("", "classifier*")),
]
