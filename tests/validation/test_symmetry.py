"""Units and parts that nothing tells apart, and equal ones that the first steps drive apart."""

import copy

import pytest
import torch
from torch import nn

from tests.validation.faulty_modes import found
from utils.validation.initialization import check_initialization

CODE = "symmetric_init"
X = torch.linspace(-9, 8, 48).sin().view(4, 12)


def expert(drop=0.0):
    return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(drop), nn.Linear(24, 12))


class Units(nn.Module):
    """Matrices of its own, multiplied from the right."""

    def __init__(self, first, second):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(first), nn.Parameter(second)
        self.bias = nn.Parameter(torch.zeros(20))

    def forward(self, x):
        return torch.tanh(x @ self.w1 + self.bias) @ self.w2


class Experts(nn.Module):
    """Parts beside each other; `mix` says how they are put together."""

    def __init__(self, mix, drop=0.0, copies=True):
        super().__init__()
        one = expert(drop)
        self.experts = nn.ModuleList(copy.deepcopy(one) if copies else expert() for _ in range(3))
        self.router, self.head, self.mix = nn.Linear(12, 3), nn.Linear(12, 3), mix

    def forward(self, x):
        return self.head(x + self.mix(self, x))


class Stacked(nn.Module):
    """One tensor of experts, filled with copies of the first."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(12, 12).div(4).repeat(3, 1, 1))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.einsum("bi,eij->bej", x, self.weights).relu().mean(1))


def averaged(model, x):
    return sum(part(x) for part in model.experts) / 3


def gated(model, x):
    gates = model.router(x).softmax(-1)
    return sum(gates[:, i, None] * part(x) for i, part in enumerate(model.experts))


def in_turn(model, x):
    for part in model.experts:
        x = x + part(x)
    return x


def with_a_teacher(model, x):
    with torch.no_grad():
        teacher = model.experts[1](x)
    return model.experts[0](x) + 0.1 * teacher + model.experts[2](x.flip(-1))


class Shared(Experts):
    def __init__(self):
        super().__init__(averaged)
        self.experts = nn.ModuleList([self.experts[0]] * 3)


class Members(nn.Module):
    """Members of an ensemble differ in their matrices; their biases start equal."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 12, 3).div(4))
        self.bias = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x):
        return (torch.einsum("bi,eij->bej", x, self.weights) + self.bias).mean(1)


class Grey(nn.Module):
    """One channel, given three times to weights that were drawn for one; `raw` keeps them outside of a layer."""

    def __init__(self, raw=False, same=False):
        super().__init__()
        units = torch.randn(1, 8, 1).repeat(3, 1, 20) if same else torch.randn(1, 8, 20).repeat(3, 1, 1)
        self.stem = None if raw else nn.Linear(24, 20)
        if self.stem is None:
            self.inflated = nn.Parameter(units / 5)
        else:
            self.stem.weight = nn.Parameter((units.flatten(0, 1).mT / 5).contiguous())
        self.head = nn.Linear(20, 3)
        if same:
            self.head.weight = nn.Parameter(torch.randn(3, 1).repeat(1, 20) / 10)

    def forward(self, x):
        channels = x[:, None, :8].expand(-1, 3, -1)
        if self.stem is None:
            return self.head(torch.einsum("bci,cio->bo", channels, self.inflated).tanh())
        return self.head(self.stem(channels.flatten(1)).tanh())


class Stem(nn.Module):
    """Convolutions, forward or transposed, whose input channels or units are equal."""

    def __init__(self, inputs, units, transposed=False):
        super().__init__()
        kind = nn.ConvTranspose1d if transposed else nn.Conv1d
        self.conv, self.head = kind(3, 16, 3, padding=1), nn.Linear(16, 3)
        shape = (1 if units else 16, 1 if inputs else 3, 3)
        weight = (torch.randn(shape) / 5).expand(16, 3, 3)
        self.conv.weight = nn.Parameter((weight.transpose(0, 1) if transposed else weight).contiguous())
        nn.init.constant_(self.conv.bias, 0.1)
        if units:
            self.head.weight = nn.Parameter(torch.randn(3, 1).repeat(1, 16) / 10)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x[:, None].expand(-1, 3, -1))).mean(2))


def constant(*shape):
    return torch.full(shape, 1 / shape[0])


BROKEN = {
    "right-hand matrices of ones": (lambda: Units(constant(12, 20), constant(20, 3)), "w1"),
    "columns repeated": (lambda: Units(torch.randn(12, 1).repeat(1, 20) / 4, torch.randn(1, 3).repeat(20, 1)), "w1"),
    "copies averaged": (lambda: Experts(averaged), "experts"),
    "copies in one tensor": (Stacked, "weights"),
    "equal units over equal inputs": (lambda: Grey(raw=True, same=True), "inflated"),
    "equal units of a convolution": (lambda: Stem(inputs=False, units=True), "conv.weight"),
    "equal units of a transposed one": (lambda: Stem(inputs=False, units=True, transposed=True), "conv.weight"),
}
SOUND = {
    "one input given thrice": lambda: Grey(),
    "one input given thrice to raw weights": lambda: Grey(raw=True),
    "one channel given thrice": lambda: Stem(inputs=True, units=False),
    "one channel given thrice, transposed": lambda: Stem(inputs=True, units=False, transposed=True),
    "random": lambda: Units(torch.randn(12, 20) / 4, torch.randn(20, 3) / 4),
    "ones read by random numbers": lambda: Units(constant(12, 20), torch.randn(20, 3) / 4),
    "ones after random numbers": lambda: Units(torch.randn(12, 20) / 4, constant(20, 3)),
    "copies with a router": lambda: Experts(gated),
    "copies with dropout": lambda: Experts(averaged, drop=0.2),
    "copies one after another": lambda: Experts(in_turn),
    "copy as a teacher": lambda: Experts(with_a_teacher),
    "experts drawn apart": lambda: Experts(averaged, copies=False),
    "one expert thrice": Shared,
    "biases of members": Members,
}


def codes(model):
    return [(code, where) for code, _, where in found(check_initialization, model, example_inputs={"x": X})]


@pytest.mark.parametrize("name", BROKEN)
def test_what_stays_equal(name):
    torch.manual_seed(0)
    make, where = BROKEN[name]
    assert codes(make())[0] == (CODE, where)


@pytest.mark.parametrize("name", SOUND)
def test_what_is_driven_apart(name):
    torch.manual_seed(0)
    assert CODE not in dict(codes(SOUND[name]()))


def test_layers_that_the_library_copies():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(12, 12), nn.TransformerEncoder(layer, 3), nn.Linear(12, 3))
    assert CODE not in [code for code, *_ in found(check_initialization, model)]


def test_the_model_stays_as_it_is():
    model = Experts(averaged)
    before = copy.deepcopy(model.state_dict())
    codes(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(part.training != model.training for part in model.modules())


def test_parameters_without_numbers_are_passed_over():
    """MobileBERT's head has a second table that is empty when its sizes are equal."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.extra = nn.Linear(12, 24), nn.Linear(12, 0, bias=False)
            self.head = nn.Linear(24, 3)

        def forward(self, x):
            return self.head(torch.cat([torch.tanh(self.body(x)), self.extra(x)], dim=-1))

    assert found(check_initialization, Head()) == []
