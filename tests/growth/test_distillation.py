import copy

import pytest
import torch
from torch import nn

import utils
from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.distillation import distil, teacher_of, within
from utils.growth.edits import GrowthRefusedError
from utils.growth.lineage import read_lineage
from utils.growth.planning import plan_growth
from utils.growth.request import Request
from utils.growth.transaction import GrowthUndoneError, grow_by


class Post(nn.Module):
    """A post-norm stream, which nothing widens exactly."""

    def __init__(self, width=16, vocabulary=300):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        with torch.no_grad():
            for norm in (self.norm, self.last):
                norm.weight.add_(torch.rand(width))
                norm.bias.add_(torch.rand(width))

    def forward(self, input_ids):
        x = self.table(input_ids)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        return self.head(self.last(x + self.down(torch.relu(self.up(x)))))


def test_what_nothing_keeps_is_refused_unless_it_may_be_distilled(tmp_path, text_file, quick):
    adapter = ModelAdapter(Post())
    with pytest.raises(GrowthRefusedError, match="does not keep the function"):
        plan_growth(adapter, Request("residual", 4))
    plan = plan_growth(adapter, Request("residual", 4, approximate=True))
    assert plan.promise == "approximate"
    with pytest.raises(GrowthRefusedError, match="would change the function. Expected data to distil from"):
        grow_by(adapter, plan, adapter.example_inputs())

    growth = {"schedule": [{"at": 6, "operator": "residual", "amount": 4}], "approximate": True, "distill_steps": 80}
    model = Post()
    run = utils.train(model, f"file:{text_file}", quick.with_changes(growth=growth, max_steps=8), tmp_path / "run",
                      progress=False)  # fmt: skip
    [event] = read_lineage(tmp_path / "run")
    assert event.plan.promise == "approximate"
    assert 0 <= event.certificate.distilled <= 80
    assert within(event.certificate.loss_after, event.certificate.loss_before)
    assert f"{event.certificate.distilled} steps of distillation" in event.describe()
    assert model.table.embedding_dim == 20
    assert run.finished


def test_a_lesson_that_is_too_short_takes_the_event_back_values_included(tmp_path, text_file, quick, monkeypatch):
    monkeypatch.setattr("utils.growth.distillation.CLOSE_ENOUGH", -1.0)
    growth = {"schedule": [{"at": 6, "operator": "residual", "amount": 4}], "approximate": True, "distill_steps": 3}
    model = Post()
    with pytest.warns(UserWarning, match="Expected the loss to come back within a hundredth"):
        run = utils.train(model, f"file:{text_file}", quick.with_changes(growth=growth, max_steps=8),
                          tmp_path / "run", progress=False)  # fmt: skip
    plain = utils.train(
        Post(), f"file:{text_file}", quick.with_changes(max_steps=8), tmp_path / "plain", progress=False
    )
    assert model.table.embedding_dim == 16
    assert run.summary()["weights_sha256"] == plain.summary()["weights_sha256"]


def test_a_student_learns_what_the_teacher_answers():
    torch.manual_seed(0)
    spec = ModelSpec(example_inputs={"input": torch.randn(8, 4)}, task="tabular_classification")
    adapter = ModelAdapter(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), spec=spec)
    teacher = teacher_of(adapter)
    with torch.no_grad():
        adapter.module[2].weight.add_(torch.randn(3, 8) * 0.7)
    inputs = adapter.example_inputs(8)
    labels = teacher.logits(inputs).argmax(-1)
    teacher.module[2].weight.data *= 3

    known = copy.deepcopy(teacher.module.state_dict())

    def loss(one):
        return float(one.loss(one.logits(inputs), labels))

    adapter.module.train()
    adapter.module[1].eval()
    modes = [child.training for child in adapter.module.modules()]
    lesson = distil(teacher, adapter, [inputs], loss, 2000)
    assert lesson.learned
    assert lesson.loss_after < lesson.loss_changed
    assert 0 < lesson.steps < 2000
    assert all(torch.equal(value, known[name]) for name, value in teacher.module.state_dict().items())
    assert [child.training for child in adapter.module.modules()] == modes
    assert all(parameter.grad is None for parameter in adapter.module.parameters())
    assert distil(teacher, adapter, [inputs], loss, 10).steps == 0


def test_numbers_are_taught_by_their_squares():
    torch.manual_seed(0)
    spec = ModelSpec(example_inputs={"input": torch.randn(8, 4)}, task="regression")
    adapter = ModelAdapter(nn.Sequential(nn.Linear(4, 1)), spec=spec)
    teacher, inputs = teacher_of(adapter), adapter.example_inputs(8)
    with torch.no_grad():
        adapter.module[0].bias.add_(0.05)
    labels = torch.randn(8)

    def loss(one):
        return float(one.loss(one.logits(inputs), labels))

    assert distil(teacher, adapter, [inputs], loss, 100).learned


def test_the_error_names_what_was_measured():
    assert issubclass(GrowthUndoneError, utils.growth.edits.GrowthError)
    assert within(1.01, 1.0)
    assert not within(1.02, 1.0)
    assert within(-1.0, -1.005)
