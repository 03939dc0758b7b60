import copy

import pytest
import torch
from torch import nn

from utils.training.optimizer_migration import migrate_optimizer
from utils.training.state import Insertion, MigrationError, ModelChange, TensorChange

NEW_ROWS = Insertion(0, ((2, 1),))


def trained(make, steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)).double()
    optimizer = make(model)
    for _ in range(steps):
        model(torch.randn(4, 3).double()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def widened(model):
    """Give the hidden layer one unit that does nothing."""
    before = dict(model.named_parameters())
    with torch.no_grad():
        model[0].weight = nn.Parameter(torch.cat([model[0].weight, torch.zeros(1, 3).double()]))
        model[0].bias = nn.Parameter(torch.cat([model[0].bias, torch.zeros(1).double()]))
        model[1].weight = nn.Parameter(torch.cat([model[1].weight, torch.zeros(3, 1).double()], 1))
    changes = {
        "0.weight": TensorChange("0.weight", insertions=(NEW_ROWS,)),
        "0.bias": TensorChange("0.bias", insertions=(NEW_ROWS,)),
        "1.weight": TensorChange("1.weight", insertions=(Insertion(1, ((2, 1),)),)),
    }
    return ModelChange("widen", 3, dict(model.named_parameters()), changes=changes, before=before)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.AdamW(m.parameters(), 1e-2),
        lambda m: torch.optim.AdamW(m.parameters(), 1e-2, amsgrad=True, fused=True),
        lambda m: torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9),
        lambda m: torch.optim.RMSprop(m.parameters(), 1e-3, centered=True, momentum=0.5),
        lambda m: torch.optim.Adagrad(m.parameters(), 1e-2),
        lambda m: torch.optim.NAdam(m.parameters(), 1e-3),
        lambda m: torch.optim.Adamax(m.parameters(), 1e-3),
        lambda m: torch.optim.Adadelta(m.parameters(), 0.5),
        lambda m: torch.optim.ASGD(m.parameters(), 1e-2, t0=1),
        lambda m: torch.optim.Rprop(m.parameters(), 1e-3),
    ],
    ids=[
        "adamw",
        "amsgrad-fused",
        "sgd-momentum",
        "rmsprop",
        "adagrad",
        "nadam",
        "adamax",
        "adadelta",
        "asgd",
        "rprop",
    ],
)
def test_the_old_entries_go_on_as_in_a_model_that_did_not_grow(make):
    """New units whose both sides are zero never move, so the old ones must take the very steps of the small model."""
    model, optimizer = trained(make)
    twin = copy.deepcopy(model)
    twin_optimizer = make(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    migrate_optimizer(optimizer, widened(model))
    for number in range(3):
        data = torch.randn(4, 3, generator=torch.Generator().manual_seed(number)).double()
        for one, its in ((model, optimizer), (twin, twin_optimizer)):
            its.zero_grad()
            one(data).square().mean().backward()
            its.step()
    assert torch.allclose(model[0].weight[:2], twin[0].weight, atol=1e-12)
    assert torch.allclose(model[1].weight[:, :2], twin[1].weight, atol=1e-12)
    assert torch.allclose(model[1].bias, twin[1].bias, atol=1e-12)


def test_the_undo_brings_back_the_very_same_state():
    model, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters(), 1e-2))
    groups, state = [dict(g) for g in optimizer.param_groups], dict(optimizer.state)
    before = copy.deepcopy(optimizer.state_dict())
    undo = migrate_optimizer(optimizer, widened(model))
    assert optimizer.param_groups[0]["params"][0].shape == (3, 3)
    undo()
    assert optimizer.param_groups == groups
    assert all(optimizer.state[p] is entry for p, entry in state.items())
    assert str(optimizer.state_dict()) == str(before)


def test_a_scaled_parameter_has_its_moments_scaled_the_other_way():
    model, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters(), 1e-2))
    old = optimizer.state[model[0].weight]
    first, second = old["exp_avg"].clone(), old["exp_avg_sq"].clone()
    before = dict(model.named_parameters())
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
    change = ModelChange("scale", 3, dict(model.named_parameters()),
                         changes={"0.weight": TensorChange("0.weight", factor=2.0)}, before=before)  # fmt: skip
    migrate_optimizer(optimizer, change)
    new = optimizer.state[model[0].weight]
    assert torch.equal(new["exp_avg"], first / 2)
    assert torch.equal(new["exp_avg_sq"], second / 4)
    assert new["step"] == old["step"]
    assert new["step"] is not old["step"]


def scaled(model, factor=2.0):
    """Multiply the first layer's weights by a factor."""
    before = dict(model.named_parameters())
    model[0].weight = nn.Parameter(model[0].weight.detach() * factor)
    return ModelChange("scale", 3, dict(model.named_parameters()),
                       changes={"0.weight": TensorChange("0.weight", factor=factor)}, before=before)  # fmt: skip


def test_the_updates_of_adadelta_are_in_units_of_the_weights():
    """A weight twice as large has half the gradient; Adadelta's step then has to be twice as long."""
    model, optimizer = trained(lambda m: torch.optim.Adadelta(m.parameters(), 1.0, eps=1e-30))
    old = {key: value.clone() for key, value in optimizer.state[model[0].weight].items()}
    gradient = torch.linspace(0.1, 0.6, 6).double().reshape(2, 3)
    twin = nn.Parameter(model[0].weight.detach().clone())
    follower = torch.optim.Adadelta([twin], 1.0, eps=1e-30)
    follower.state[twin] = {key: value.clone() for key, value in old.items()}
    migrate_optimizer(optimizer, scaled(model))
    assert torch.equal(optimizer.state[model[0].weight]["acc_delta"], old["acc_delta"] * 4)
    twin.grad, model[0].weight.grad = gradient, gradient / 2
    follower.step()
    optimizer.step()
    assert torch.allclose(model[0].weight, 2 * twin, rtol=1e-12)


def test_averaged_weights_follow_as_weights():
    model, optimizer = trained(lambda m: torch.optim.ASGD(m.parameters(), 1e-2, t0=1), 5)
    average = optimizer.state[model[0].weight]["ax"].clone()
    assert not torch.equal(average, model[0].weight)
    undo = migrate_optimizer(optimizer, scaled(model))
    assert torch.equal(optimizer.state[model[0].weight]["ax"], 2 * average)
    undo()
    model, optimizer = trained(lambda m: torch.optim.ASGD(m.parameters(), 1e-2, t0=1), 5)
    change = widened(model)
    with torch.no_grad():
        model[0].weight[2] = 7.0
    migrate_optimizer(optimizer, change)
    assert torch.equal(optimizer.state[model[0].weight]["ax"], torch.cat([average, torch.full((1, 3), 7.0).double()]))


def test_the_steps_of_rprop_are_carried_and_new_entries_have_their_mean():
    model, optimizer = trained(lambda m: torch.optim.Rprop(m.parameters(), 1e-3))
    old = {key: value.clone() for key, value in optimizer.state[model[0].weight].items()}
    migrate_optimizer(optimizer, widened(model))
    new = optimizer.state[model[0].weight]
    assert torch.equal(new["step_size"][:2], old["step_size"])
    assert torch.allclose(new["step_size"][2], old["step_size"].mean())
    assert torch.equal(new["prev"], torch.cat([old["prev"], torch.zeros(1, 3).double()]))
    model, optimizer = trained(lambda m: torch.optim.Rprop(m.parameters(), 1e-3))
    migrate_optimizer(optimizer, scaled(model))
    assert torch.equal(optimizer.state[model[0].weight]["step_size"], old["step_size"])
    assert torch.equal(optimizer.state[model[0].weight]["prev"], old["prev"] / 2)


class Peculiar(torch.optim.SGD):
    """Keeps something of its own for every entry."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["whim"] = torch.ones_like(parameter)


def test_state_of_an_unknown_kind_is_refused_by_name_where_the_parameter_changes():
    for change in (widened, scaled):
        model, optimizer = trained(lambda m: Peculiar(m.parameters(), 1e-2))
        with pytest.raises(MigrationError) as raised:
            migrate_optimizer(optimizer, change(model))
        assert raised.value.found == "Peculiar keeps `whim` for every entry of 0.weight, and what it means is unknown."
        assert raised.value.expected.startswith("Expected some of exp_avg,")
        assert raised.value.action.startswith("Use an optimizer that keeps those")
    model, optimizer = trained(lambda m: Peculiar(m.parameters(), 1e-2))
    migrate_optimizer(optimizer, scaled(model, 1.0))
    assert torch.equal(optimizer.state[model[0].weight]["whim"], torch.ones(2, 3))


@pytest.mark.parametrize("like", [None, "0.weight"])
def test_a_new_parameter_is_never_silently_untrained(like):
    """One modelled on a frozen parameter joins the only group; where there are several, nothing says which."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[0].requires_grad_(False)
    before = dict(model.named_parameters())
    model.append(nn.Linear(2, 2, bias=False))
    change = ModelChange("gate", 0, dict(model.named_parameters()),
                         changes={"2.weight": TensorChange(like=like)}, before=before)  # fmt: skip
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    migrate_optimizer(optimizer, change)
    assert set(optimizer.param_groups[0]["params"]) == {model[1].weight, model[1].bias, model[2].weight}
    two = torch.optim.SGD([{"params": [model[1].weight]}, {"params": [model[1].bias]}], 0.1)
    with pytest.raises(MigrationError) as raised:
        migrate_optimizer(two, change)
    assert raised.value.found == "Nothing says which of the optimizer's groups the new parameter 2.weight joins."
    assert raised.value.expected.startswith("Expected one group")
    assert raised.value.action.startswith("Train the part that grows")
    model[2].requires_grad_(False)
    migrate_optimizer(two, change)
    assert model[2].weight not in {p for group in two.param_groups for p in group["params"]}


def test_new_second_moments_may_be_the_mean():
    model, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters(), 1e-2))
    mean = optimizer.state[model[0].weight]["exp_avg_sq"].mean()
    change = widened(model)
    migrate_optimizer(optimizer, ModelChange(**{**vars(change), "mean": True}))
    entry = optimizer.state[model[0].weight]
    assert torch.allclose(entry["exp_avg_sq"][2], mean.expand(3))
    assert entry["exp_avg"][2].tolist() == [0, 0, 0]


def test_wholly_new_parameters_may_begin_with_the_squares_of_the_ones_they_are_modelled_on():
    """Adam's first step is as long as the rate in every entry; with a past it is not."""
    model = nn.ModuleList([nn.Linear(2, 2)])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model[0](torch.randn(4, 2)).square().mean().backward()
    optimizer.step()
    old = optimizer.state[model[0].weight]
    before = dict(model.named_parameters())
    model.append(nn.Linear(2, 2))
    changes = {f"1.{leaf}": TensorChange(like=f"0.{leaf}") for leaf in ("weight", "bias")}
    for mean in (False, True):
        change = ModelChange("insert", 1, dict(model.named_parameters()), changes=changes, before=before, mean=mean)
        undo = migrate_optimizer(optimizer, change)
        assert (model[1].weight in optimizer.state) == mean
        if mean:
            new = optimizer.state[model[1].weight]
            assert torch.equal(new["exp_avg"], torch.zeros(2, 2))
            assert torch.allclose(new["exp_avg_sq"], old["exp_avg_sq"].mean())
            assert new["step"] == old["step"] == 1
        undo()
    factored = torch.optim.Adafactor([*model[0].parameters()], 1e-2)
    model[0](torch.randn(4, 2)).square().mean().backward()
    factored.step()
    migrate_optimizer(factored, change)
    assert model[1].weight not in factored.state
    momentum = torch.optim.SGD([*model[0].parameters()], 0.1, momentum=0.9)
    model[0](torch.randn(4, 2)).square().mean().backward()
    momentum.step()
    migrate_optimizer(momentum, change)
    assert model[1].weight not in momentum.state


def test_factored_state_of_a_changed_tensor_begins_anew_and_that_alone():
    model, optimizer = trained(lambda m: torch.optim.Adafactor(m.parameters(), 1e-2))
    kept = optimizer.state[model[1].bias]
    migrate_optimizer(optimizer, widened(model))
    assert model[0].weight not in optimizer.state
    assert optimizer.state[model[1].bias] is kept
    model(torch.randn(4, 3).double()).square().mean().backward()
    optimizer.step()


def test_new_parameters_join_the_group_of_the_one_they_are_modelled_on():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = torch.optim.SGD(
        [{"params": [m.weight for m in model], "lr": 0.1}, {"params": [m.bias for m in model], "lr": 0.2}]
    )
    before = dict(model.named_parameters())
    model.append(nn.Linear(2, 2))
    changes = {f"2.{leaf}": TensorChange(like=f"1.{leaf}") for leaf in ("weight", "bias")}
    change = ModelChange("insert", 0, dict(model.named_parameters()), changes=changes, before=before)
    undo = migrate_optimizer(optimizer, change)
    assert [[p.dim() for p in g["params"]] for g in optimizer.param_groups] == [[2, 2, 2], [1, 1, 1]]
    undo()
    with pytest.raises(MigrationError, match="which of the optimizer's groups the new parameter 2.weight joins"):
        unlike = {name: TensorChange() for name in changes}
        migrate_optimizer(optimizer, ModelChange("insert", 0, change.parameters, changes=unlike, before=before))


def test_a_state_in_one_piece_is_refused_by_name():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(MigrationError, match="LBFGS keeps the past of all parameters in one piece"):
        migrate_optimizer(optimizer, ModelChange("widen", 1, before=dict(model.named_parameters())))


def test_parameters_of_another_model_are_refused():
    _, optimizer = trained(lambda m: torch.optim.SGD(m.parameters(), 0.1))
    with pytest.raises(MigrationError, match="parameters that are none of the model's"):
        migrate_optimizer(optimizer, ModelChange("widen", 1, before=dict(nn.Linear(2, 2).named_parameters())))
