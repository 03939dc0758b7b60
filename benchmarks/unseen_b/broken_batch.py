"""Models in which samples or padding reach where they should not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entry import broken, initialised


class BatchStandardise(nn.Module):
    """Tabular network which standardises its features with the statistics of the batch at hand."""

    def __init__(self, n_features=12, n_classes=3):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n_features))
        self.net = nn.Sequential(
            nn.Linear(n_features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, n_classes)
        )

    def forward(self, x):
        x = (x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-5)
        return self.net(x * self.scale)


class ConvWithoutRunning(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16, track_running_stats=False)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, img):
        y = F.relu(self.bn1(self.conv1(img)))
        y = F.relu(self.bn2(self.conv2(y)))
        return self.fc(y.mean((2, 3)))


class SeqFirstEncoder(nn.Module):
    """batch_first was forgotten: attention runs over the batch."""

    def __init__(self, vocab=80, d=32, labels=4):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.pos = nn.Parameter(torch.randn(64, d))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4, 64), 2)
        self.out = nn.Linear(d, labels)

    def forward(self, input_ids):
        x = self.emb(input_ids) + self.pos[: input_ids.shape[1]]
        return self.out(self.encoder(x).mean(dim=1))


class LSTMTaggerOverBatch(nn.Module):
    """The classic: an LSTM fed (batch, time, features) without batch_first."""

    def __init__(self, words=120, tags=9):
        super().__init__()
        self.word_embeddings = nn.Embedding(words, 24)
        self.lstm = nn.LSTM(24, 32)
        self.hidden2tag = nn.Linear(32, tags)

    def forward(self, sentence):
        lstm_out, _ = self.lstm(self.word_embeddings(sentence))
        return self.hidden2tag(lstm_out)


class WrongView(nn.Module):
    """Heads split by view after a wrong transpose, so that samples mix."""

    def __init__(self, feats=16, steps=8, classes=4):
        super().__init__()
        self.proj = nn.Linear(feats, 32)
        self.mix = nn.Linear(32 * steps, 64)
        self.cls = nn.Linear(64, classes)

    def forward(self, x):
        h = torch.relu(self.proj(x)).transpose(0, 1).contiguous()
        h = h.view(x.size(0), -1)
        return self.cls(torch.relu(self.mix(h)))


class Masked(nn.Module):
    """Encoder in the style of BERT; `kind` says what becomes of the mask."""

    def __init__(self, kind, vocab=99, d=48, num_labels=3):
        super().__init__()
        self.kind, self.h = kind, 4
        self.tok, self.pos = nn.Embedding(vocab, d, padding_idx=0), nn.Embedding(72, d)
        self.ln = nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.ln_att, self.ln_ff = nn.LayerNorm(d), nn.LayerNorm(d)
        self.ff = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.score = nn.Linear(d, num_labels)
        for layer in (self.tok, self.pos):
            nn.init.normal_(layer.weight, std=0.1)

    def heads(self, x):
        return x.unflatten(-1, (self.h, -1)).transpose(1, 2)

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.ln(self.tok(input_ids) + self.pos.weight[: input_ids.shape[1]])
        w = self.heads(self.q(x)) @ self.heads(self.k(x)).mT * (x.size(-1) // self.h) ** -0.5
        keep = attention_mask[:, None, None, :].bool()
        if self.kind == "inverted":
            w = w.masked_fill(keep, -1e4)
        elif self.kind == "one":
            w = w + attention_mask[:, None, None, :].to(w.dtype)
        elif self.kind == "infinite":
            w = w.masked_fill(~(keep & keep.transpose(2, 3)), float("-inf"))
        else:
            w = w.masked_fill(~keep, torch.finfo(w.dtype).min)
        x = self.ln_att(x + self.o((w.softmax(-1) @ self.heads(self.v(x))).transpose(1, 2).flatten(2)))
        x = self.ln_ff(x + self.ff(x))
        if self.kind == "pool":
            return self.score(x.mean(1))
        if self.kind == "infinite":
            m = attention_mask.unsqueeze(-1)
            return self.score((x * m).sum(1) / m.sum(1))
        if self.kind == "max":
            return self.score(x.amax(1))
        return self.score(x[:, 0])


class LastStep(nn.Module):
    """GRU classifier which reads its last step, padding or not."""

    def __init__(self, vocab=77, classes=6):
        super().__init__()
        self.embed = nn.Embedding(vocab, 32, padding_idx=0)
        self.gru = nn.GRU(32, 40, batch_first=True)
        self.fc = nn.Linear(40, classes)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        out, _ = self.gru(x)
        return self.fc(out[:, -1])


class MaskedMean(nn.Module):
    """Divides by the number of real tokens, with log weights of zero."""

    def __init__(self, vocab=66, d=32, classes=4):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.conv = nn.Conv1d(d, d, 3, padding=1)
        self.scorer = nn.Linear(d, 1)
        self.cls = nn.Linear(d, classes)

    def forward(self, input_ids, attention_mask=None):
        m = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        e = self.embed(input_ids) * m.unsqueeze(-1)
        h = torch.tanh(self.conv(e.transpose(1, 2))).transpose(1, 2)
        a = torch.exp(self.scorer(h).squeeze(-1)) * m
        a = a / a.sum(1, keepdim=True)
        entropy = -(a * torch.log(a)).sum(1, keepdim=True)
        return self.cls((a.unsqueeze(-1) * h).sum(1)) - 0.01 * entropy


class PadTable(nn.Module):
    """GRU tagger whose padding_idx is not the padding id."""

    def __init__(self, vocab=64, padding_idx=1, redraw=False):
        super().__init__()
        self.emb = nn.Embedding(vocab, 32, padding_idx=padding_idx)
        self.rnn = nn.GRU(32, 32, batch_first=True)
        self.out = nn.Linear(32, 7)
        if redraw:
            nn.init.xavier_uniform_(self.emb.weight)

    def forward(self, input_ids):
        return self.out(self.rnn(self.emb(input_ids))[0])


class PadTransformer(nn.Module):
    """Causal language model with padding_idx on an ordinary token, as an end-of-text id was assumed."""

    def __init__(self, vocab=60, d=32, pad=5):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, d, padding_idx=pad)
        self.position = nn.Parameter(torch.randn(1, 48, d) * 0.02)
        layer = nn.TransformerEncoderLayer(d, 2, 64, batch_first=True, norm_first=True)
        self.trunk = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(d, vocab)
        initialised(self)

    def forward(self, input_ids):
        n = input_ids.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position[:, :n]
        return self.head(self.trunk(x, mask=mask, is_causal=True))


BERT = ("", "q", "k", "v", "o", "tok", "ln_att")
ENTRIES = [
    broken("batch_leakage", "standardised_by_batch", BatchStandardise, ("", "scale", "net", "net.0")),
    broken("batch_leakage", "norm_without_running_statistics", ConvWithoutRunning, ("bn1",)),
    broken("batch_leakage", "batch_first_forgotten", SeqFirstEncoder, ("encoder", "encoder.*")),
    broken("batch_leakage", "lstm_over_batch", LSTMTaggerOverBatch, ("lstm",), also=("position_absent",)),
    broken(
        "batch_leakage",
        "transpose_before_view",
        WrongView,
        ("", "proj", "mix", "cls"),
        example_inputs={"x": torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))},
    ),
    broken("padding_leakage", "mask_inverted", lambda: Masked("inverted"), BERT, pad_token_id=0),
    broken("padding_leakage", "mask_of_ones_added", lambda: Masked("one"), BERT, pad_token_id=0),
    broken("padding_leakage", "mean_over_padding", lambda: Masked("pool"), ("", "score", "ln_ff"), pad_token_id=0),
    broken("padding_leakage", "max_over_padding", lambda: Masked("max"), ("", "score", "ln_ff"), pad_token_id=0),
    broken("padding_leakage", "last_step_of_gru", LastStep, ("", "gru", "fc"), pad_token_id=0),
    broken("nan_padding", "padded_rows_all_masked", lambda: Masked("infinite"), BERT, pad_token_id=0),
    broken("nan_padding", "entropy_of_masked_weights", MaskedMean, ("", "scorer", "cls")),
    broken("padding_idx_wrong", "tagger_pad_is_zero", PadTable, ("emb", "emb.weight"), pad_token_id=0),
    broken(
        "padding_idx_wrong",
        "row_redrawn",
        lambda: PadTable(padding_idx=0, redraw=True),
        ("emb", "emb.weight"),
        pad_token_id=0,
    ),
    broken(
        "padding_idx_wrong",
        "ordinary_token",
        PadTransformer,
        ("token_embedding", "token_embedding.weight"),
        task="causal_lm",
        pad_token_id=0,
    ),
]
