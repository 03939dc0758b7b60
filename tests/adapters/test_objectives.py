"""Losses against their definitions."""

import math

import pytest
import torch

from utils.adapters.objectives import IGNORED, random_labels, task_loss


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
