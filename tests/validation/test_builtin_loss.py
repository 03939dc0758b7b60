"""A sigmoid at the end beside a loss of one's own: taken for scores it is squashed twice, before it all is well."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.validation.test_objective import found, run
from tests.validation.test_reproduction import pasted
from utils.adapters import ModelSpec

WITH_LOGITS, OF_PROBABILITIES = F.binary_cross_entropy_with_logits, F.binary_cross_entropy


class Answers(nn.Module):
    """Scores `z`, their sigmoid `p` as the output, and a loss of both and the labels."""

    def __init__(self, loss, answers=6, flat=False, even=False, last=torch.sigmoid):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, answers))
        self.loss, self.flat, self.last = loss, flat, last
        if even:
            nn.init.zeros_(self.body[2].weight)
            nn.init.constant_(self.body[2].bias, -0.3)

    def forward(self, x, labels=None):
        z = self.body(x)
        p = self.last(z)
        z, p = (z.squeeze(-1), p.squeeze(-1)) if self.flat else (z, p)
        return {"logits": p} if labels is None else {"logits": p, "loss": self.loss(z, p, labels)}


def hot(labels):
    """Return a 1 for each label among six."""
    return F.one_hot(labels, 6).float()


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (lambda z, p, y: WITH_LOGITS(p, y.to(p.dtype)), {}),
        (lambda z, p, y: WITH_LOGITS(p, y.to(p.dtype), reduction="sum"), {}),
        (lambda z, p, y: WITH_LOGITS(p, y.to(p.dtype)), {"answers": 2}),
        (lambda z, p, y: WITH_LOGITS(p, y.to(p.dtype)), {"answers": 1}),
        (lambda z, p, y: WITH_LOGITS(p, y.to(p.dtype)), {"answers": 1, "flat": True}),
        (lambda z, p, y: WITH_LOGITS(p.squeeze(-1), y.to(p.dtype)), {"answers": 1}),
        (lambda z, p, y: WITH_LOGITS(p, y.to(p.dtype)), {"even": True}),
        (lambda z, p, y: WITH_LOGITS(torch.sigmoid(z), y.to(p.dtype)), {}),
    ],
)
def test_a_second_sigmoid_in_the_loss(loss, settings):
    """Of one answer or several, in every shape, with equal scores, and made from the output or beside it."""
    torch.manual_seed(0)
    model = Answers(loss, **settings)
    result = run(model)
    assert found(result) == [("wrong_builtin_loss", "fail", "Answers")]
    assert "a sigmoid already" in result.why and "0.31 nats for yes and 0.69 for no" in result.why
    assert result.details["loss"] == "binary cross-entropy of a second sigmoid"
    shown = pasted(result.findings[0].reproduction, model=model)
    assert re.match(r"loss tensor\(\d+\.\d+.*of a second sigmoid tensor\(\d\.\d+.*y within", shown, re.DOTALL), shown


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (lambda z, p, y: WITH_LOGITS(z, y.to(p.dtype)), {}),
        (lambda z, p, y: WITH_LOGITS(z, y.to(p.dtype)), {"even": True}),
        (lambda z, p, y: WITH_LOGITS(z, y.to(p.dtype)), {"answers": 1, "flat": True}),
        (lambda z, p, y: WITH_LOGITS(z, y.to(p.dtype)), {"answers": 1, "flat": True, "even": True}),
        (lambda z, p, y: WITH_LOGITS(z, hot(y)), {}),
        (lambda z, p, y: F.cross_entropy(z, y), {}),
        (lambda z, p, y: OF_PROBABILITIES(p, y.to(p.dtype)), {}),
        (lambda z, p, y: OF_PROBABILITIES(p, y.to(p.dtype)), {"even": True}),
        (lambda z, p, y: OF_PROBABILITIES(p, y.to(p.dtype)), {"answers": 1}),
        (lambda z, p, y: OF_PROBABILITIES(p, hot(y)), {}),
        (lambda z, p, y: F.mse_loss(p, y.to(p.dtype)), {"answers": 1, "flat": True}),
        (lambda z, p, y: F.mse_loss(p, y.to(p.dtype)), {"even": True}),
        (lambda z, p, y: WITH_LOGITS(p, y.to(p.dtype)), {"last": lambda z: z}),
        (lambda z, p, y: WITH_LOGITS(p, y.to(p.dtype)), {"last": lambda z: z, "answers": 1, "flat": True}),
    ],
)
def test_losses_that_fit_the_sigmoid_or_come_before_it(loss, settings):
    """From the scores, of the probabilities, with equal scores, and no sigmoid at all."""
    torch.manual_seed(0)
    assert found(run(Answers(loss, **settings))) == []


@pytest.mark.parametrize("loss", [lambda z, p, y: F.cross_entropy(p, y), lambda z, p, y: WITH_LOGITS(p, hot(y))])
def test_one_class_of_several_squashed_twice(loss):
    """Its own loss proves what the output alone only suggests."""
    torch.manual_seed(0)
    model = Answers(loss)
    result = run(model)
    assert found(result) == [("double_softmax", "fail", "Answers")] and "squashes them a second time" in result.why
    assert pasted(result.findings[0].reproduction, model=model).startswith("loss tensor(")


def test_a_sigmoid_alone_is_no_more_than_a_suspicion():
    """Without labels nobody knows what it is trained on."""

    class Bare(Answers):
        def forward(self, x):
            return super().forward(x)

    assert [entry[:2] for entry in found(run(Bare(None)))] == [("double_softmax", "warn")]
    several = ModelSpec(task="tabular_classification")
    assert [entry[:2] for entry in found(run(Bare(None), spec=several))] == [("double_softmax", "fail")]


def test_a_loss_of_whole_rows_keeps_the_suspicion():
    """Labels of many classes that cross-entropy takes as shares are not several labels at once."""

    def shares(z, p, y):
        if y.shape != p.shape:
            raise ValueError("expected a share for each class")
        return F.cross_entropy(p, y)

    torch.manual_seed(0)
    assert [entry[:2] for entry in found(run(Answers(shares)))] == [("double_softmax", "warn")]
