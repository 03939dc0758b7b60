"""What a student knew: its outputs on its own data, kept while it learns, and how many of its answers change."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.adapters.objectives import REAL_VALUED
from utils.concepts.content import read_content
from utils.concepts.examples import Examples, example_batches
from utils.concepts.layer_reading import on_device
from utils.runtime.errors import ConfigError

HELD_SHARE = 5
"""One of so many samples measures what changed; the others are learned from."""
MIXTURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Shares of the way from the old weights to the new ones."""


def twin(adapter: ModelAdapter, purpose: str) -> ModelAdapter:
    """Return an adapter for a copy of a model.

    Raises:
        ConfigError: It cannot be copied.
    """
    made = copy.copy(adapter)
    try:
        made.module = copy.deepcopy(adapter.module)
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise ConfigError(
            f"{adapter.name} cannot be copied ({type(error).__name__}: {error}).",
            f"Expected a model that copy.deepcopy copies: {purpose}.",
            "Move what cannot be copied (files, locks, handles) out of the module.",
        ) from error
    return made


def fitted_batches(adapter: ModelAdapter, given: Any, tokenizer: Any, what: str) -> Examples:
    """Return samples as batches that a model takes, as large as their lengths allow; two of them are tried.

    Raises:
        ConfigError: The model does not take them.
        DataError: There is none, or texts have no tokenizer.
    """
    content = read_content(given, what)
    made = example_batches(adapter, content.given, tokenizer, max(1, len(content)))
    try:
        with adapter.isolated():
            adapter.forward(on_device(adapter, {name: value[:2] for name, value in made.batches[0].items()}))
    except Exception as error:
        raise ConfigError(
            f"The {adapter.name} does not take the {what}, {content.said} ({type(error).__name__}: {error}).",
            f"Expected inputs such as its {', '.join(adapter.input_names)}.",
            "Give the same samples in the form that it takes: student_examples=..., student_test=...",
        ) from error
    return made


class Retention:
    """Keeps a student's outputs on its own data.

    Attributes:
        old: The student as it was, frozen.
        held: Numbers of the samples that only measure.
        trained: Numbers of the others.
    """

    def __init__(
        self, student: ModelAdapter, samples: Examples, generator: torch.Generator, temperature: float
    ) -> None:
        """Copy the student and set samples aside.

        Args:
            student: The student before it learns.
            samples: Its own data, in few batches.
            generator: Of the split.
            temperature: Softness of the outputs that are kept.
        """
        self.old = twin(student, "what it knew is kept by a copy")
        self.old.module.eval().requires_grad_(False)
        self.samples, self.temperature = samples, temperature
        self.real = student.task.value in REAL_VALUED
        order = torch.randperm(len(samples), generator=generator)
        cut = len(order) // HELD_SHARE
        # A handful of samples can both teach and measure; the number then says less, as its count tells.
        self.held, self.trained = (order[:cut], order[cut:]) if cut else (order, order)

    def loss(self, student: ModelAdapter, numbers: Tensor) -> Tensor:
        """Return how far the outputs on some samples are from what they were: a scalar.

        The Kullback-Leibler divergence of softened outputs (Hinton et al., 2015; Li & Hoiem, 2016), or for outputs that
        are numbers the squared change as a share of their variance.
        """
        losses, weight = [], 0
        for batch in self.samples.chosen(numbers).batches:
            inputs = on_device(student, batch)
            with torch.no_grad():
                wanted = self.old.logits(inputs).float()
            now = student.logits(inputs).float()
            count = len(now)
            losses.append(count * self._distance(now, wanted))
            weight += count
        return torch.stack(losses).sum() / weight

    def changed(self, student: ModelAdapter) -> float:
        """Return the share of answers on the samples set aside that are others now; modes are the caller's affair."""
        total, weight = 0.0, 0
        with torch.no_grad():
            for batch in self.samples.chosen(self.held).batches:
                for piece in _pieces(batch, 256):
                    inputs = on_device(student, piece)
                    before, now = self.old.logits(inputs).float(), student.logits(inputs).float()
                    total += len(now) * self._change(now, before)
                    weight += len(now)
        return total / weight

    def _distance(self, now: Tensor, wanted: Tensor) -> Tensor:
        if self.real:
            return (now - wanted).square().mean() / wanted.var(correction=0).clamp_min(1e-8)
        if now.shape[-1] == 1:
            return functional.binary_cross_entropy_with_logits(now, wanted.sigmoid()) - (
                functional.binary_cross_entropy_with_logits(wanted, wanted.sigmoid())
            )
        soft, classes = self.temperature, now.shape[-1]
        divergence = functional.kl_div(
            (now / soft).log_softmax(-1).reshape(-1, classes), (wanted / soft).log_softmax(-1).reshape(-1, classes),
            reduction="batchmean", log_target=True,
        )  # fmt: skip
        return soft**2 * divergence

    def _change(self, now: Tensor, before: Tensor) -> float:
        if self.real:
            return float((now - before).square().mean() / before.var(correction=0).clamp_min(1e-8))
        return float((answers(now) != answers(before)).float().mean())

    def mix(self, student: ModelAdapter, new: Mapping[str, Tensor], share: float) -> None:
        """Set a student's parameters to a share of the way from the old ones to the new ones."""
        old = dict(self.old.module.named_parameters())
        with torch.no_grad():
            for name, parameter in student.module.named_parameters():
                if name in new:
                    parameter.copy_(new[name] if share == 1 else torch.lerp(old[name], new[name], share))


def answers(logits: Tensor) -> Tensor:
    """Return the class that scores ``(..., classes)`` are for; of a single score whether it is above zero."""
    return logits[..., 0] > 0 if logits.shape[-1] == 1 else logits.argmax(-1)


def _pieces(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Return a batch as batches of at most a size."""
    parts = [value.split(size) for value in batch.values()]
    return [dict(zip(batch, pieces, strict=True)) for pieces in zip(*parts, strict=True)]
