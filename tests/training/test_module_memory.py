import numpy as np
import pytest
import torch
from torch import nn

from utils.training.module_memory import ModuleMemory, freeze, frozen_names
from utils.training.resume import open_run, resume, train
from utils.training.weights import weights_sha256


class Forgetful(nn.Module):
    """Its output depends on a counter, a running mean that is not persistent, and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 300)
        self.register_buffer("mean", torch.zeros(16), persistent=False)
        self.calls = 0
        self.last = torch.zeros(16)

    def forward(self, input_ids):
        hidden = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        if self.training:
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean((0, 1))
            self.last = hidden.detach()[0, 0].clone()
        return self.head(hidden + 0.1 * self.mean + 0.01 * self.last + 0.001 * (self.calls % 7))


def model():
    torch.manual_seed(0)
    return Forgetful()


def test_what_is_outside_the_weights_comes_back():
    first, second = model(), model()
    first(torch.arange(6).view(2, 3))
    state = ModuleMemory(first).state_dict()
    ModuleMemory(second).load_state_dict(state)
    assert second.calls == 1
    assert torch.equal(second.mean, first.mean)
    assert torch.equal(second.last, first.last)
    assert "weight" not in str(state.keys())


def test_a_model_with_such_memory_resumes_bit_for_bit(tmp_path, text_file, quick):
    data = f"file:{text_file}"
    whole = train(model(), data, quick, tmp_path / "whole", progress=False)
    short = quick.with_changes(time_budget_minutes=1e-9)
    train(model(), data, short, tmp_path / "parts", progress=False)
    for _ in range(3):
        resume(tmp_path / "parts", model=model(), progress=False)
    rest = resume(tmp_path / "parts", model=model(), time_budget_minutes=60, progress=False)
    assert rest.finished
    assert weights_sha256(rest.model) == weights_sha256(whole.model)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_frozen_parameters_stay_frozen_after_a_restart(tmp_path, text_file, quick, tiny_gpt, steps_before):
    tiny_gpt.module.blocks[0].requires_grad_(False)
    names = frozen_names(tiny_gpt.module)
    frozen = tiny_gpt.module.blocks[0].mlp[0].weight.clone()
    short = quick.with_changes(time_budget_minutes=1e-9)
    run = train(tiny_gpt, f"file:{text_file}", short, tmp_path / "run", progress=False)
    if steps_before == 0:
        import shutil

        shutil.rmtree(run.checkpoints.directory / "step-00000001")
    rest = resume(tmp_path / "run", time_budget_minutes=60, progress=False)
    assert frozen_names(rest.model) == names
    assert torch.equal(rest.model.blocks[0].mlp[0].weight, frozen)


class Odd(nn.Module):
    """Holds what a checkpoint must not choke on, and a tensor that is seen under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 16)
        self.head = nn.Linear(16, 300)
        self.alias = self.embed.weight.data
        self.scale = np.sqrt(4.0)
        self.kind = "odd"

    def forward(self, input_ids):
        return self.head(self.embed(input_ids)) / self.scale + self.alias.mean()


def test_numpy_numbers_and_aliases_survive_a_restart(tmp_path, text_file, quick):
    def odd():
        torch.manual_seed(0)
        return Odd()

    data = f"file:{text_file}"
    whole = train(odd(), data, quick.with_changes(max_steps=6), tmp_path / "whole", progress=False)
    short = quick.with_changes(max_steps=6, time_budget_minutes=1e-9)
    train(odd(), data, short, tmp_path / "parts", progress=False)
    resume(tmp_path / "parts", model=odd(), progress=False)
    rest = resume(tmp_path / "parts", model=odd(), time_budget_minutes=60, progress=False)
    assert weights_sha256(rest.model) == weights_sha256(whole.model)
    assert rest.model.alias.data_ptr() == rest.model.embed.weight.data_ptr()


def test_an_opened_run_gives_the_answers_of_the_trained_one(tmp_path, text_file, quick):
    run = train(model(), f"file:{text_file}", quick.with_changes(max_steps=3), tmp_path / "run", progress=False)
    opened, _ = open_run(tmp_path / "run", model=model())
    ids = torch.arange(12).view(3, 4)
    assert torch.equal(opened.model(ids), run.model(ids))


def test_freezing_names_exactly_those():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze(module, ["0.weight", "1.bias"])
    assert frozen_names(module) == ["0.weight", "1.bias"]
    freeze(module, [])
    assert frozen_names(module) == []
