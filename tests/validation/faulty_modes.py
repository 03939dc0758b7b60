"""A small model with one part whose behaviour a test supplies, for tokens or features."""

from types import SimpleNamespace

from torch import nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.validation.check import Check
from utils.validation.runner import run_check


class Part(nn.Module):
    """A residual layer, and then whatever `act` does to its result."""

    def __init__(self, act=None, setup=None):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.act = SimpleNamespace(call=act)
        if setup:
            setup(self)

    def forward(self, hidden):
        hidden = hidden + self.linear(hidden).tanh()
        return self.act.call(self, hidden) if self.act.call else hidden


class Model(nn.Module):
    """Token ids ``(batch, seq)`` or features ``(batch, 8)`` in, logits out; the part `bad` is the one to find."""

    def __init__(self, act=None, setup=None, features=False, drop=0.0, norm=False):
        super().__init__()
        self.enter = nn.Linear(8, 16) if features else nn.Embedding(50, 16)
        self.drop = nn.Dropout(drop)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.good, self.bad = Part(), Part(act, setup)
        self.head = nn.Linear(16, 4 if features else 50)

    def forward(self, x):
        return self.run(x)

    def run(self, x):
        return self.head(self.bad(self.good(self.norm(self.drop(self.enter(x))))))


def result_of(check, model, **spec):
    """Run one check on a model."""
    return run_check(ModelAdapter(model, spec=ModelSpec(**spec)), Check("check", 1, "?", check), 10.0)


def found(check, model, **spec):
    """Run one check and return what it found as ``(code, severity, where)``."""
    return [(f.code, f.severity, f.where) for f in result_of(check, model, **spec).findings]


def attributes(**values):
    """Return a function that sets attributes to what the given functions return."""

    def setup(part):
        for key, value in values.items():
            setattr(part, key, value())

    return setup
