"""Broken models: outputs and inputs without influence, wrong vocabularies, crashes by shape."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.unseen_c.parts import Block, TextStem, gauss, token_ids
from benchmarks.zoo.entry import broken


class RiskScore(nn.Module):
    """Softmax over the single output: always 1."""

    def __init__(self, n_features=14):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_features, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 1)
        )

    def forward(self, x):
        return torch.softmax(self.layers(x), dim=-1)


class PooledInstanceNorm(nn.Module):
    """The mean of an instance-normed map is its bias, whatever the picture."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1))
        self.norm = nn.InstanceNorm2d(48, affine=True)
        self.fc = nn.Linear(48, classes)

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.fc(x.mean((2, 3)))


class Policy(nn.Module):
    """The action is clamped into an empty interval: the lower bound is the upper one."""

    def __init__(self, obs_dim=8, act_dim=3):
        super().__init__()
        self.low, self.high = 1.0, 1.0
        self.trunk = nn.Sequential(nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.mu = nn.Linear(64, act_dim)

    def forward(self, obs):
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        return middle + half * torch.tanh(self.mu(self.trunk(obs)))


class Tower(nn.Module):
    def __init__(self, inputs, dim):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, dim))

    def forward(self, x):
        return F.normalize(self.net(x), dim=-1)


class TwoTower(nn.Module):
    """Both towers read the user."""

    def __init__(self, features=12, dim=32):
        super().__init__()
        self.user_tower = Tower(features, dim)
        self.item_tower = Tower(features, dim)
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, user, item):
        u = self.user_tower(user)
        i = self.item_tower(user)
        return self.scale * (u * i).sum(-1, keepdim=True)


class TimedConv(nn.Module):
    def __init__(self, cin, cout, tdim):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(cin, cout, 3, 1, 1), nn.Conv2d(cout, cout, 3, 1, 1)
        self.time = nn.Linear(tdim, cout)
        self.norm = nn.GroupNorm(4, cout)

    def forward(self, x, emb):
        h = F.silu(self.conv1(x)) + self.time(emb)[:, :, None, None]
        return self.conv2(F.silu(self.norm(h)))


class Denoiser(nn.Module):
    """t // steps is 0 for every step of the schedule."""

    def __init__(self, channels=3, width=24, steps=1000):
        super().__init__()
        self.steps, self.width = steps, width
        self.down = TimedConv(channels, width, width)
        self.mid = TimedConv(width, 2 * width, width)
        self.up = TimedConv(3 * width, width, width)
        self.out = nn.Conv2d(width, channels, 1)

    def embed(self, t):
        freq = torch.exp(-math.log(1e4) * torch.arange(self.width // 2, device=t.device) / (self.width // 2))
        angle = (t // self.steps)[:, None] * 1000.0 * freq
        return torch.cat([angle.sin(), angle.cos()], -1).to(self.out.weight.dtype)

    def forward(self, x, t):
        emb = self.embed(t)
        a = self.down(x, emb)
        b = self.mid(F.avg_pool2d(a, 2), emb)
        b = F.interpolate(b, scale_factor=2.0)
        return self.out(self.up(torch.cat([a, b], 1), emb))


class QNetwork(nn.Module):
    """The action never reaches the critic."""

    def __init__(self, state_dim=10, action_dim=4, hidden=64):
        super().__init__()
        self.q1 = nn.Sequential(
            nn.Linear(state_dim + action_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )
        self.action_dim = action_dim

    def forward(self, state, action):
        return self.q1(torch.cat([state, state[:, : self.action_dim]], dim=-1))


class SmallHeadGPT(nn.Module):
    """The head is two words short."""

    def __init__(self, vocab_size=100, dim=48, block=48):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, block)
        self.blocks = nn.Sequential(Block(dim, 4, causal=True), Block(dim, 4, causal=True))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab_size - 2, bias=False)

    def forward(self, idx):
        return self.lm_head(self.ln_f(self.blocks(self.stem(idx))))


class NarrowTable(nn.Module):
    """The table leaves out the special tokens that the config counts."""

    def __init__(self, config):
        super().__init__()
        vocab, dim = config["vocab_size"], config["d_model"]
        self.embed = nn.Embedding(vocab - 4, dim)
        self.rnn = nn.GRU(dim, dim, 2, batch_first=True)
        self.head = nn.Linear(dim, vocab)

    def forward(self, input_ids):
        return self.head(self.rnn(self.embed(input_ids))[0])


class WideHeadLM(nn.Module):
    """The head is built from the width of the feed-forward by mistake."""

    def __init__(self, vocab_size=90, dim=48, ffn=128):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.blocks = nn.Sequential(Block(dim, 6, causal=True), Block(dim, 6, causal=True))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, ffn)

    def forward(self, tokens):
        return {"logits": self.output(self.norm(self.blocks(self.stem(tokens))))}


class HousePrice(nn.Module):
    """squeeze() without a dimension takes the batch away when it is 1, then the centre is over the wrong thing."""

    def __init__(self, n_in=13):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(n_in, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x):
        h = F.relu(self.a(x)).squeeze()
        h = h + F.relu(self.b(h))
        low, mid, high = self.c(h).unbind(1)
        return torch.stack([mid - F.softplus(low), mid, mid + F.softplus(high)], dim=1)


class KeywordSpotter(nn.Module):
    """The state is made for batches of 4."""

    def __init__(self, n_mels=20, hidden=48, classes=8, batch_size=4):
        super().__init__()
        self.hidden, self.batch_size = hidden, batch_size
        self.conv = nn.Conv1d(n_mels, hidden, 5, padding=2)
        self.rnn = nn.LSTM(hidden, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, mel):
        x = F.relu(self.conv(mel)).transpose(1, 2)
        h = x.new_zeros(1, self.batch_size, self.hidden)
        out, _ = self.rnn(x, (h, h))
        return self.fc(out[:, -1])


class PairMerger(nn.Module):
    """Tokens are merged in twos: an odd length has one too many."""

    def __init__(self, vocab_size=100, dim=40, num_labels=5):
        super().__init__()
        self.stem = TextStem(vocab_size, dim, 64)
        self.merge = nn.Linear(2 * dim, dim)
        self.block = Block(dim, 4)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_labels)

    def forward(self, input_ids):
        x = self.stem(input_ids)
        b, t, c = x.shape
        x = self.merge(x.view(b, t // 2, 2 * c))
        return self.head(self.norm(self.block(x)).mean(1))


class OffByOneGPT(nn.Module):
    """One position fewer than max_seq_len."""

    def __init__(self, vocab_size=100, d_model=48, max_seq_len=64):
        super().__init__()
        self.stem = TextStem(vocab_size, d_model, max_seq_len - 1)
        self.blocks = nn.Sequential(Block(d_model, 4, causal=True), Block(d_model, 4, causal=True))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

    def forward(self, input_ids):
        return self.head(self.norm(self.blocks(self.stem(input_ids))))


CONFIG = {"vocab_size": 104, "d_model": 48}
ENTRIES = [
    broken("constant_output", "softmax of one output", RiskScore, ("", "layers", "layers.4"), ("wrong_softmax_dim",)),
    broken("constant_output", "mean after instance norm", PooledInstanceNorm, ("", "norm", "fc")),
    broken("constant_output", "empty range of actions", Policy, ("", "mu", "trunk*")),
    broken(
        "ignored_input",
        "item tower reads the user",
        TwoTower,
        ("", "item_tower", "item_tower.*", "item"),
        example_inputs={"user": gauss(4, 12), "item": gauss(4, 12, seed=5)},
    ),
    broken(
        "ignored_input",
        "time step divided to zero",
        Denoiser,
        ("", "t"),
        example_inputs={"x": gauss(2, 3, 16, 16), "t": torch.tensor([17, 640])},
    ),
    broken(
        "ignored_input",
        "critic without action",
        QNetwork,
        ("", "action", "q1", "q1.0"),
        example_inputs={"state": gauss(4, 10), "action": gauss(4, 4, seed=5).tanh()},
    ),
    broken("vocab_mismatch", "head too short", SmallHeadGPT, ("", "lm_head")),
    broken("vocab_mismatch", "table too short", lambda: NarrowTable(CONFIG), ("", "embed"), config=CONFIG),
    broken("vocab_mismatch", "head of the wrong width", WideHeadLM, ("", "output"), task="causal_lm"),
    broken("shape_crash", "squeeze of the batch", HousePrice, ("", "c"), task="regression"),
    broken("shape_crash", "state for four", KeywordSpotter, ("", "rnn"), example_inputs={"mel": gauss(4, 20, 30)}),
    broken(
        "shape_crash",
        "odd length",
        PairMerger,
        ("", "merge"),
        task="text_classification",
        example_inputs={"input_ids": token_ids(2, 12)},
    ),
    broken(
        "shape_crash",
        "one position too few",
        OffByOneGPT,
        ("", "stem", "stem.pos"),
        config={"vocab_size": 100, "d_model": 48, "max_seq_len": 64},
    ),
]
