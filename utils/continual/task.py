"""A task of a stream: which samples, which classes, and what is done to the input."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.training.batch_inputs import CONTENT
from utils.training.batching import collate
from utils.training.prepared_data import PreparedData


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream, as sample numbers of some prepared data."""

    number: int
    """Its place in the stream, from 0."""
    name: str
    """What people call it."""
    train: Tensor
    """Numbers of its training samples, int64 ``(samples,)``."""
    validation: Tensor
    """Numbers of its held-out samples, int64 ``(samples,)``."""
    classes: tuple[int, ...] = ()
    """Its classes as it shows them, ascending; empty where samples have no class."""
    permutation: Tensor | None = None
    """New order of the entries of each sample, int64 ``(entries,)``; None leaves them as they are."""
    answers: tuple[int, ...] = ()
    """The outputs that may answer, ascending; those of all classes so far do where this is empty."""
    relabelled: tuple[int, ...] = ()
    """Its labels in the order in which they become 0, 1, ...: every task uses the same outputs; empty keeps them."""

    def batch(self, samples: dict[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
        """Make a batch of some of the data's samples as this task shows them.

        Args:
            samples: Tensors whose first dimension counts the samples.
            indices: Numbers of the samples, shape (batch,).
        """
        return self.shown(collate(samples, indices))

    def held_out(self, data: PreparedData) -> PreparedData:
        """Return the data with this task's held-out samples as all that is held out."""
        rows = self.shown({name: tensor[self.validation] for name, tensor in data.validation.items()})
        # What the whole held-out text counts, in bytes, says nothing about a part of it.
        return replace(data, validation=rows, facts={**data.facts, "validation_unknown": True})

    def shown(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return samples as this task shows them: entries in its order, labels as its outputs count them."""
        if self.relabelled:
            # A label that is not of this task has no place: no loss takes -1.
            places = torch.full((max(self.relabelled) + 1,), -1)
            places[list(self.relabelled)] = torch.arange(len(self.relabelled))
            rows = {**rows, "labels": places[rows["labels"].long()]}
        if self.permutation is not None:
            name = next(name for name in CONTENT if name in rows)
            value = rows[name]
            rows = {**rows, name: value.flatten(1).index_select(1, self.permutation).view_as(value)}
        return rows


def permuted(entries: int, seed: int) -> Tensor:
    """Return a random order of the entries of a sample.

    Args:
        entries: How many there are.
        seed: Decides the order.
    """
    return torch.randperm(entries, generator=torch.Generator().manual_seed(seed))
