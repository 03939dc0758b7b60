"""Memory that stays after each call, wherever it is kept; memory by length, with and without a promise."""

import functools
import math
from collections import deque
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.allocations import Allocations
from utils.validation.check import Budget, Skipped
from utils.validation.runner import preserved
from utils.validation.scaling import check_memory_growth, check_memory_scaling

STORE = []


class Keeper(nn.Module):
    """A layer that keeps something in each call."""

    shared: ClassVar[list] = []

    def __init__(self, how, width=16):
        super().__init__()
        self.layer, self.how = nn.Linear(width, width), how
        self.history, self.table, self.state = [], {}, None
        self.window, self.calls = deque(maxlen=8), 0
        for name, shape in (("codes", (8, width)), ("sums", (8, width)), ("counts", (8,))):
            self.register_buffer(name, torch.ones(shape))
        self.register_buffer("keys", torch.zeros(2, 0, width))
        self.register_buffer("last", torch.zeros(1))
        if how == "hook":
            seen = []
            self.layer.register_forward_hook(lambda module, args, output: seen.append(output))

    def forward(self, x, log=[]):  # noqa: B006
        hidden = self.layer(x)
        flat = hidden.flatten(1)
        if self.how == "list":
            self.history.append(hidden)
        elif self.how == "detached":
            self.history.append(hidden.detach().clone())
        elif self.how == "numpy":
            self.history.append(hidden.detach().numpy())
        elif self.how == "numbers":
            self.history.append(hidden.detach().flatten().tolist() * 3)
        elif self.how == "train_only" and self.training:
            self.history.append(hidden.mean())
        elif self.how == "eval_only" and not self.training:
            self.history.append(hidden)
        elif self.how == "dict":
            self.table[len(self.table)] = {"hidden": (hidden,)}
        elif self.how == "by_id":
            self.table[hidden] = hidden
        elif self.how == "graph":
            self.state = flat.sum() if self.state is None else self.state * 0.5 + flat.exp().sum()
        elif self.how == "buffer":
            self.keys = torch.cat([self.keys, hidden.detach().reshape(2, -1, hidden.shape[-1])], dim=1)
        elif self.how == "class":
            Keeper.shared.append(hidden)
        elif self.how == "default":
            log.append(hidden)
        elif self.how == "global":
            STORE.append(hidden)
        elif self.how.startswith("every"):
            self.calls += 1
            if self.calls % int(self.how[-1]) == 0:
                self.history.append(hidden.detach())
        # From here on nothing grows for ever.
        elif self.how == "window":
            self.window.append(hidden.detach())
        elif self.how == "last":
            self.last = hidden.detach().mean().view(1)
        elif self.how == "cleared":
            self.history.clear()
            self.history.append(hidden)
        elif self.how == "by_length":
            self.table.setdefault(tuple(x.shape), torch.ones(x.shape))
        elif self.how == "cycle":
            cycle = [hidden]
            cycle.append(cycle)
        elif self.how == "counter":
            self.history.append(1)
        elif self.how == "first":
            self.table.setdefault("mask", torch.ones(4096))
        elif self.how.startswith("late"):
            self.calls += 1
            if self.calls == int(self.how[-1]):
                self.state = torch.ones(4096)
        elif self.how.startswith("flushed"):
            self.history.append(hidden.detach())
            if len(self.history) == int(self.how[-1]):
                self.history.clear()
        elif self.how == "codebook" and self.training:
            with torch.no_grad():
                flat = hidden.reshape(-1, hidden.shape[-1])
                near = torch.cdist(flat, self.codes).argmin(1)
                ones = functional.one_hot(near, len(self.codes)).to(flat.dtype)
                self.counts = 0.9 * self.counts + 0.1 * ones.sum(0)
                self.sums = 0.9 * self.sums + 0.1 * ones.T @ flat
                self.codes = self.sums / self.counts.clamp(min=1e-5)[:, None]
        return hidden


class Language(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(40, 16), nn.ModuleList([Keeper("none"), Keeper(how)])
        self.head = nn.Linear(16, 40)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Picture(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.keep = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Keeper(how)
        self.head = nn.Linear(16, 5)

    def forward(self, pixel_values):
        return self.head(self.keep(self.norm(self.conv(pixel_values)).mean((2, 3))))


def run(check, model, spec=None, seconds=5.0):
    adapter = ModelAdapter(model, spec=spec)
    with preserved(adapter.module, 0), torch.enable_grad():
        adapter.module.eval()
        return check(adapter, Budget(seconds))


KEPT = ["list", "detached", "numpy", "numbers", "train_only", "eval_only", "dict", "by_id", "graph", "buffer", "class",
        "default", "global", "hook", "every2", "every3", "every4"]  # fmt: skip


@pytest.mark.parametrize("how", KEPT)
def test_what_stays_is_found_with_its_holder(how):
    for model, where in ((Language(how), "blocks.1"), (Picture(how), "keep")):
        Keeper.shared.clear()
        STORE.clear()
        finding = run(check_memory_growth, model).findings[0]
        where = f"{where}.layer" if how == "hook" else where
        assert (finding.code, finding.severity, finding.where) == ("memory_growth", "warn", where)
        assert "keeps" in finding.message
        assert ("train mode" in finding.message) == (how in ("train_only", "graph"))


def test_the_reproduction_runs(capsys):
    model = Language("list")
    exec(run(check_memory_growth, model).findings[0].reproduction, {"model": model})
    counts = [int(word) for word in capsys.readouterr().out.strip("[]\n").split(", ")]
    assert sorted(set(counts)) == counts


@pytest.mark.parametrize(
    "how",
    [
        "none",
        "window",
        "last",
        "cleared",
        "by_length",
        "cycle",
        "counter",
        "first",
        "late2",
        "late5",
        "late9",
        "flushed5",
        "flushed7",
        "flushed9",
        "codebook",
    ],
)
def test_bounded_memory_passes(how):
    for model in (Language(how), Picture(how)):
        outcome = run(check_memory_growth, model)
        assert not outcome.findings
        assert outcome.value == "0 B"


def test_sound_models_pass(tiny):
    for model in (tiny.GPT(), tiny.LSTM(), tiny.ConvNet(), tiny.MLP(), tiny.Experts()):
        assert not run(check_memory_growth, model).findings


def test_a_short_budget_calls_less_often():
    model = Language("list")
    adapter = ModelAdapter(model)
    budget = Budget(0.0)
    with preserved(model, 0), torch.enable_grad():
        outcome = check_memory_growth(adapter, budget)
    assert outcome.findings
    assert budget.reduced == ["fewer repeated calls"]


@pytest.mark.parametrize("how", ["window", "late5", "late9"])
def test_a_short_budget_is_no_reason_to_suspect_a_bounded_cache(how):
    model = Language(how)
    adapter = ModelAdapter(model)
    with preserved(model, 0), torch.enable_grad():
        outcome = check_memory_growth(adapter, Budget(0.0))
    assert not outcome.findings


def test_allocations_by_hand():
    """Peak: the input of tanh and its output; afterwards what autograd and the caller keep."""
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(4, 8)
    with Allocations(model, [x]) as tracker:
        y = model(x)
        assert tracker.count == 3
        assert (tracker.peak, tracker.current) == (2 * 4 * 4 * 16, 4 * 4 * (16 + 3))
        kept = y.detach().numpy()
        del y
        assert tracker.current == kept.nbytes == 48
        assert len(tracker.addresses()) == 1
        assert tracker.makers(tracker.addresses()) == {"": 48}
        del kept
    assert tracker.current == 0


class Mixer(nn.Module):
    """Attention with its full matrix, in windows of 16, fused, or linear."""

    def __init__(self, kind, width=32):
        super().__init__()
        self.qkv, self.kind = nn.Linear(width, 3 * width), kind

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        batch, length, width = q.shape
        if self.kind == "full":
            return (q @ k.mT / math.sqrt(width)).softmax(-1) @ v
        if self.kind == "masked_window":
            near = (torch.arange(length)[:, None] - torch.arange(length)).abs() < 16
            return (q @ k.mT).masked_fill(~near, float("-inf")).softmax(-1) @ v
        if self.kind == "queries":
            return torch.stack([(q[:, i : i + 1] @ k.mT).softmax(-1) @ v for i in range(length)], 1).squeeze(2)
        if self.kind == "window":
            pad = -length % 16
            q, k, v = (functional.pad(t, (0, 0, 0, pad)).view(batch, -1, 16, width) for t in (q, k, v))
            return ((q @ k.mT).softmax(-1) @ v).reshape(batch, -1, width)[:, :length]
        if self.kind == "fused":
            return functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return torch.cumsum(k.sigmoid() * v, 1) / torch.cumsum(k.sigmoid(), 1) * q.sigmoid()


class Long(nn.Module):
    def __init__(self, kind, vocab=40):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(vocab, 32), nn.ModuleList([Mixer(kind)]), nn.Linear(32, vocab)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for mix in self.mix:
            x = x + mix(x)
        return self.head(x)


class Frames(nn.Module):
    """Features ``(batch, time, width)``."""

    def __init__(self, kind):
        super().__init__()
        self.enter, self.mix, self.head = nn.Linear(20, 32), Mixer(kind), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.mix(self.enter(x)).mean(1))


PROMISE = ModelSpec(task="masked_lm", linear_memory=True, max_length=1024)


@pytest.mark.parametrize("kind", ["full", "masked_window", "queries"])
@pytest.mark.parametrize("vocab", [40, 2000])
def test_quadratic_memory_where_linear_was_promised(kind, vocab):
    outcome = run(check_memory_scaling, Long(kind, vocab), PROMISE)
    assert [(f.code, f.severity, f.where) for f in outcome.findings] == [("quadratic_memory", "warn", "mix.0")]
    assert outcome.details["lengths"] == [256, 512, 1024]
    assert "linear memory was promised" in outcome.findings[0].message


@pytest.mark.parametrize("kind", ["window", "fused", "linear"])
def test_linear_memory_keeps_its_promise(kind):
    outcome = run(check_memory_scaling, Long(kind), PROMISE)
    assert not outcome.findings
    assert outcome.value == pytest.approx(1.0, abs=0.05)


def test_without_a_promise_growth_is_only_described():
    outcome = run(check_memory_scaling, Long("full"), ModelSpec(task="masked_lm", max_length=1024))
    assert not outcome.findings
    assert outcome.threshold is None
    assert outcome.details["exponent"] > 1.1
    assert "no promise of linear memory was made" in outcome.why


def test_features_over_time():
    spec = functools.partial(ModelSpec, task="regression", example_inputs={"x": torch.randn(2, 12, 20)})
    outcome = run(check_memory_scaling, Frames("full"), spec(linear_memory=True))
    assert [(f.code, f.where) for f in outcome.findings] == [("quadratic_memory", "mix")]
    assert not run(check_memory_scaling, Frames("linear"), spec(linear_memory=True)).findings
    with pytest.raises(Skipped, match="no length that could be chosen"):
        run(check_memory_scaling, Frames("full"), spec())


def test_a_model_of_one_length_is_skipped(tiny):
    with pytest.raises(Skipped, match="three different lengths are needed"):
        run(check_memory_scaling, tiny.GPT(longest=2))


def test_a_short_budget_measures_shorter_texts_and_says_so():
    adapter = ModelAdapter(Long("full"), spec=PROMISE)
    budget = Budget(0.0)
    with preserved(adapter.module, 0), torch.enable_grad():
        outcome = check_memory_scaling(adapter, budget)
    assert outcome.details["lengths"][-1] == 64
    assert budget.reduced == ["memory measured up to length 64, not 1024"]
    assert np.isfinite(outcome.value)
