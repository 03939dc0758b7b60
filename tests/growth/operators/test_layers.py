import pytest
import torch
from torch import nn

from utils.adapters import ModelSpec
from utils.growth.edits import GrowthRefusedError, LineageError, Plan
from utils.growth.growing import grow
from utils.growth.lineage import lineage_of, rebuild
from utils.growth.surgery import Surgery

ROWS = ModelSpec(example_inputs={"input": torch.randn(4, 3)})
IMAGES = ModelSpec(example_inputs={"input": torch.randn(4, 1, 8, 8)}, task="image_classification")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 2))


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )


def test_a_chain_of_linear_layers_gets_deeper_bit_for_bit():
    model, rows = mlp().eval(), torch.randn(50, 3)
    before, optimizer = model(rows), torch.optim.Adam(mlp().parameters())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    event = grow(model, "depth", 2, spec=ROWS, optimizer=optimizer)
    assert torch.equal(model(rows), before)
    assert event.certificate.equal
    assert event.plan.where == ("2", "4"), "behind the ReLU: a leaky one changes its own answer"
    assert [type(part).__name__ for part in model] == [
        "Linear", "ReLU", "Linear", "ReLU", "Linear", "ReLU", "Dropout", "Linear", "LeakyReLU", "Linear"
    ]  # fmt: skip
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    start = model[2].weight.detach().clone()
    model(rows).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, start)


def test_convolutions_get_deeper_where_they_are_named():
    model, images = cnn().eval(), torch.randn(5, 1, 8, 8)
    before = model(images)
    grow(model, "depth", 1, where="2", spec=IMAGES)
    assert torch.equal(model(images), before)
    assert isinstance(model[3], nn.Conv2d)
    assert model[3].weight.shape == (4, 4, 3, 3)


def test_a_chain_is_built_again_from_its_lineage():
    model = mlp()
    grow(model, "depth", to=5, spec=ROWS)
    again = mlp()
    rebuild(again, lineage_of(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(torch.ones(2, 3)), model.eval()(torch.ones(2, 3)))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, input):
        return self.last(self.act(self.first(input)))


@pytest.mark.parametrize(
    ("model", "where", "words"),
    [
        (Named, None, "no activation in an nn.Sequential or nn.ModuleList"),
        (lambda: nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2)), None, "no activation in an nn.Sequential"),
        (mlp, "3", "no activation in an nn.Sequential"),
    ],
)
def test_what_has_no_place_for_a_layer_is_refused(model, where, words):
    with pytest.raises(GrowthRefusedError, match=words):
        grow(model(), "depth", 1, where=where, spec=ROWS)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"activation": 9}, "holds 6 modules"), ({"index": 0, "activation": -1}, "holds 6 modules")],
)
def test_a_plan_of_another_chain_is_refused(change, words):
    model = mlp()
    grow(model, "depth", 1, spec=ROWS)
    values = lineage_of(model)[0].plan.to_dict()
    values["edits"][0] |= change
    with pytest.raises(LineageError, match=words):
        Surgery(mlp(), Plan.from_dict(values))
