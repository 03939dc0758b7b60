"""Broken models: modes, hidden state and cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, TextStem, gauss, token_ids
from benchmarks.zoo.entry import broken, initialised


class AlwaysDropped(nn.Module):
    """F.dropout without training=self.training."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5)
        self.fc1, self.fc2 = nn.Linear(512, 64), nn.Linear(64, classes)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        x = F.dropout(F.relu(self.fc1(x)), p=0.5)
        return self.fc2(x)


class DroppingAttention(nn.Module):
    """dropout_p is passed in evaluation too."""

    def __init__(self, dim, heads, p=0.1):
        super().__init__()
        self.heads, self.p = heads, p
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class DroppingGPT(nn.Module):
    def __init__(self, vocab_size=90, n_embd=48):
        super().__init__()
        self.stem = TextStem(vocab_size, n_embd, 64)
        self.blocks = nn.Sequential(*[Block(n_embd, 4, attn=DroppingAttention(n_embd, 4)) for _ in range(2)])
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        return self.lm_head(self.ln_f(self.blocks(self.stem(idx))))


class RandomStateTagger(nn.Module):
    """The LSTM starts from a random state at every call."""

    def __init__(self, vocab_size=120, dim=32, hidden=32, tags=9):
        super().__init__()
        self.hidden_dim = hidden
        self.word_embeddings = nn.Embedding(vocab_size, dim)
        self.lstm = nn.LSTM(dim, hidden // 2, batch_first=True, bidirectional=True)
        self.hidden2tag = nn.Linear(hidden, tags)

    def init_hidden(self, batch, like):
        shape = (2, batch, self.hidden_dim // 2)
        return torch.randn(shape).to(like), torch.randn(shape).to(like)

    def forward(self, sentence):
        embeds = self.word_embeddings(sentence)
        out, _ = self.lstm(embeds, self.init_hidden(sentence.shape[0], embeds))
        return self.hidden2tag(out)


class AlwaysSampling(nn.Module):
    """The autoencoder samples at inference as in training."""

    def __init__(self, features=30, latent=6):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(features, 64), nn.ReLU())
        self.mu, self.logvar = nn.Linear(64, latent), nn.Linear(64, latent)
        self.dec = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, features))

    def forward(self, x):
        h = self.enc(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.dec(z), mu, logvar


class NoisyGate(nn.Module):
    """The noise of the router is not limited to training."""

    def __init__(self, n_in=16, dim=48, experts=4, classes=5):
        super().__init__()
        self.inp, self.gate = nn.Linear(n_in, dim), nn.Linear(dim, experts)
        self.w1 = nn.Parameter(torch.randn(experts, dim, dim) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, dim, dim) * dim**-0.5)
        self.out = nn.Linear(dim, classes)

    def forward(self, x):
        h = torch.relu(self.inp(x))
        scores = self.gate(h)
        weights = (scores + torch.rand_like(scores)).softmax(-1)
        y = torch.einsum("bd,edf->bef", h, self.w1).relu()
        y = torch.einsum("bef,efd->bed", y, self.w2)
        return self.out(h + (weights.unsqueeze(-1) * y).sum(1))


class DeafClassifier(nn.Module):
    """eval() is overridden for something else and does not reach the dropout."""

    def __init__(self, n_in=22, classes=4):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_in, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, classes))

    def train(self, mode=True):
        self.training = mode
        return self

    def forward(self, features):
        return self.net(features)


class ForeverNorm(nn.Module):
    """Batch norm is put into training mode by forward itself."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, 2, 1)
        self.bn = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, classes)

    def forward(self, image):
        self.bn.train()
        return self.fc(F.relu(self.bn(self.conv(image))).mean((2, 3)))


class RememberingGRU(nn.Module):
    """The state of the last call is the first state of the next."""

    def __init__(self, channels=5, hidden=40, classes=3):
        super().__init__()
        self.gru = nn.GRU(channels, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, classes)
        self.state = None

    def forward(self, series):
        if self.state is not None and self.state.shape[1] != series.shape[0]:
            self.state = None
        out, state = self.gru(series, self.state)
        self.state = state.detach()
        return self.fc(out[:, -1])


class RunningScale(nn.Module):
    """The running mean is updated in evaluation as well."""

    def __init__(self, obs_dim=9, actions=3):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("var", torch.ones(obs_dim))
        self.pi = nn.Sequential(nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, actions))
        self.vf = nn.Sequential(nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, obs):
        with torch.no_grad():
            self.mean.lerp_(obs.mean(0), 0.1)
            self.var.lerp_((obs - self.mean).pow(2).mean(0), 0.1)
        x = (obs - self.mean) / (self.var + 1e-5).sqrt()
        return self.pi(x), self.vf(x)


class ImputingNet(nn.Module):
    """The caller's table is scaled in place."""

    def __init__(self, n_in=11, n_out=2):
        super().__init__()
        self.register_buffer("median", torch.full((n_in,), 0.5))
        self.mlp = nn.Sequential(nn.Linear(n_in, 48), nn.ReLU(), nn.Linear(48, n_out))

    def forward(self, table):
        table -= self.median
        return self.mlp(table)


class ClsWriter(nn.Module):
    """The first token of the caller is overwritten."""

    def __init__(self, vocab_size=100, dim=48, labels=4):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.blocks = nn.Sequential(Block(dim, 4), Block(dim, 4))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, input_ids):
        input_ids[:, 0] = 2
        return self.head(self.norm(self.blocks(self.stem(input_ids)))[:, 0])


class LoggingMLP(nn.Module):
    """Every activation is kept for a plot that nobody makes."""

    def __init__(self, n_in=12, n_out=3):
        super().__init__()
        self.a, self.b = nn.Linear(n_in, 64), nn.Linear(64, n_out)
        self.history = []

    def forward(self, x):
        h = F.relu(self.a(x))
        self.history.append(h)
        return self.b(h)


class AttentionKeeper(nn.Module):
    """Each call's attention stays in a dict under the number of the call."""

    def __init__(self, dim=48, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.pos = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.fc = nn.Linear(dim, classes)
        self.maps = {}

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.pos
        h = self.norm(x)
        y, weights = self.attn(h, h, h)
        self.maps[len(self.maps)] = weights.detach()
        return self.fc((x + y).mean(1))


class LinearInName(nn.Module):
    """The kernel trick, but the matrix of all pairs is made."""

    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scores = q @ k.transpose(-2, -1)
        y = (scores / scores.sum(-1, keepdim=True)) @ v
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class LinearTransformer(nn.Module):
    def __init__(self, vocab_size=100, dim=48, labels=4):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 4096)
        self.blocks = nn.Sequential(*[Block(dim, 4, attn=LinearInName(dim)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, input_ids):
        return self.head(self.norm(self.blocks(self.stem(input_ids))).mean(1))


class BandAttention(nn.Module):
    """A window of 8, cut out of the full matrix."""

    def __init__(self, dim, heads=4, window=8):
        super().__init__()
        self.heads, self.window = heads, window
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.mT / (c // self.heads) ** 0.5
        steps = torch.arange(t, device=x.device)
        gap = steps[:, None] - steps[None, :]
        scores = scores.masked_fill((gap < 0) | (gap >= self.window), torch.finfo(scores.dtype).min)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class BandGPT(nn.Module):
    def __init__(self, vocab_size=100, dim=48):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 4096)
        self.blocks = nn.Sequential(*[Block(dim, 4, attn=BandAttention(dim)) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.stem(tokens))))


class PositionLoop(nn.Module):
    """A linear layer for each position in turn, although it is the same layer."""

    def __init__(self, vocab_size=100, dim=48):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 256)
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix = nn.GRU(dim, dim, batch_first=True)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, input_ids):
        x = self.stem(input_ids)
        x = x + self.mix(self.ln1(x))[0]
        steps = []
        for t in range(x.shape[1]):
            h = x[:, t]
            steps.append(self.head(h + self.down(F.gelu(self.up(self.ln2(h))))))
        return torch.stack(steps, 1)


class PairLoop(nn.Module):
    """Scores of all pairs of tokens, one by one."""

    def __init__(self, vocab_size=100, dim=32, labels=3):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 128)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, input_ids):
        x = self.stem(input_ids)
        q, k, v = self.q(x), self.k(x), self.v(x)
        n = x.shape[1]
        rows = []
        for i in range(n):
            scores = torch.stack([(q[:, i] * k[:, j]).sum(-1) / q.shape[-1] ** 0.5 for j in range(n)], -1)
            rows.append((scores.softmax(-1).unsqueeze(-1) * v).sum(1))
        return self.head(self.norm(x + torch.stack(rows, 1)).mean(1))


ENTRIES = [
    broken("dropout_in_eval", "functional dropout", AlwaysDropped, ("", "fc1", "fc2")),
    broken("dropout_in_eval", "dropout of attention", DroppingGPT, ("blocks*", "")),
    broken("nondeterministic_forward", "random first state", RandomStateTagger, ("", "lstm")),
    broken("nondeterministic_forward", "autoencoder samples", AlwaysSampling, ("", "mu", "dec*")),
    broken(
        "nondeterministic_forward", "noise in the router", NoisyGate, ("", "gate"), example_inputs={"x": gauss(4, 16)}
    ),
    broken(
        "train_eval_ignored",
        "train does not recurse",
        DeafClassifier,
        ("", "net", "net.2"),
        ("dropout_in_eval",),
        example_inputs={"features": gauss(4, 22)},
    ),
    broken("train_eval_ignored", "norm always trains", ForeverNorm, ("", "bn"), ("batch_leakage",)),
    broken(
        "state_across_calls",
        "recurrent state kept",
        RememberingGRU,
        ("", "gru", "state"),
        example_inputs={"series": gauss(3, 5, 5)},
    ),
    broken(
        "state_across_calls",
        "statistics move in evaluation",
        RunningScale,
        ("", "mean", "var"),
        example_inputs={"obs": gauss(6, 9)},
    ),
    broken(
        "input_mutation",
        "table shifted in place",
        ImputingNet,
        ("", "table", "mlp*"),
        example_inputs={"table": gauss(4, 11)},
    ),
    broken(
        "input_mutation",
        "first token written",
        ClsWriter,
        ("", "input_ids", "stem*"),
        task="text_classification",
        example_inputs={"input_ids": token_ids(2, 12)},
    ),
    broken("memory_growth", "history of activations", LoggingMLP, ("", "history")),
    broken("memory_growth", "maps kept", AttentionKeeper, ("", "maps", "attn")),
    broken(
        "quadratic_memory",
        "kernel with all pairs",
        LinearTransformer,
        ("blocks*", ""),
        task="text_classification",
        linear_memory=True,
    ),
    broken(
        "quadratic_memory",
        "window from the full matrix",
        BandGPT,
        ("blocks*", ""),
        task="causal_lm",
        linear_memory=True,
    ),
    broken("slow_python_loop", "positions in turn", lambda: initialised(PositionLoop()), ("",), task="causal_lm"),
    broken("slow_python_loop", "pairs in turn", PairLoop, ("",), task="text_classification"),
]
