"""A short lesson from the model before an event that changed its function, to the one after it.

The new model is trained on what the old one answers (Hinton et al., arXiv:1503.02531, at temperature 1) until its loss
is within a hundredth of the old one's, on an optimizer of its own: the run's is left alone.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.adapters.objectives import REAL_VALUED
from utils.runtime.seeding import isolated_streams

CLOSE_ENOUGH = 0.01
"""Rise of the loss, as a share of it, at which the lesson is over."""
RATE = 1e-3
"""Learning rate of AdamW."""


@dataclass(frozen=True)
class Lesson:
    """How a distillation went."""

    steps: int
    """Steps taken."""
    loss_before: float
    """Loss of the model before the event, in nats."""
    loss_changed: float
    """Loss right after it."""
    loss_after: float
    """Loss after the lesson."""

    @property
    def learned(self) -> bool:
        """Whether the loss came back."""
        return within(self.loss_after, self.loss_before)


def within(loss: float, target: float) -> bool:
    """Tell whether a loss is at most a hundredth above another."""
    return loss <= target + CLOSE_ENOUGH * abs(target)


def teacher_of(adapter: ModelAdapter) -> ModelAdapter:
    """Return an adapter of a frozen copy of a model as it is now."""
    teacher = copy.copy(adapter)
    teacher.module = copy.deepcopy(adapter.module).eval().requires_grad_(False)
    return teacher


def distil(
    teacher: ModelAdapter,
    student: ModelAdapter,
    batches: Sequence[Mapping[str, Any]],
    loss: Callable[[ModelAdapter], float],
    steps: int,
    outputs: int | None = None,
) -> Lesson:
    """Teach a model what another one answers.

    Args:
        teacher: The model before the event.
        student: The model after it; it is changed.
        batches: Real inputs, taken in turn.
        loss: Measures a model on a real batch, in nats.
        steps: Most steps.
        outputs: How many of the student's answers the teacher has, where it has fewer.
    """
    trained = [parameter for parameter in student.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    target, changed = _measured(loss, teacher), _measured(loss, student)
    now, taken = changed, 0
    modes = [(child, child.training) for child in student.module.modules()]
    student.module.eval()
    with isolated_streams("distillation"):
        while taken < steps and not within(now, target):
            inputs = batches[taken % len(batches)]
            with torch.no_grad():
                wanted = teacher.logits(inputs)
            answered = student.logits(inputs)
            difference = _difference(
                student.task.value, wanted, answered if outputs is None else answered[..., :outputs]
            )
            optimizer.zero_grad(set_to_none=True)
            difference.backward()
            optimizer.step()
            taken += 1
            now = _measured(loss, student)
    for child, training in modes:
        child.training = training
    student.module.zero_grad(set_to_none=True)
    return Lesson(taken, target, changed, now)


def _measured(loss: Callable[[ModelAdapter], float], adapter: ModelAdapter) -> float:
    with adapter.isolated():
        return float(loss(adapter))


def _difference(task: str, wanted: Tensor, answered: Tensor) -> Tensor:
    """Return how far answers are apart: Kullback-Leibler divergence in nats, or the mean squared error."""
    if task in REAL_VALUED or wanted.shape[-1] == 1:
        return functional.mse_loss(answered, wanted)
    return functional.kl_div(
        answered.flatten(0, -2).float().log_softmax(-1), wanted.flatten(0, -2).float().log_softmax(-1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
