"""Models whose output or loss is not what it should be, or which crash on legal shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.zoo.entry import broken, initialised


class ZeroedFeatures(nn.Module):
    """CNN whose global pooling was followed by a softmax over one element."""

    def __init__(self, classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, classes)

    def forward(self, x):
        z = self.pool(self.features(x))
        z = torch.softmax(z, dim=-1).flatten(1)
        return self.fc(z)


class ClampedScore(nn.Module):
    """Regressor: clamp limits the wrong way round leave a constant."""

    def __init__(self, inputs=9):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 1)

    def forward(self, features):
        y = self.head(self.body(features))
        return torch.clamp(y, min=1.0, max=0.0)


class Tokens2Label(nn.Module):
    """LayerNorm over a single number."""

    def __init__(self, vocab=88):
        super().__init__()
        self.emb = nn.Embedding(vocab, 24)
        self.rnn = nn.LSTM(24, 32, batch_first=True)
        self.score, self.norm = nn.Linear(32, 1), nn.LayerNorm(1)

    def forward(self, input_ids):
        _, (h, _) = self.rnn(self.emb(input_ids))
        return self.norm(self.score(h[-1]))


class TwoTower(nn.Module):
    """Numeric and categorical features; the second tower reads the first input by copy and paste."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16))
        self.right = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16))
        self.join = nn.Linear(32, 2)

    def forward(self, left, right):
        a = self.left(left)
        b = self.right(left)
        return self.join(torch.cat([a, b], dim=-1))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.proj = nn.Linear(64, 16)

    def embed(self, x):
        return F.normalize(self.proj(self.cnn(x).flatten(1)), dim=1)

    def forward(self, anchor, other):
        return self.embed(anchor), self.embed(anchor)


class SegmentEncoder(nn.Module):
    """token_type_ids are accepted, looked up and forgotten."""

    def __init__(self, vocab=70, d=32):
        super().__init__()
        self.words, self.types = nn.Embedding(vocab, d), nn.Embedding(2, d)
        self.pos = nn.Parameter(torch.randn(64, d))
        self.enc = nn.TransformerEncoderLayer(d, 4, 64, batch_first=True)
        self.out = nn.Linear(d, 3)

    def forward(self, input_ids, token_type_ids):
        segments = self.types(token_type_ids)
        x = self.words(input_ids) + self.pos[: input_ids.shape[-1]]
        return self.out(self.enc(x + 0 * segments).mean(1))


@dataclass
class Sizes:
    vocab_size: int = 64
    n_out: int = 64
    n_in: int = 64
    n_embd: int = 40


class GRULM(nn.Module):
    """Recurrent language model; sizes of table and head need not agree."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.emb = nn.Embedding(sizes.n_in, sizes.n_embd)
        self.gru = nn.GRU(sizes.n_embd, sizes.n_embd, batch_first=True)
        self.norm = nn.LayerNorm(sizes.n_embd)
        self.lm_head = nn.Linear(sizes.n_embd, sizes.n_out)

    def forward(self, input_ids):
        return self.lm_head(self.norm(self.gru(self.emb(input_ids))[0]))


class MaskedLM(nn.Module):
    def __init__(self, vocab_size=80, width=32):
        super().__init__()
        self.vocab_size = vocab_size
        self.embeddings = nn.Embedding(vocab_size - 1, width)
        self.positions = nn.Embedding(64, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, input_ids):
        p = torch.arange(input_ids.size(1), device=input_ids.device)
        return self.decoder(self.layer(self.embeddings(input_ids) + self.positions(p)))


class SqueezedRegressor(nn.Module):
    """squeeze() without a dimension eats the batch of one."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(24, classes)

    def forward(self, x):
        return self.fc(self.pool(self.conv(x)).squeeze())


class FixedBatchRNN(nn.Module):
    """The hidden state has the batch size of training."""

    def __init__(self, vocab=72, batch_size=8):
        super().__init__()
        self.hidden, self.batch_size = 32, batch_size
        self.embed = nn.Embedding(vocab, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.fc = nn.Linear(32, 2)

    def forward(self, text):
        h0 = torch.zeros(1, self.batch_size, self.hidden, device=text.device, dtype=self.fc.weight.dtype)
        out, _ = self.lstm(self.embed(text), (h0, h0.clone()))
        return self.fc(out[:, -1])


class PositionsOneShort(nn.Module):
    """The maximum length is promised by max_len, and the table is one row short."""

    def __init__(self, vocab=64, d=32, max_len=32):
        super().__init__()
        self.max_len = max_len
        self.tok, self.pos = nn.Embedding(vocab, d), nn.Embedding(max_len - 1, d)
        self.attn, self.ln = nn.MultiheadAttention(d, 4, batch_first=True), nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        initialised(self)

    def forward(self, idx):
        T = idx.shape[1]
        x = self.tok(idx) + self.pos(torch.arange(T, device=idx.device))
        mask = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
        y = self.ln(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return self.head(x)


class EvenOnly(nn.Module):
    """Hierarchical encoder that folds pairs of steps and cannot take an odd number."""

    def __init__(self, vocab=68, d=32):
        super().__init__()
        self.emb, self.fold = nn.Embedding(vocab, d), nn.Linear(2 * d, d)
        self.rnn, self.fc = nn.GRU(d, d, batch_first=True), nn.Linear(d, 4)

    def forward(self, tokens):
        b, t = tokens.shape
        x = self.emb(tokens).view(b, t // 2, -1)
        return self.fc(self.rnn(torch.tanh(self.fold(x)))[0][:, -1])


class ProbCNN(nn.Module):
    """A softmax at the end, and the user trains on cross entropy."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return F.softmax(self.fc2(F.relu(self.fc1(x.flatten(1)))), dim=1)


class TaggerLossOfProbs(nn.Module):
    def __init__(self, vocab=64, tags=8):
        super().__init__()
        self.emb, self.lstm = nn.Embedding(vocab, 24), nn.LSTM(24, 24, batch_first=True, bidirectional=True)
        self.tag = nn.Linear(48, tags)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, input_ids, labels=None):
        probs = self.tag(self.lstm(self.emb(input_ids))[0]).softmax(-1)
        if labels is not None:
            return self.criterion(probs.flatten(0, 1), labels.flatten()), probs
        return probs


class LossInside(nn.Module):
    """Classifier of images or rows with its own loss; `kind` is the mistake."""

    def __init__(self, kind, n_in=20, classes=6):
        super().__init__()
        self.kind = kind
        self.mlp = nn.Sequential(nn.Linear(n_in, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU())
        self.out = nn.Linear(48, classes)

    def forward(self, x, labels=None):
        logits = self.out(self.mlp(x))
        if labels is None:
            return {"logits": logits}
        if self.kind == "nll":
            loss = F.nll_loss(logits, labels)
        elif self.kind == "sign":
            loss = F.log_softmax(logits, -1).gather(1, labels[:, None]).mean()
        else:
            loss = F.cross_entropy(logits, logits.detach().argmax(-1))
        return {"loss": loss, "logits": logits}


class SummedLM(nn.Module):
    """GPT-like whose cross entropy is over time instead of over the vocabulary."""

    def __init__(self, vocab=64, d=32):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(64, d)
        self.block = nn.TransformerEncoderLayer(d, 4, 64, batch_first=True, norm_first=True)
        self.ln_f, self.head = nn.LayerNorm(d), nn.Linear(d, vocab)
        initialised(self)

    def forward(self, idx, targets=None):
        t = idx.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(t, device=idx.device)
        x = self.block(self.wte(idx) + self.wpe(torch.arange(t, device=idx.device)), src_mask=mask)
        logits = self.head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.nll_loss(logits.flatten(0, 1).sigmoid().log(), targets.flatten())


class LogSoftmaxGPT(SummedLM):
    """Softmax before its own cross entropy."""

    def forward(self, idx, targets=None):
        logits, _ = super().forward(idx)
        probs = logits.softmax(-1)
        loss = None if targets is None else F.cross_entropy(probs.flatten(0, 1), targets.flatten())
        return probs, loss


def pair(*shape):
    made = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=made), torch.randn(*shape, generator=made)


def two(first, second, *shape):
    a, b = pair(*shape)
    return {"example_inputs": {first: a, second: b}}


def ids(**names):
    made = torch.Generator().manual_seed(4)
    return {
        "example_inputs": {
            n: torch.randint(4 if high > 2 else 0, high, (2, 12), generator=made) for n, high in names.items()
        }
    }


LM = {"task": "causal_lm"}
ENTRIES = [
    broken("constant_output", "softmax_over_one_pixel", ZeroedFeatures, ("", "pool", "features", "features.*", "fc")),
    broken("constant_output", "clamp_limits_swapped", ClampedScore, ("", "head", "body", "body.*"), task="regression"),
    broken("constant_output", "norm_over_one_number", Tokens2Label, ("", "norm", "score"), task="regression"),
    broken("ignored_input", "right_tower_reads_left", TwoTower, ("", "right"), **two("left", "right", 4, 10)),
    broken("ignored_input", "siamese_embeds_anchor_twice", Siamese, "", **two("anchor", "other", 2, 1, 28, 28)),
    broken(
        "ignored_input",
        "segments_times_zero",
        SegmentEncoder,
        ("", "types", "types.weight"),
        also=("unused_parameter",),
        **ids(input_ids=70, token_type_ids=2),
    ),
    broken(
        "vocab_mismatch", "head_one_narrower", lambda: GRULM(Sizes(n_out=63)), ("lm_head", "lm_head.*", "emb"), **LM
    ),
    broken(
        "vocab_mismatch", "head_of_hidden_size", lambda: GRULM(Sizes(n_out=40)), ("lm_head", "lm_head.*", "emb"), **LM
    ),
    broken(
        "vocab_mismatch",
        "last_id_crashes",
        MaskedLM,
        ("embeddings", "embeddings.weight", "decoder"),
        task="masked_lm",
        vocab_size=80,
    ),
    broken(
        "vocab_mismatch",
        "stated_vocabulary_is_larger",
        lambda: GRULM(Sizes()),
        ("", "lm_head", "lm_head.*", "emb", "emb.weight"),
        vocab_size=65,
        **LM,
    ),
    broken("shape_crash", "squeeze_of_everything", SqueezedRegressor, ("", "pool", "fc")),
    broken("shape_crash", "hidden_state_of_fixed_batch", FixedBatchRNN, ("", "lstm")),
    broken("shape_crash", "positions_one_short", PositionsOneShort, ("", "pos", "pos.weight"), max_length=32, **LM),
    broken("shape_crash", "only_even_lengths", EvenOnly, ("", "emb", "fold")),
    broken("double_softmax", "probabilities_out_of_cnn", ProbCNN, ("", "fc2")),
    broken(
        "double_softmax",
        "tagger_loss_of_probabilities",
        TaggerLossOfProbs,
        ("", "tag", "criterion"),
        also=("wrong_builtin_loss",),
    ),
    broken(
        "double_softmax", "gpt_returns_probabilities", LogSoftmaxGPT, ("", "head"), also=("wrong_builtin_loss",), **LM
    ),
    broken("wrong_builtin_loss", "nll_of_raw_logits", lambda: LossInside("nll"), ("", "out")),
    broken("wrong_builtin_loss", "minus_forgotten", lambda: LossInside("sign"), ("", "out")),
    broken("wrong_builtin_loss", "own_argmax_as_label", lambda: LossInside("pseudo"), ("", "out")),
    broken("wrong_builtin_loss", "nll_of_log_sigmoid", SummedLM, ("", "head"), **LM),
]
