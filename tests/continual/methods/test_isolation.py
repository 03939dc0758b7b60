from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.continual.methods.toy_streams import SPEC, fresh
from utils.adapters import ModelAdapter
from utils.continual.config import ContinualConfig
from utils.continual.learner import Learner
from utils.continual.methods.isolation import TaskBuffers, check_bits, rows_of, samples_of
from utils.continual.task import Task
from utils.memory import EpisodicBuffer
from utils.runtime.errors import ConfigError
from utils.training import TrainingConfig
from utils.training.prepared_data import PreparedData
from utils.training.state import ModelChange, TensorChange


def stream_of(module, *answers):
    samples = {"pixel_values": torch.randn(20, 1, 8, 8), "labels": torch.arange(20) % 10}
    data = PreparedData("toy", "image_classification", samples, samples, facts={})
    tasks = [Task(i, str(i), torch.arange(20), torch.arange(20), answers=one) for i, one in enumerate(answers)]
    settings = ContinualConfig(setting="task")
    return Learner(ModelAdapter(module, spec=SPEC), settings, data, tasks, EpisodicBuffer(5), 0, torch.no_grad)


def test_rows_of_the_head_belong_to_the_outputs_that_they_change():
    learner = stream_of(fresh(norm=True), (2, 3), (0, 9))
    for task, own in ((0, [2, 3]), (1, [0, 9])):
        found = rows_of(learner, task)
        assert set(found) == {"head.weight", "head.bias"}
        for rows in found.values():
            assert rows.own.nonzero().flatten().tolist() == own
            assert rows.foreign.nonzero().flatten().tolist() == [i for i in range(10) if i not in own]


class Heads(nn.Module):
    """A head in two parts, behind a layer that only one of them uses."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(64, 6)
        self.extra = nn.Linear(6, 6)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 6)

    def forward(self, pixel_values):
        hidden = self.enter(pixel_values.flatten(1)).tanh()
        return torch.cat([self.first(hidden), self.second(self.extra(hidden).tanh())], 1)


def test_a_head_in_parts_is_found_where_a_part_serves_both_sides():
    found = rows_of(stream_of(Heads(), (0, 1, 4)), 0)
    assert set(found) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert found["second.bias"].own.tolist() == [True] + [False] * 5
    # What the outputs share belongs to nobody.
    assert "extra.weight" not in found
    assert "enter.weight" not in found


@pytest.mark.parametrize("answers", [(), tuple(range(10))])
def test_where_all_outputs_answer_none_belongs_to_a_task(answers):
    assert rows_of(stream_of(fresh(), answers), 0) == {}


def test_looking_leaves_the_model_as_it_was():
    module = fresh(norm=True).train()
    learner = stream_of(module, (2, 3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    rows_of(learner, 0)
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert samples_of(learner, 0)["pixel_values"].shape == (8, 1, 8, 8)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("fixed", torch.tensor([1.0, float("nan")]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("late", torch.zeros(2), persistent=False)


def test_each_task_keeps_the_buffers_that_change():
    module, kept = Counts(), TaskBuffers()
    kept.begin(module)
    module.count.add_(3)
    kept.keep(module, 0)
    kept.begin(module)
    module.count.add_(4)
    module.late.add_(1.0)
    kept.keep(module, 1)
    assert set(kept.tasks[0]) == {"count"}
    assert set(kept.tasks[1]) == {"count", "late"}
    again = TaskBuffers()
    again.load_state_dict(kept.state_dict())
    module.count.add_(5)
    for buffers in (kept, again):
        with buffers.applied(module, 0):
            assert (int(module.count), module.late.tolist()) == (3, [0.0, 0.0])
        with buffers.applied(module, 1):
            assert (int(module.count), module.late.tolist()) == (7, [1.0, 1.0])
        assert (int(module.count), module.late.tolist()) == (12, [1.0, 1.0])
    assert kept.numbers == 2 + 1 + 2 + 1 + 1 + 2


def test_they_come_back_when_the_block_fails():
    module, kept = Counts(), TaskBuffers()
    kept.begin(module)
    kept.keep(module, 0)
    module.count.add_(1)
    with pytest.raises(RuntimeError, match="fails"), kept.applied(module, 0):
        raise RuntimeError("fails")
    assert int(module.count) == 1


def test_they_follow_their_names():
    module, kept = Counts(), TaskBuffers()
    kept.begin(module)
    module.count.add_(1)
    kept.keep(module, 0)
    buffers = {"fixed": module.fixed, "inner.count": module.count, "late": module.late, "new": torch.zeros(1)}
    changes = {"inner.count": TensorChange(source="count"), "new": TensorChange()}
    moved = kept.renamed(ModelChange("depth", 3, {}, buffers, changes))
    assert set(moved.before) == {"fixed", "inner.count", "late"}
    assert set(moved.tasks[0]) == {"inner.count"}
    assert set(kept.tasks[0]) == {"count"}


def test_averaged_weights_are_refused():
    check_bits(SimpleNamespace(training=None), "packnet")
    check_bits(SimpleNamespace(training=TrainingConfig()), "packnet")
    with pytest.raises(ConfigError, match="method is 'packnet' and TrainingConfig.ema_decay is 0.5.*goes on moving"):
        check_bits(SimpleNamespace(training=TrainingConfig(ema_decay=0.5)), "packnet")
