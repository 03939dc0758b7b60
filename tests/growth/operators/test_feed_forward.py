"""More hidden units: random rows in, zero columns out, gates and halves of one weight included."""

import pytest
import torch
from torch import nn

from tests.growth.toys import Toy, answer, assert_undone, grown, planned, shapes, tensors
from utils.growth.edits import GrowthRefusedError, Plan, Widen
from utils.growth.surgery import Surgery


@pytest.mark.parametrize("options", [{}, {"gate": True}, {"post": True}], ids=["plain", "gated", "post-norm"])
@pytest.mark.parametrize("where", [None, 1, "blocks.0"])
def test_the_function_stays_and_undo_brings_the_same_tensors_back(options, where):
    model = Toy(**options)
    plan, surgery, old, new = grown(model, "feed_forward", amount=7, where=where)
    assert torch.allclose(new, old, atol=1e-12)
    assert (plan.before, plan.after, plan.promise) == (24, 31, "bounded")
    widths = [block.up.weight.shape[0] for block in model.blocks]
    assert widths == {None: [31, 31], 1: [24, 31], "blocks.0": [31, 24]}[where]
    surgery.undo()
    known = tensors(model)
    Surgery(model, plan).undo()
    assert_undone(model, known)


def test_rows_are_drawn_and_columns_zero():
    model = Toy(gate=True)
    old = model.blocks[0].up.weight.detach().clone()
    Surgery(model, planned(model, "feed_forward", amount=40))
    block = model.blocks[0]
    assert torch.equal(block.up.weight[:24], old)
    for layer in (block.up, block.gate):
        assert 0.7 < float(layer.weight[24:].detach().std() / layer.weight[:24].detach().std()) < 1.4
        assert not layer.bias[24:].any()
        assert layer.out_features == 64
    assert not block.down.weight[:, 24:].any()
    assert block.down.in_features == 64


class Halves(nn.Module):
    """Gate and value are halves of one weight, and the split is a number or is computed."""

    def __init__(self, number):
        super().__init__()
        self.both, self.back, self.half = nn.Linear(16, 48), nn.Linear(24, 16), number

    def forward(self, x):
        value, gate = self.both(x).split(self.half, -1) if self.half else self.both(x).chunk(2, -1)
        return x + self.back(value * torch.sigmoid(gate))


@pytest.mark.parametrize("number", [24, None])
def test_both_halves_of_one_weight_grow(number):
    model = Toy()
    model.blocks = nn.ModuleList(Halves(number) for _ in range(2))
    plan, _, old, new = grown(model, "feed_forward", amount=4)
    assert Widen("blocks.0.both.weight", 0, ((24, 4), (48, 4)), "like") in plan.edits
    assert torch.allclose(new, old, atol=1e-12)
    assert model.blocks[0].half == (28 if number else None)


def test_a_size_written_into_the_code_is_refused():
    class Written(Halves):
        def forward(self, x):
            value, gate = self.both(x).split(24, -1)
            return x + self.back(value * torch.sigmoid(gate))

    model = Toy()
    model.blocks = nn.ModuleList(Written(None) for _ in range(2))
    with pytest.raises(GrowthRefusedError, match="does not keep the function: .* Sizes written into forward"):
        planned(model, "feed_forward", amount=4)


def test_a_shared_pair_grows_once():
    model = Toy()
    model.blocks[1].up, model.blocks[1].down = model.blocks[0].up, model.blocks[0].down
    plan, _, old, new = grown(model, "feed_forward", amount=4)
    assert sum(isinstance(edit, Widen) for edit in plan.edits) == 3
    assert torch.allclose(new, old, atol=1e-12)
    assert model.blocks[1].up is model.blocks[0].up


def test_numbers_of_a_config_follow_when_all_pairs_grow():
    model = Toy()
    model.config.intermediate_size = 24
    Surgery(model, planned(model, "feed_forward", amount=8, where=0))
    assert model.config.intermediate_size == 24
    other = Toy()
    other.config.intermediate_size = 24
    Surgery(other, planned(other, "feed_forward", amount=8))
    assert other.config.intermediate_size == 32


def test_new_units_learn_one_side_after_the_other():
    model = Toy()
    Surgery(model, planned(model, "feed_forward", amount=4))
    block, ids = model.blocks[0], torch.arange(24).reshape(2, 12)
    model(ids).square().mean().backward()
    assert block.down.weight.grad[:, 24:].abs().sum() > 0
    assert not block.up.weight.grad[24:].any()


def test_a_replay_gives_the_same_names_and_shapes():
    first, second = Toy(gate=True), Toy(gate=True)
    plan = planned(first, "feed_forward", to=30)
    Surgery(first, plan)
    Surgery(second, Plan.from_dict(plan.to_dict()))
    assert shapes(first) == shapes(second)
    second.load_state_dict(first.state_dict())
    assert torch.equal(answer(first), answer(second))


def test_frozen_layers_stay_frozen():
    model = Toy()
    model.blocks[0].up.weight.requires_grad_(False)
    Surgery(model, planned(model, "feed_forward", amount=4))
    assert not model.blocks[0].up.weight.requires_grad
    assert model.blocks[0].down.weight.requires_grad


def test_what_cannot_grow_is_refused():
    with pytest.raises(GrowthRefusedError, match=r"There is no feed-forward pair in 'head'. Expected one of blocks\.0"):
        planned(Toy(), "feed_forward", amount=1, where="head")
    with pytest.raises(GrowthRefusedError, match="Block 9 was asked for, and there are 2"):
        planned(Toy(), "feed_forward", amount=1, where=9)
    with pytest.raises(GrowthRefusedError, match="feed_forward was to grow to 24, and the model has 24 hidden units"):
        planned(Toy(), "feed_forward", to=24)
    model = Toy()
    model.blocks[1].up, model.blocks[1].down = nn.Linear(16, 32), nn.Linear(32, 16)
    with pytest.raises(GrowthRefusedError, match="The feed-forward pairs have 24, 32 hidden units"):
        planned(model, "feed_forward", amount=1)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = nn.Embedding(37, 16), nn.Linear(16, 37)

        def forward(self, input_ids):
            return self.head(self.tokens(input_ids))

    with pytest.raises(GrowthRefusedError, match="There is no feed-forward pair to widen"):
        planned(Flat(), "feed_forward", amount=1)


def test_pairs_of_another_kind_that_cannot_grow_stay_and_are_named():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rise, self.fall = nn.Linear(16, 24), nn.Linear(24, 16)
            self.gains = nn.Parameter(torch.rand(24) + 0.5)

        def forward(self, x):
            return x + self.fall(torch.tanh(self.rise(x)) * self.gains)

    class Both(Toy):
        def __init__(self):
            super().__init__()
            self.other = Fixed()

        def forward(self, input_ids):
            x = self.tokens(input_ids) + self.places[: input_ids.shape[1]]
            for block in self.blocks:
                x = self.other(block(x))
            return self.head(self.norm(x))

    model = Both()
    plan = planned(model, "feed_forward", amount=5)
    assert plan.where == ("blocks.0", "blocks.1")
    assert any("other" in reason and "stay as they are" in reason for reason in plan.reasons)
    old = answer(model)
    Surgery(model, plan)
    assert torch.allclose(answer(model), old, atol=1e-12)
    with pytest.raises(GrowthRefusedError, match="does not keep the function"):
        planned(Both(), "feed_forward", amount=5, where="other")
