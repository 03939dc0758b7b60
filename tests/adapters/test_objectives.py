"""Losses against their definitions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.adapters.objectives import (
    IGNORED,
    OBJECTIVES,
    distinct_labels,
    labels_input,
    loss_site,
    output_site,
    own_loss,
    random_labels,
    task_loss,
)


def test_cross_entropy_ignores_and_is_in_nats() -> None:
    labels = torch.tensor([[1, IGNORED, 3], [IGNORED, IGNORED, 0]])
    assert float(task_loss("causal_lm", torch.zeros(2, 3, 8), labels)) == pytest.approx(math.log(8))
    assert float(task_loss("image_classification", torch.zeros(2, 8), labels[:, 0].clamp(0))) == pytest.approx(
        math.log(8)
    )


def test_real_valued_targets() -> None:
    logits = torch.tensor([[1.0], [3.0]])
    assert float(task_loss("regression", logits, torch.tensor([0.0, 0.0]))) == 5.0


@pytest.mark.parametrize(("task", "shape"), [("causal_lm", (2, 3)), ("regression", (2, 3, 8))])
def test_random_labels_fit_and_repeat(task: str, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(2, 3, 8)
    labels = random_labels(task, logits, 1)
    assert tuple(labels.shape) == shape
    assert torch.equal(labels, random_labels(task, logits, 1))
    assert task_loss(task, logits, labels).isfinite()


def test_distinct_labels_repeat_as_late_as_possible() -> None:
    labels = distinct_labels((3, 9), 50)
    assert labels.unique().numel() == 27 and torch.equal(labels, distinct_labels((3, 9), 50))
    assert distinct_labels((4,), 2).bincount().tolist() == [2, 2]


def test_known_losses_against_their_definitions() -> None:
    scores, labels = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]]), torch.tensor([2, 0])
    rows = torch.arange(2)
    softmax = scores.softmax(-1)
    expected = {
        "cross-entropy": -softmax[rows, labels].log(),
        "cross-entropy of a softmax": -softmax.softmax(-1)[rows, labels].log(),
        "negative score": -scores[rows, labels],
        "negative probability": -softmax[rows, labels],
    }
    for name, value in expected.items():
        torch.testing.assert_close(OBJECTIVES[name](scores, labels), value)
    hot = functional.one_hot(labels, 3).float()
    binary = functional.binary_cross_entropy(softmax, hot, reduction="none").sum(-1)
    torch.testing.assert_close(OBJECTIVES["binary cross-entropy of the output"](softmax, labels), binary)


class Criterion(nn.Module):
    def forward(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(scores, labels)


class Labelled(nn.Module):
    """Returns its loss first, and keeps a criterion of its own."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.net, self.criterion = nn.Linear(8, 5), criterion

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        scores = self.net(x)
        return (scores,) if labels is None else (self.criterion(scores, labels), scores)


def test_own_loss_comes_with_its_gradient() -> None:
    model = Labelled(Criterion())
    adapter = ModelAdapter(model)
    assert labels_input(adapter) == "labels" and labels_input(ModelAdapter(nn.Linear(8, 5))) is None
    inputs = adapter.example_inputs(3)
    labels, scores = torch.tensor([0, 1, 2]), adapter.logits(inputs).detach()
    got = own_loss(adapter, inputs, labels, scores)
    assert got is not None and got.gradient is not None and got.attached
    torch.testing.assert_close(got.loss.detach(), functional.cross_entropy(scores, labels))
    torch.testing.assert_close(got.gradient, (scores.softmax(-1) - functional.one_hot(labels, 5)) / 3)


def test_sites_of_the_loss_and_of_the_output() -> None:
    labels = torch.tensor([0, 1, 2])
    for criterion, site in ((Criterion(), "criterion"), (nn.CrossEntropyLoss(), "Labelled")):
        adapter = ModelAdapter(Labelled(criterion))
        inputs = adapter.example_inputs(3)
        assert loss_site(adapter, inputs, labels) == site
        assert output_site(adapter, inputs, adapter.logits(inputs)) == "net"


def test_a_single_score_answers_yes_or_no():
    """Binary cross-entropy: the softmax of one class would be 1 whatever the score, and its gradient zero."""
    logits = torch.tensor([[0.3], [-2.0], [1.1]], requires_grad=True)
    labels = torch.tensor([1, 0, IGNORED])
    loss = task_loss("text_classification", logits, labels)
    expected = nn.functional.binary_cross_entropy_with_logits(logits[:2, 0], torch.tensor([1.0, 0.0]))
    assert torch.equal(loss, expected)
    drawn = random_labels("text_classification", torch.zeros(64, 1))
    assert set(drawn.tolist()) == {0, 1}


def test_no_label_is_a_class_that_is_switched_off():
    """Classes at minus infinity, or a number as large, are never right."""
    logits = torch.randn(200, 6)
    logits[:, 4:] = float("-inf")
    assert set(random_labels("causal_lm", logits).tolist()) == {0, 1, 2, 3}
