import pytest
import torch
from torch import nn

from utils.training import TrainingConfig
from utils.training.parts import LightningPart
from utils.training.schedules import make_optimizer, parameter_groups


class MyNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 5))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.own = nn.LayerNorm((4, 5)), MyNorm()
        self.gamma, self.bias = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.zeros(1, 8))
        self.table = nn.Parameter(torch.zeros(3, 8))
        self.head, self.depthwise = nn.Linear(8, 1), nn.Conv1d(4, 4, 3, groups=4)


def test_what_scales_and_shifts_does_not_decay_whatever_its_shape():
    decay, still = parameter_groups(Mixed(), 0.1)
    assert (decay["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    assert [name for name, _ in decay["params"]] == ["table", "head.weight", "depthwise.weight"]
    assert {name for name, _ in still["params"]} == {
        "gamma", "bias", "flat.weight", "flat.bias", "own.scale", "head.bias", "depthwise.bias",
    }  # fmt: skip


def test_an_optimizer_state_in_other_groups_is_taken_over_by_name():
    """A version that decayed by the number of axes wrote it."""
    torch.manual_seed(0)
    module = Mixed()
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    named = list(module.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    before = torch.optim.AdamW(groups, lr=0.5)
    before.step()
    after = make_optimizer(module, TrainingConfig(weight_decay=0.1))
    LightningPart("optimizer", after).load_state_dict(before.state_dict())
    assert [group["lr"] for group in after.param_groups] == [0.5, 0.5]
    assert [len(group["params"]) for group in after.param_groups] == [3, 7]
    assert [group["weight_decay"] for group in after.param_groups] == [0.1, 0.0]
    for name, parameter in named:
        assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"]), name
    other = make_optimizer(nn.Linear(2, 2), TrainingConfig())
    with pytest.raises(ValueError, match="argument"):
        LightningPart("optimizer", other).load_state_dict(before.state_dict())
