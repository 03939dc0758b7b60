import io
import itertools
import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque

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


class Drawing(nn.Module):
    """Draws from generators of its own, and looks back at what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(300, 8), nn.Linear(8, 300)
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy, self.old = np.random.default_rng(1), np.random.RandomState(1)
        self.past: deque = deque(maxlen=3)
        self.means = {"all": [0.0], (1, 2): (torch.zeros(2), None)}
        self.array = np.zeros(3, dtype=np.float32)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        if self.training:
            drawn = self.python.random() + self.numpy.random() + float(self.old.normal())
            x = x + 0.1 * drawn * torch.randn(x.shape, generator=self.torch)
            self.past.append(float(x.detach().mean()))
            self.means["all"].append(self.past[-1])
            self.array[len(self.past) - 1] += self.past[-1]
            x = x * (1 + sum(self.past) + float(self.array.sum()) + self.means["all"][-2])
        return self.head(x)


def drawing():
    torch.manual_seed(0)
    return Drawing()


def test_a_model_that_draws_and_looks_back_resumes_bit_for_bit(tmp_path, text_file, quick):
    data, config = f"file:{text_file}", quick.with_changes(max_steps=4)
    whole = train(drawing(), data, config, tmp_path / "whole", progress=False)
    train(drawing(), data, config.with_changes(time_budget_minutes=1e-9), tmp_path / "parts", progress=False)
    resume(tmp_path / "parts", model=drawing(), progress=False)
    rest = resume(tmp_path / "parts", model=drawing(), time_budget_minutes=60, progress=False)
    assert rest.finished and rest.sessions == 3
    assert weights_sha256(rest.model) == weights_sha256(whole.model)
    assert list(rest.model.past) == list(whole.model.past) and rest.model.past.maxlen == 3


def test_generators_and_containers_come_back_into_what_is_there():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.values = [1, 2.5, True, None, (3, [torch.arange(2)])]
            self.same = self.values
            self.counts, self.order = Counter(), OrderedDict()
            self.default, self.seen = defaultdict(list), set()
            self.wide = np.random.Generator(np.random.Philox(3))
            self.words, self.many = ["a", "b"], list(range(20_000))
            self.weights = [self.layer.weight]

    first, second = Holder(), Holder()
    first.values[4][1][0] += 5
    first.values.append(7)
    first.counts.update([1, 1])
    first.order[(1, "x")] = {"deep": [0.5]}
    first.default["k"].append(2)
    first.seen.add(4)
    first.words.append("c")
    first.wide.random(3)
    state = ModuleMemory(first).state_dict()
    assert {"words", "many", "weights"}.isdisjoint(state["objects"])
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    values, inner = second.values, second.values[4][1][0]
    ModuleMemory(second).load_state_dict(state)
    assert second.values is values is second.same and second.values[4][1][0] is inner
    assert inner.tolist() == [5, 6] and values[:4] == [1, 2.5, True, None] and values[-1] == 7
    assert second.counts == {1: 2} and type(second.counts) is Counter
    assert second.order == {(1, "x"): {"deep": [0.5]}} and type(second.order) is OrderedDict
    assert second.default == {"k": [2]} and second.default["new"] == []
    assert second.seen == {4} and second.words == ["a", "b"]
    assert second.wide.random() == first.wide.random()
    del second.values, second.wide, second.counts
    ModuleMemory(second).load_state_dict(state)
    assert second.values[-1] == 7 and second.counts == {1: 2}


class Log:
    def __init__(self):
        self.lines = []


class Unkept(Drawing):
    def __init__(self, changing: bool) -> None:
        super().__init__()
        self.log, self.fixed, self.rows = Log(), Log(), itertools.count() if changing else None
        self.changing = changing
        self.pick = lambda: 0

    def forward(self, input_ids):
        if self.training and self.changing:
            self.log.lines.append("one")
            next(self.rows)
        return super().forward(input_ids)


def test_what_changes_and_cannot_be_kept_is_named_once_at_the_start(tmp_path, text_file, quick):
    data, config = f"file:{text_file}", quick.with_changes(max_steps=4)
    with pytest.warns(UserWarning, match="Unkept keeps in log, rows something that changes .*no checkpoint") as caught:
        train(Unkept(True), data, config, tmp_path / "run", progress=False)
    assert len([warning for warning in caught if "no checkpoint" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Unkept(False), data, config, tmp_path / "quiet", progress=False)
