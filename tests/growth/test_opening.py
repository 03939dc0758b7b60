import pytest
import torch

from tests.growth.operators.test_expert import Listed, Stacked, made
from tests.growth.toys import planned
from utils.adapters import ModelAdapter
from utils.growth.opening import STEPS, Openings
from utils.growth.scratch import changed_by
from utils.growth.surgery import Surgery
from utils.training.state import ModelChange, TensorChange


@pytest.mark.parametrize("make", [Listed, Stacked])
def test_a_new_expert_is_let_in_until_it_is_one_like_any_other(make):
    model = made(make)
    ids = torch.arange(24).reshape(2, 12)
    before = model(ids)
    plan = planned(model, "expert", amount=1)
    Surgery(model, plan)
    openings = Openings()
    openings.begin(ModelAdapter(model), plan)
    assert len(openings.rising) == 2
    assert changed_by(before, model(ids)) < 0.05, "next to nothing has arrived"
    moved, steps = [], 0
    while openings.rising:
        openings.step(model)
        steps += 1
        moved.append(float((model(ids) - before).abs().max()))
    assert STEPS - 1 <= steps <= STEPS + 1
    assert moved[-1] > 1e-3
    model(ids).square().mean().backward()
    mixture = model.blocks[0].mixture
    gradient = mixture.experts[4].down.weight.grad if make is Listed else mixture.down.grad[4]
    assert gradient.abs().sum() > 0


def test_averages_follow_and_experts_that_still_rise_do_not_count():
    model = made()
    plan = planned(model, "expert", amount=1)
    Surgery(model, plan)
    openings, adapter = Openings(), ModelAdapter(model)
    openings.begin(adapter, plan)
    average = {name: torch.full_like(p, -1e4) for name, p in model.named_parameters()}
    openings.step(model, average)
    name = openings.rising[0]["name"]
    assert average[name][4] == model.get_parameter(name)[4]
    assert average[name][0] == -1e4
    end = float(model.get_parameter(name)[:4].mean())
    second = planned(model, "expert", amount=1)
    Surgery(model, second)
    openings.begin(adapter, second)
    both = [entry for entry in openings.rising if entry["name"] == name]
    assert [entry["first"] for entry in both] == [4, 5]
    while openings.rising:
        openings.step(model)
    assert model.get_parameter(name)[5].item() == pytest.approx(end, abs=1e-3)


def test_a_session_that_continues_opens_on():
    model = made()
    plan = planned(model, "expert", amount=1)
    Surgery(model, plan)
    one, two = Openings(), Openings()
    one.begin(ModelAdapter(model), plan)
    one.step(model)
    two.load_state_dict(one.state_dict())
    assert two.rising == one.rising
    assert two.rising[0] is not one.rising[0]


def test_names_are_followed_and_given_back():
    openings = Openings()
    openings.rising = [{"name": "blocks.1.bias"}, {"name": "gone"}]
    change = ModelChange("depth", 1, {"blocks.2.bias": torch.zeros(1)},
                         changes={"blocks.2.bias": TensorChange("blocks.1.bias")})  # fmt: skip
    undo = openings.follow(change)
    assert openings.rising == [{"name": "blocks.2.bias"}]
    undo()
    assert [entry["name"] for entry in openings.rising] == ["blocks.1.bias", "gone"]
