"""Broken models: what a position, a sample or a masked token may see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, TextStem, gauss, token_ids
from benchmarks.zoo.entry import broken, initialised, sinusoids


class DilatedUnit(nn.Module):
    def __init__(self, channels, dilation, causal=True):
        super().__init__()
        self.pad = (2 * dilation, 0) if causal else (dilation, dilation)
        self.conv = nn.Conv1d(channels, 2 * channels, 3, dilation=dilation)
        self.mix = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        a, g = self.conv(F.pad(x, self.pad)).chunk(2, 1)
        return x + self.mix(torch.tanh(a) * torch.sigmoid(g))


class WaveNetLM(nn.Module):
    """Third unit pads on both sides."""

    def __init__(self, vocab=96, channels=48):
        super().__init__()
        self.embed = nn.Embedding(vocab, channels)
        self.units = nn.ModuleList(DilatedUnit(channels, 2**i, causal=i != 2) for i in range(4))
        self.head = nn.Conv1d(channels, vocab, 1)

    def forward(self, tokens):
        x = self.embed(tokens).transpose(1, 2)
        for unit in self.units:
            x = unit(x)
        return self.head(F.relu(x)).transpose(1, 2)


class NormedTcnUnit(nn.Module):
    """Group norm takes its statistics over all of time."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv = nn.Conv1d(width, width, 3)

    def forward(self, x):
        return x + F.gelu(self.conv(F.pad(self.norm(x), (2, 0))))


class TcnLanguageModel(nn.Module):
    def __init__(self, vocab_size=80, width=64, depth=3):
        super().__init__()
        self.emb = nn.Embedding(vocab_size, width)
        self.body = nn.Sequential(*[NormedTcnUnit(width) for _ in range(depth)])
        self.out = nn.Linear(width, vocab_size)

    def forward(self, input_ids):
        return self.out(self.body(self.emb(input_ids).transpose(1, 2)).transpose(1, 2))


class ChannelMix(nn.Module):
    def __init__(self, dim, wrong):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.shift = nn.ZeroPad2d((0, 0, -1, 1) if wrong else (0, 0, 1, -1))
        self.mu = nn.Parameter(torch.full((dim,), 0.5))
        self.key = nn.Linear(dim, 2 * dim, bias=False)
        self.value = nn.Linear(2 * dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        h = self.norm(x)
        mixed = h * self.mu + self.shift(h) * (1 - self.mu)
        return x + torch.sigmoid(self.receptance(mixed)) * self.value(F.relu(self.key(mixed)) ** 2)


class ShiftLM(nn.Module):
    """An RWKV-like stack whose last block shifts time the wrong way."""

    def __init__(self, n_vocab=100, dim=48):
        super().__init__()
        self.emb = nn.Embedding(n_vocab, dim)
        self.blocks = nn.Sequential(ChannelMix(dim, False), ChannelMix(dim, False), ChannelMix(dim, True))
        self.ln_out = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, n_vocab, bias=False)

    def forward(self, idx):
        return self.head(self.ln_out(self.blocks(self.emb(idx))))


class ChunkedAttention(nn.Module):
    """The mask compares the numbers of chunks, so a chunk sees itself to its end."""

    def __init__(self, dim, heads, chunk=4):
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        number = torch.arange(t, device=x.device) // self.chunk
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=number[:, None] >= number[None, :])
        return self.o(y.transpose(1, 2).reshape(b, t, c))


class ChunkGPT(nn.Module):
    def __init__(self, vocab_size=90, dim=48, depth=2, block_size=64):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, block_size)
        self.layers = nn.ModuleList(Block(dim, 4, attn=ChunkedAttention(dim, 4)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, idx):
        x = self.stem(idx)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.lm_head(self.norm(x))}


class ShortMaskAttention(nn.Module):
    """The mask was made for 32 tokens and is padded with permission beyond."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("bias", torch.ones(32, 32).tril().bool())

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device)
        n = min(t, 32)
        mask[:n, :n] = self.bias[:n, :n]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class LongCharModel(nn.Module):
    def __init__(self, vocab_size=70, n_embd=48, block_size=128):
        super().__init__()
        self.stem = TextStem(vocab_size, n_embd, block_size)
        self.blocks = nn.Sequential(*[Block(n_embd, 4, attn=ShortMaskAttention(n_embd, 4)) for _ in range(2)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        return self.lm_head(self.ln_f(self.blocks(self.stem(idx))))


class Translator(nn.Module):
    """No mask for the target in the decoder."""

    def __init__(self, src_vocab=80, tgt_vocab=80, d_model=48):
        super().__init__()
        self.src, self.tgt = nn.Embedding(src_vocab, d_model), nn.Embedding(tgt_vocab, d_model)
        self.register_buffer("table", sinusoids(64, d_model))
        layer = nn.TransformerDecoderLayer(d_model, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        coder = nn.TransformerEncoderLayer(d_model, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(coder, 2, norm=nn.LayerNorm(d_model), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(d_model))
        self.generator = nn.Linear(d_model, tgt_vocab)

    def forward(self, input_ids, decoder_input_ids):
        memory = self.encoder(self.src(input_ids) + self.table[: input_ids.shape[1]])
        out = self.decoder(self.tgt(decoder_input_ids) + self.table[: decoder_input_ids.shape[1]], memory)
        return self.generator(out)


class PatchClassifier(nn.Module):
    """nn.MultiheadAttention without batch_first, given (batch, tokens, width)."""

    def __init__(self, dim=48, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.pos = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, 4)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 96), nn.GELU(), nn.Linear(96, dim))
        self.fc = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        h = self.norm(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        x = x + self.mlp(x)
        return self.fc(x.mean(1))


class Whitening(nn.Module):
    """Statistics of the batch, at inference too."""

    def forward(self, x):
        return (x - x.mean(0, keepdim=True)) / (x.var(0, keepdim=True, unbiased=False) + 1e-5).sqrt()


class ChurnNet(nn.Module):
    def __init__(self, features=18):
        super().__init__()
        self.inp = nn.Linear(features, 64)
        self.white = Whitening()
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x):
        return self.out(self.white(self.inp(x)))


class PointSetEncoder(nn.Module):
    """The context is the mean over dimension 0, which is the batch and not the points."""

    def __init__(self, width=64):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        self.rho = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 5))

    def forward(self, points):
        h = self.phi(points)
        context = h.mean(0, keepdim=True).expand_as(h)
        return self.rho(torch.cat([h, context], -1)).amax(1)


class SensorGRU(nn.Module):
    """view where transpose was meant: time and batch are mixed."""

    def __init__(self, channels=6, hidden=40, classes=4):
        super().__init__()
        self.gru = nn.GRU(channels, hidden)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x):
        b, t, c = x.shape
        out, _ = self.gru(x.reshape(t, b, c))
        return self.fc(out[-1])


class InvertedAttention(nn.Module):
    """attention_mask is 1 for real tokens, and those are the ones filled in here."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, mask):
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
        scores = scores.masked_fill(mask[:, None, None, :].bool(), torch.finfo(scores.dtype).min)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class ReviewEncoder(nn.Module):
    def __init__(self, vocab_size=120, d_model=48, num_labels=3):
        super().__init__()
        self.stem = TextStem(vocab_size, d_model, 64)
        self.layers = nn.ModuleList(Block(d_model, 4, attn=InvertedAttention(d_model, 4)) for _ in range(2))
        self.norm, self.classifier = nn.LayerNorm(d_model), nn.Linear(d_model, num_labels)

    def forward(self, input_ids, attention_mask):
        x = self.stem(input_ids, attention_mask)
        for layer in self.layers:
            x = layer(x, attention_mask)
        keep = attention_mask.unsqueeze(-1).to(x.dtype)
        return self.classifier((self.norm(x) * keep).sum(1) / keep.sum(1).clamp(min=1))


class SentencePooler(nn.Module):
    """Attention is masked, the mean at the end is not."""

    def __init__(self, vocab=110, dim=48, out=32):
        super().__init__()
        self.stem = TextStem(vocab, dim, 64)
        self.blocks = nn.ModuleList(Block(dim, 4) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, out)

    def forward(self, input_ids, attention_mask):
        x = self.stem(input_ids, attention_mask)
        for block in self.blocks:
            x = block(x, attention_mask)
        return F.normalize(self.project(self.norm(x).mean(dim=1)), dim=-1)


class IntentLSTM(nn.Module):
    """The last step of a padded batch is padding."""

    def __init__(self, n_words=100, hidden=48, n_intents=6):
        super().__init__()
        self.embed = nn.Embedding(n_words, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, n_intents)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask.unsqueeze(-1).to(self.embed.weight.dtype)
        out, _ = self.lstm(x)
        return self.fc(out[:, -1])


class BagOfAttention(nn.Module):
    """An encoder for text that has no positions."""

    def __init__(self, vocab_size=100, dim=48, labels=4):
        super().__init__()
        self.word = nn.Embedding(vocab_size, dim)
        self.blocks = nn.Sequential(Block(dim, 4), Block(dim, 4))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, labels)

    def forward(self, input_ids):
        return self.head(self.norm(self.blocks(self.word(input_ids))).mean(1))


class MaskedModel(nn.Module):
    """Every token is looked up at position 0."""

    def __init__(self, vocab_size=100, dim=48, max_len=64):
        super().__init__()
        self.word, self.place = nn.Embedding(vocab_size, dim), nn.Embedding(max_len, dim)
        self.blocks = nn.Sequential(Block(dim, 4), Block(dim, 4))
        self.norm, self.decoder = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, input_ids):
        places = torch.zeros_like(input_ids)
        return self.decoder(self.norm(self.blocks(self.word(input_ids) + self.place(places))))


MASKED = {"input_ids": token_ids(2, 10), "attention_mask": torch.tensor([[1] * 10, [1] * 6 + [0] * 4])}
ENTRIES = [
    broken(
        "future_leakage", "wavenet with one symmetric unit", WaveNetLM, ("units.2", "units.2.conv"), task="causal_lm"
    ),
    broken("future_leakage", "group norm over time", TcnLanguageModel, ("body.*",), task="causal_lm"),
    broken("future_leakage", "token shift to the left", ShiftLM, ("blocks.2", "blocks.2.*"), task="causal_lm"),
    broken("future_leakage", "mask by chunks", ChunkGPT, ("layers.*.attn", "layers.*", "layers"), task="causal_lm"),
    broken(
        "future_leakage",
        "mask too short",
        LongCharModel,
        ("blocks.*.attn", "blocks.*", "blocks"),
        task="causal_lm",
        max_length=128,
    ),
    broken(
        "future_leakage",
        "decoder without target mask",
        Translator,
        ("decoder", "decoder.*"),
        task="seq2seq",
        example_inputs={"input_ids": token_ids(2, 9), "decoder_input_ids": token_ids(2, 7, seed=4)},
    ),
    broken("batch_leakage", "attention over the batch", PatchClassifier, ("attn", "attn.*")),
    broken("batch_leakage", "whitening by the batch", ChurnNet, ("white",)),
    broken(
        "batch_leakage", "context over dimension 0", PointSetEncoder, ("",), example_inputs={"points": gauss(3, 20, 3)}
    ),
    broken("batch_leakage", "view for transpose", SensorGRU, ("", "gru"), example_inputs={"x": gauss(3, 12, 6)}),
    broken("padding_leakage", "mask inverted", ReviewEncoder, ("", "layers*"), example_inputs=MASKED),
    broken("padding_leakage", "mean over padding", SentencePooler, ("",), example_inputs=MASKED, task="embedding"),
    broken("padding_leakage", "last state is padding", IntentLSTM, ("", "lstm"), example_inputs=MASKED),
    broken("position_absent", "no positions", BagOfAttention, ("", "word"), task="text_classification"),
    broken(
        "position_absent", "all at position zero", lambda: initialised(MaskedModel()), ("", "place"), task="masked_lm"
    ),
]
