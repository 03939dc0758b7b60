import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import utils.continual.fisher as fisher_module
from tests.continual.toys import SPEC, net, settings
from utils.adapters import ModelAdapter
from utils.continual.config import ContinualConfig
from utils.continual.fisher import diagonal_fisher, fisher_of_task
from utils.continual.learner import Learner
from utils.continual.scenario import make_tasks


class Pictures(nn.Module):
    """Convolution, two norms, and a pooled linear layer with an activation that works in place."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.LayerNorm(144),
            nn.Linear(144, 5), nn.ReLU(inplace=True), nn.Linear(5, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


class Words(nn.Module):
    """Embedding, a linear layer at each position, and a mean over them."""

    def __init__(self):
        super().__init__()
        self.table, self.mix, self.norm, self.head = (
            nn.Embedding(7, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        )  # fmt: skip

    def forward(self, x):
        return self.head(self.norm(self.mix(self.table(x))).tanh().mean(1))


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(self.body(x).tanh()).tanh())


class Bare(nn.Module):
    """A parameter of the model itself, which no layer holds."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 3)

    def forward(self, *, x):
        return self.head((x * self.scale).tanh())


class Hidden(nn.Module):
    """A layer whose weight is used without calling it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(functional.linear(x, self.body.weight, self.body.bias).tanh())


class Branching(nn.Module):
    """A model that reads a number out of its input, which no vmap can."""

    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 3)

    def forward(self, *, x):
        return self.head(x * self.scale * (1.0 if float(x.detach().sum()) > 0 else 0.5))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


def made(kind):
    torch.manual_seed(3)
    model = kind()
    count = 7
    if kind is Pictures:
        x = torch.randn(count, 1, 6, 6)
        model.net[1].running_mean.uniform_(-1, 1)
    else:
        x = torch.randint(7, (count, 4)) if kind is Words else torch.randn(count, 6)
    return model, x, torch.randint(3, (count,))


def asked(model, x, labels, **options):
    answer = (lambda batch: model(x=batch["x"])) if isinstance(model, (Bare, Branching)) else (lambda b: model(b["x"]))
    return diagonal_fisher(
        model, answer, lambda start, end: {"x": x[start:end], "labels": labels[start:end]}, len(x), **options
    )


def by_hand(model, x):
    """Go through samples and classes one by one, with the gradient of the log-probability."""
    model = model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in range(len(x)):
        for label in range(3):
            logits = model(x=x[row : row + 1])
            logs = logits.log_softmax(-1)[0]
            found = torch.autograd.grad(logs[label], list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name] += logs[label].detach().exp() * gradient**2 / len(x)
    return total


@pytest.mark.parametrize(
    ("kind", "way", "why"),
    [
        (Pictures, "layers", ""),
        (Words, "layers", ""),
        (Twice, "vmap", "layers: Linear is called twice"),
        (Bare, "vmap", "layers: Bare takes or returns more than one row for each sample"),
        (Hidden, "vmap", "layers: body.weight comes out differently than one sample at a time"),
        (Tied, "vmap", "layers: modules share a parameter"),
        (Branching, "single", "vmap: RuntimeError"),
    ],
)
def test_it_is_the_expectation_over_samples_and_all_classes_whatever_the_way(kind, way, why, monkeypatch):
    model, x, labels = made(kind)
    found = asked(model, x, labels)
    assert (found.kind, found.way, found.samples) == ("exact", way, 7)
    assert why in found.why
    assert bool(found.why) == bool(why)
    wanted = by_hand(model, x)
    assert found.values.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found.values[name], value, rtol=2e-4, atol=1e-8)
    # Cut into small batches and blocks it is the same.
    monkeypatch.setattr(fisher_module, "MOST_ROWS", 3)
    monkeypatch.setattr(fisher_module, "ELEMENTS", 500)
    again = asked(model, x, labels)
    assert again.way == way
    for name, value in wanted.items():
        torch.testing.assert_close(again.values[name], value, rtol=2e-4, atol=1e-8)


def test_labels_do_not_matter_and_the_model_is_left_as_it_was():
    model, x, labels = made(Pictures)
    model.train()
    model.net[4].eval()
    model.net[0].bias.requires_grad_(False)
    gradient = torch.ones(5)
    model.net[5].bias.grad = gradient
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    first, second = asked(model, x, labels), asked(model, x, (labels + 1) % 3)
    assert "net.0.bias" not in first.values
    assert all(torch.equal(value, second.values[name]) for name, value in first.values.items())
    assert model.training
    assert not model.net[4].training
    assert model.net[5].bias.grad is gradient
    assert torch.equal(gradient, torch.ones(5))
    assert model.net[0].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(stream, torch.get_rng_state())
    assert not any(child._forward_hooks for child in model.modules())
    assert first.to_dict() == {"kind": "exact", "way": "layers", "why": "", "samples": 7}


def test_of_many_answers_one_is_drawn_and_the_mean_of_draws_is_exact(monkeypatch):
    model, x, labels = made(Twice)
    wanted = by_hand(model, x)
    monkeypatch.setattr(fisher_module, "MOST_CLASSES", 2)
    draws = [asked(model, x, labels, seed=seed) for seed in range(300)]
    assert {one.kind for one in draws} == {"drawn"}
    for name, value in wanted.items():
        mean = sum(one.values[name] for one in draws) / len(draws)
        assert float((mean - value).norm() / value.norm()) < 0.15
    again = asked(model, x, (labels + 1) % 3, seed=4)
    assert all(torch.equal(value, again.values[name]) for name, value in draws[4].values.items())


def test_answers_at_positions_count_one_by_one(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 5)), torch.randint(5, (6, 8))
    labels = torch.randint(5, (6, 8))
    labels[0, 3:] = -100
    draws = [asked(model, x, labels, seed=seed) for seed in range(300)]
    assert {one.kind for one in draws} == {"drawn"}
    mean = sum(one.values["2.bias"] for one in draws) / len(draws)
    p = model(x).softmax(-1)[labels != -100].detach()
    # Of a bias, sum_c p_c (1[c = k] - p_k)^2 = p_k (1 - p_k) at each position.
    torch.testing.assert_close(mean, (p * (1 - p)).mean(0), rtol=0.2, atol=0.0)
    nothing = asked(model, x, torch.full_like(labels, -100))
    assert all(float(value.abs().max()) == 0 for value in nothing.values.values())


def test_a_single_score_is_a_choice_of_two_and_numbers_are_normal(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Linear(6, 1), torch.randn(9, 6)
    p = model(x).sigmoid().detach()
    found = asked(model, x, torch.zeros(9, dtype=torch.long))
    assert found.kind == "exact"
    torch.testing.assert_close(found.values["weight"], (p * (1 - p) * x**2).mean(0, keepdim=True))
    several = nn.Linear(6, 4)
    real = asked(several, x, torch.zeros(9, 4), real=True)
    assert real.kind == "exact"
    torch.testing.assert_close(real.values["weight"], (2 / 4 * (x**2).mean(0)).expand(4, 6))
    monkeypatch.setattr(fisher_module, "MOST_CLASSES", 3)
    draws = [asked(several, x, torch.zeros(9, 4), real=True, seed=seed) for seed in range(400)]
    assert draws[0].kind == "drawn"
    mean = sum(one.values["weight"] for one in draws) / len(draws)
    torch.testing.assert_close(mean, real.values["weight"], rtol=0.25, atol=0.0)
    positions = nn.Linear(6, 1)
    rows = torch.randn(9, 5, 6)
    drawn = [asked(positions, rows, torch.zeros(9, 5).long(), seed=seed) for seed in range(200)]
    assert drawn[0].kind == "drawn"
    p = positions(rows).sigmoid().detach()
    bias = sum(one.values["bias"] for one in drawn) / len(drawn)
    torch.testing.assert_close(bias, (p * (1 - p)).mean().reshape(1), rtol=0.1, atol=0.0)


def test_a_model_that_fails_fails_with_its_own_error_and_half_precision_works():
    model, x, labels = made(Twice)

    def answer(batch):
        if len(batch["labels"]) == 1:
            raise RuntimeError("never one alone")
        return model(batch["x"])

    with pytest.raises(RuntimeError, match="never one alone"):
        diagonal_fisher(model, answer, lambda start, end: {"x": x[start:end], "labels": labels[start:end]}, 7)
    wanted = by_hand(model, x)
    found = asked(model.bfloat16(), x.bfloat16(), labels)
    assert found.values["head.weight"].dtype == torch.float32
    assert float((found.values["head.weight"] - wanted["head.weight"]).norm() / wanted["head.weight"].norm()) < 0.1


def learner_of(digits, **options):
    config = settings("naive", continual=options)
    continual = ContinualConfig.from_dict(config.continual)
    tasks = make_tasks(digits, continual, 0)
    return Learner(ModelAdapter(net(), spec=SPEC), continual, digits, tasks, None, 0, None)


def test_a_tasks_samples_are_drawn_and_only_its_outputs_answer(digits):
    learner = learner_of(digits, setting="task", samples_per_task=30)
    learner.task = learner.tasks[2]
    found = fisher_of_task(learner)
    assert (found.samples, found.kind, found.way) == (30, "exact", "layers")
    assert learner.masked.answers is None
    bias = found.values["net.3.bias"]
    assert float(bias[[4, 5]].min()) > 0
    assert float(bias[[0, 1, 2, 3, 6, 7, 8, 9]].abs().max()) == 0
    images = digits.train["pixel_values"][learner.task.train]
    p = learner.module(images)[:, 4:6].softmax(-1)[:, 0].detach()
    assert float(bias[4]) == pytest.approx(float((p * (1 - p)).mean()), rel=1e-4)

    few = learner_of(digits, fisher_samples=20)
    first, second = fisher_of_task(few), fisher_of_task(few)
    assert first.samples == 20
    assert all(torch.equal(value, second.values[name]) for name, value in first.values.items())
    few.step = 1
    assert not torch.equal(fisher_of_task(few).values["net.3.bias"], first.values["net.3.bias"])
    assert math.isfinite(float(first.values["net.1.weight"].sum()))


@pytest.mark.slow
def test_a_compiled_model_is_measured_without_its_compiled_form():
    model, x, labels = made(Twice)
    wanted = asked(model, x, labels)
    model.compile(backend="eager")
    model(x)
    found = asked(model, x, labels)
    assert (found.way, found.why) == (wanted.way, wanted.why)
    for name, value in wanted.values.items():
        torch.testing.assert_close(found.values[name], value)
