"""Models whose signal or gradient dies, explodes or is drowned from the first step on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import broken
from benchmarks.zoo.families import (
    Bert,
    Gpt,
    LstmLm,
    Mlp,
    ResNet,
    SsmLm,
    Tabular,
    Vit,
    table_example,
)  # fmt: skip
from benchmarks.zoo.parts import CausalConv, FeedForward


def changed(model: nn.Module, change: Callable[[Any], object]) -> nn.Module:
    """Apply `change` to the weights of `model`."""
    with torch.no_grad():
        change(model)
    return model


class ReluFeed(FeedForward):
    """Two layers with ReLU, whose first bias starts far below zero."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.low = nn.Parameter(torch.full((4 * width,), -12.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x) + self.low))


class NegatedNet(nn.Module):
    """Squares, negates and rectifies: nothing is left."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(-self.conv1(x).square())
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class DeadTabular(Tabular):
    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.body[0].bias, -30.0)


DEAD = [
    broken("dead_relu", "mlp with a bias of -100", lambda: changed(Mlp(), lambda m: m.layers[1].bias.fill_(-100.0)), ("layers.1*", "layers.2*", "")),
    broken("dead_relu", "feed-forward of bert", lambda: Bert(feed=ReluFeed), ("layers.*.feed*",), task="masked_lm"),
    broken("dead_relu", "negated squares", NegatedNet, ("", "conv1*", "conv2*")),
    broken("dead_relu", "tabular", DeadTabular, ("body*", "body.0*"), example_inputs=table_example()),
    broken("dead_relu", "batch norm shifted down", lambda: changed(ResNet(), lambda m: m.stages[1].bn1.bias.fill_(-40.0)), ("stages.1*",)),
]  # fmt: skip


def each(kind: type, value: float) -> Callable[[Any], None]:
    """Fill the weights of all modules of a kind."""

    def fill(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                module.weight.fill_(value)

    return fill


def equal_rows(layer: nn.Linear | nn.Conv2d) -> None:
    layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
    if layer.bias is not None:
        layer.bias.zero_()


SYMMETRIC = [
    broken("symmetric_init", "mlp of constants", lambda: changed(Mlp(), lambda m: (m.layers[0].weight.fill_(0.05), m.layers[1].weight.fill_(0.05))), "layers.*"),
    broken("symmetric_init", "equal rows in a feed-forward", lambda: changed(Gpt(), lambda m: equal_rows(m.blocks[1].feed.up)), "blocks.1.feed.up*", task="causal_lm"),
    broken("symmetric_init", "equal filters", lambda: changed(ResNet(), lambda m: equal_rows(m.stages[0].conv1)), "stages.0.conv1*"),
    broken("symmetric_init", "constant word vectors", lambda: changed(LstmLm(), lambda m: m.embedding.weight.fill_(0.02)), "embedding*", ("constant_output", "ignored_input"), task="causal_lm"),
    broken("symmetric_init", "equal patches", lambda: changed(Vit(), lambda m: (m.patches.weight.fill_(0.01))), "patches*"),
]  # fmt: skip

ZERO = [
    broken("zero_init", "both layers of a feed-forward", lambda: changed(Gpt(), lambda m: (m.blocks[0].feed.up.weight.zero_(), m.blocks[0].feed.up.bias.zero_(), m.blocks[0].feed.down.weight.zero_())), "blocks.0.feed*", task="causal_lm"),
    broken("zero_init", "hidden layer of an mlp", lambda: changed(Mlp(), lambda m: (m.layers[1].weight.zero_(), m.layers[1].bias.zero_())), "layers.1*"),
    broken("zero_init", "token table and tied head", lambda: changed(LstmLm(), lambda m: (m.rnn.weight_ih_l1.zero_(), m.rnn.weight_hh_l1.zero_(), m.rnn.bias_ih_l1.zero_(), m.rnn.bias_hh_l1.zero_())), "rnn*", ("constant_output", "ignored_input"), task="causal_lm"),
    broken("zero_init", "stem of a cnn", lambda: changed(ResNet(), lambda m: m.stem[0].weight.zero_()), ("stem*",), ("constant_output", "ignored_input")),
    broken("zero_init", "patches and positions of a vit", lambda: changed(Vit(), lambda m: (m.patches.weight.zero_(), m.patches.bias.zero_(), m.norm.weight.zero_())), ("patches*", "norm*"), ("constant_output", "ignored_input")),
]  # fmt: skip


def scaled(names: tuple[str, ...], by: float) -> Callable[[nn.Module], None]:
    """Multiply parameters whose names end so."""

    def scale(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                parameter.mul_(by)

    return scale


class TiedLoud(Gpt):
    """The head shares a table drawn from N(0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.tokens.weight, std=1.0)
        nn.init.normal_(self.positions.weight, std=1.0)
        self.head.weight = self.tokens.weight


EXPLODING_INIT = [
    broken("exploding_init", "head drawn from N(0, 5)", lambda: changed(Gpt(), scaled(("head.weight",), 250.0)), ("head*", ""), task="causal_lm"),
    broken("exploding_init", "tied head at N(0, 1)", TiedLoud, ("tokens*", "head*", ""), task="causal_lm"),
    broken("exploding_init", "mlp at N(0, 1)", lambda: changed(Mlp(depth=5), lambda m: [nn.init.normal_(layer.weight) for layer in m.layers]), ("layers*", ""), ("exploding_gradient",)),
    broken("exploding_init", "classifier of a resnet", lambda: changed(ResNet(), lambda m: nn.init.normal_(m.fc.weight, std=20.0)), ("fc*", "")),
    broken("exploding_init", "decoder of an lstm", lambda: changed(LstmLm(), lambda m: nn.init.normal_(m.decoder.weight, std=30.0)), ("decoder*", ""), task="causal_lm"),
]  # fmt: skip


class TinyMlp(nn.Module):
    """Plain tanh layers drawn with 0.01."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(6))
        self.head = nn.Linear(24, 4)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class TinyCnn(nn.Module):
    """A plain stack of convolutions drawn with 0.001."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(5))
        self.fc = nn.Linear(16, 10)
        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.001)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.fc(x.mean((2, 3)))


class QuietSsm(SsmLm):
    """No norm at the end, and tables of 1e-8."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_f = nn.Identity()
        nn.init.normal_(self.embedding.weight, std=1e-8)
        for mixer in self.mixers:
            nn.init.normal_(mixer.out.weight, std=1e-8)


VANISHING_INIT = [
    broken("vanishing_init", "tanh layers at 0.01", TinyMlp, ("layers*", "head*", ""), ("vanishing_gradient",)),
    broken("vanishing_init", "convolutions at 0.001", TinyCnn, ("convs*", "fc*", ""), ("vanishing_gradient",)),
    broken("vanishing_init", "state space at 1e-8", QuietSsm, ("embedding*", "mixers*", ""), ("vanishing_gradient",), task="causal_lm"),
    broken("vanishing_init", "mlp weights times 1e-3", lambda: changed(Mlp(depth=4), scaled(tuple(f"layers.{i}.weight" for i in range(4)), 1e-3)), ("layers*", ""), ("vanishing_gradient",)),
    broken("vanishing_init", "gru at 1e-6", lambda: changed(LstmLm(kind=nn.GRU), lambda m: [p.mul_(1e-6) for p in m.rnn.parameters()]), ("rnn*", ""), ("vanishing_gradient",), task="causal_lm"),
]  # fmt: skip


class ChaoticMlp(nn.Module):
    """Tanh layers with a gain of four: the output is bounded, the gradient grows backwards (Poole et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(16, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(28))
        self.head = nn.Linear(32, 4)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=4 / 32**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class SineNet(nn.Module):
    """Sines of thirty times a linear map, without the initialization that they need (Sitzmann et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 if i == 0 else 64, 64) for i in range(6))
        self.out = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30.0 * layer(x))
        return self.out(x)


class ChaoticRnn(nn.Module):
    """A plain recurrence whose matrix has a gain of ten, unrolled over the text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 48)
        self.enter, self.loop = nn.Linear(48, 48), nn.Linear(48, 48, bias=False)
        self.head = nn.Linear(48, 64)
        nn.init.normal_(self.loop.weight, std=10 / 48**0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.enter(self.embedding(input_ids))
        state, states = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            for _ in range(2):
                state = torch.tanh(x[:, step] + self.loop(state))
            states.append(state)
        return self.head(torch.stack(states, 1))


class LoudConv(nn.Module):
    """Plain convolutions with a gain of four; a head of 1e-8 hides it from the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(12))
        self.fc = nn.Linear(16, 10)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
            with torch.no_grad():
                conv.weight.mul_(4)
        nn.init.normal_(self.fc.weight, std=1e-8)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.fc(x.mean((2, 3)))


EXPLODING_GRADIENT = [
    broken("exploding_gradient", "chaotic tanh layers", ChaoticMlp, ("inlet*", "layers*", ""), ("exploding_init",)),
    broken("exploding_gradient", "sine layers", SineNet, ("layers*", ""), ("exploding_init",), task="regression"),
    broken("exploding_gradient", "chaotic recurrence", ChaoticRnn, ("loop*", "enter*", "embedding*", ""), ("exploding_init",), task="causal_lm"),
    broken("exploding_gradient", "plain convolutions with gain four", LoudConv, ("convs*", "fc*", ""), ("exploding_init",)),
]  # fmt: skip


class SigmoidStack(nn.Module):
    """Fifteen sigmoid layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(15))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return self.head(x)


class SigmoidLm(nn.Module):
    """Ten causal convolutions with sigmoids and no skips."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.convs = nn.ModuleList(CausalConv(32, 2) for _ in range(10))
        self.head = nn.Linear(32, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for conv in self.convs:
            x = torch.sigmoid(conv(x))
        return self.head(x)


class SlowSteps(nn.Module):
    """A plain recurrence that forgets: only the last steps of 48 have a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Linear(20, 20) for _ in range(12))
        self.out = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.enter:
            x = torch.tanh(0.1 * layer(x))
        return self.out(F.layer_norm(x, (20,)) * 0.05)


class SigmoidCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 12, 12, 3, padding=1) for i in range(10))
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.sigmoid(conv(x))
        return self.fc(x.mean((2, 3)))


VANISHING_GRADIENT = [
    broken("vanishing_gradient", "sigmoid layers", SigmoidStack, ("layers*", ""), ("vanishing_init",)),
    broken("vanishing_gradient", "sigmoid convolutions over tokens", SigmoidLm, ("embedding*", "convs*", ""), ("vanishing_init",), task="causal_lm"),
    broken("vanishing_gradient", "damped layers before a norm", SlowSteps, ("enter*", "out*", ""), ("vanishing_init",)),
    broken("vanishing_gradient", "sigmoid convolutions", SigmoidCnn, ("convs*", ""), ("vanishing_init",)),
]  # fmt: skip

ENTRIES = DEAD + SYMMETRIC + ZERO + EXPLODING_INIT + VANISHING_INIT + EXPLODING_GRADIENT + VANISHING_GRADIENT
