"""Layers that torch does not see, has not sized or sees twice; and what is hidden or shared on purpose."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tests.validation.faulty_modes import Model, Part, attributes, found, result_of
from utils.validation.hidden import hidden_items
from utils.validation.registration import check_registration

HIDDEN, LAZY, SHARED = "unregistered_layer", "lazy_parameter", "shared_weight"


def layer():
    return nn.Linear(16, 16)


def closure(part):
    inner = layer()
    part.function = lambda hidden: inner(hidden)


GLOBAL = nn.Parameter(torch.full((16,), 2.0))

FAULTS = {
    "list": (lambda part, h: part.held[0](h), attributes(held=lambda: [layer()]), "bad.held"),
    "dict": (lambda part, h: part.held["a"](h), attributes(held=lambda: {"a": layer()}), "bad.held"),
    "tuple": (lambda part, h: part.held[0](h), attributes(held=lambda: (layer(),)), "bad.held"),
    "nested": (lambda part, h: part.held["a"][0](h), attributes(held=lambda: {"a": [layer()]}), "bad.held"),
    "object": (lambda part, h: part.o.inner(h), attributes(o=lambda: SimpleNamespace(inner=layer())), "bad.o.inner"),
    "closure": (lambda part, h: part.function(h), closure, "bad.function"),
    "method": (lambda part, h: part.function(h), attributes(function=lambda: layer().forward), "bad.function"),
    "weight": (lambda part, h: h * part.held[0], attributes(held=lambda: [nn.Parameter(torch.ones(16))]), "bad.held"),
    "tensor": (lambda part, h: h * part.w, attributes(w=lambda: torch.ones(16, requires_grad=True)), "bad.w"),
    "made in forward": (lambda part, h: layer()(h), None, "bad"),
    "global": (lambda part, h: h * GLOBAL, None, "bad"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_hidden_layers(name):
    act, setup, where = FAULTS[name]
    assert found(check_registration, Model(act, setup)) == [(HIDDEN, "fail", where)]


def test_a_hidden_frozen_layer_is_worth_a_look():
    model = Model(lambda part, h: part.held[0](h), attributes(held=lambda: [layer().requires_grad_(False)]))
    assert found(check_registration, model) == [(HIDDEN, "warn", "bad.held")]


class Stack(nn.Module):
    """Token ids in, logits out, through `blocks`."""

    def __init__(self, blocks, config=None):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(50, 16), blocks, nn.Linear(16, 50)
        self.config = config or {}

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Block(nn.Module):
    def __init__(self, attention=None):
        super().__init__()
        self.attention, self.norm = attention or layer(), nn.LayerNorm(16)

    def forward(self, hidden):
        return hidden + self.attention(self.norm(hidden))


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = self.key = layer()
        self.act = self.act2 = nn.GELU()

    def forward(self, hidden):
        return hidden + (self.query(hidden) @ self.key(hidden).transpose(1, 2)).softmax(-1) @ self.act2(hidden)


def three(change=None):
    blocks = nn.ModuleList(Block() for _ in range(3))
    if change:
        change(blocks)
    return blocks


def same_parameter(blocks):
    blocks[1].attention.weight = blocks[0].attention.weight


def same_memory(blocks):
    blocks[1].attention.weight.data = blocks[0].attention.weight.data


def same_part(blocks):
    blocks[1].attention = blocks[0].attention


def same_block(blocks):
    blocks[1] = blocks[0]


def one_attention():
    attention = layer()
    return nn.ModuleList(Block(attention) for _ in range(3))


SHARING = [
    (lambda: nn.ModuleList([Block()] * 3), "blocks"), (lambda: nn.Sequential(*[Block()] * 3), "blocks"),
    (one_attention, "blocks.1.attention"), (lambda: three(same_parameter), "blocks.1.attention.weight"),
    (lambda: three(same_memory), "blocks.1.attention.weight"), (lambda: three(same_part), "blocks.1.attention"),
    (lambda: three(same_block), "blocks.1"), (lambda: nn.ModuleList([Projections()]), "blocks.0.key"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "where"), SHARING)
def test_shared_weights(build, where):
    assert found(check_registration, Stack(build())) == [(SHARED, "fail", where)]


def test_two_names_for_a_larger_part_that_runs_twice():
    class Twins(Stack):
        def __init__(self):
            super().__init__(nn.ModuleList())
            self.left = self.right = Block()

        def forward(self, x):
            hidden = self.embed(x)
            return self.head(self.left(hidden) + self.right(hidden * 2))

    assert found(check_registration, Twins()) == [(SHARED, "fail", "right")]


class Tied(Stack):
    def __init__(self):
        super().__init__(three())
        self.head.weight = self.embed.weight


class Looped(Stack):
    """One block, run three times."""

    def __init__(self):
        super().__init__(None)
        self.block = Block()
        self.blocks = [self.block] * 3


class Declared(Stack):
    _tied_weights_keys = (r"blocks\.\d+\.attention",)


class Alias(Stack):
    def __init__(self):
        super().__init__(three())
        self.lm_head = self.head


def hide_itself(part):
    part.me = [part]


SOUND = {
    "tied": Tied, "looped": Looped, "distinct": lambda: Stack(three()), "declared": lambda: Declared(one_attention()),
    "announced": lambda: Stack(nn.ModuleList([Block()] * 3), {"share_layers": True}), "alias": Alias,
    "hidden and not used": lambda: Model(None, attributes(held=lambda: [layer()])),
    "the model itself": lambda: Model(None, hide_itself),
    "a second list of registered layers": lambda: Model(
        lambda part, h: part.again[0](h), lambda part: setattr(part, "again", [part.linear])
    ),
    "plain tensor": lambda: Model(lambda part, h: h + part.t, attributes(t=lambda: torch.ones(16))),
    "recurrent": lambda: nn.LSTM(8, 8, 2, batch_first=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_sound_look_alikes(name):
    result = result_of(check_registration, SOUND[name]())
    assert result.status == "pass", result.why


def test_lazy_layers_are_named_and_stay_lazy():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LazyLinear(4))
    assert found(check_registration, model) == [(LAZY, "fail", "2")]
    assert is_lazy(model[2].weight) and model.training


def test_layers_that_the_first_call_makes():
    class Late(Model):
        def forward(self, x):
            if not hasattr(self, "late"):
                self.late = layer()
            return self.head(self.late(self.enter(x)))

    class LateWeight(Model):
        def forward(self, x):
            if not hasattr(self, "scale"):
                self.scale = nn.Parameter(torch.ones(16))
            return self.head(self.enter(x) * self.scale)

    assert found(check_registration, Late()) == [(LAZY, "fail", "late")]
    assert found(check_registration, LateWeight()) == [(LAZY, "fail", "scale")]


def test_messages_say_how_much_is_hidden_and_what_is_shared():
    finding = result_of(check_registration, Model(*FAULTS["list"][:2])).findings[0]
    assert finding.message.startswith("1 module with 272 numbers change the output but are no part of")
    finding = result_of(check_registration, Stack(nn.ModuleList([Block()] * 4))).findings[0]
    assert "blocks.0, blocks.1, blocks.2 and 1 more are one and the same module of 304 parameters" in finding.message
    assert "runs 4 times" in finding.message


def test_hidden_items_are_listed_once_with_their_owner():
    part = Part(None, attributes(table=lambda: {"a": [torch.ones(2)]}, inner=lambda: [layer()]))
    part.same = part.table["a"]
    items = hidden_items(part)
    assert [item.where for item in items] == ["table", "inner"]
    assert len(items[0].slots) == 2


class Chained(nn.Module):
    """Lists of layers from one assignment; with `both`, both names are used."""

    def __init__(self, both):
        super().__init__()
        self.both, self.words = both, nn.Embedding(50, 8)
        self.keys = self.values = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids):
        x = self.words(input_ids)
        for key, value in zip(self.keys, self.values, strict=True):
            x = x + key(x).sigmoid() * (value(x) if self.both else x)
        return x


def test_lists_from_one_assignment():
    assert found(check_registration, Chained(True)) == [("shared_weight", "fail", "values")]
    assert found(check_registration, Chained(False)) == []


class Relay(nn.Module):
    """Makes a layer once and hands it to each of its blocks, as CoaT does with its position encodings."""

    def __init__(self, shared: nn.Module):
        super().__init__()
        self.shared = shared
        self.blocks = nn.ModuleList(Block(shared) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_layer_that_is_handed_to_blocks_from_its_own_home():
    """Sharing by hand is a choice; shared batch statistics never are."""
    assert found(check_registration, Relay(layer())) == [(SHARED, "warn", "blocks.0.attention")]
    normed = Relay(nn.Sequential(layer(), nn.BatchNorm1d(16)))
    assert [severity for _, severity, _ in found(check_registration, normed)] == ["fail"]
