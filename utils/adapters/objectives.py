"""The loss that belongs to a task, in nats, and labels to try it with."""

import torch
from torch import Tensor
from torch.nn import functional

from utils.runtime.seeding import derive_seed

IGNORED = -100
"""Label of positions that do not count, as in `torch.nn.functional.cross_entropy`."""

REAL_VALUED = ("regression", "embedding")
"""Tasks whose targets are numbers rather than classes."""


def task_loss(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss over the labels that count.

    Args:
        task: One of `utils.adapters.TASKS`.
        logits: ``(batch, seq, vocab)``, ``(batch, classes)`` or, for regression and embeddings, any shape.
        labels: ``(batch, seq)`` or ``(batch,)`` class indices already aligned with `logits`, `IGNORED` where a
            position does not count; for regression and embeddings a tensor shaped like `logits`.

    Returns:
        A scalar: cross-entropy in nats, or the mean squared error for regression and embeddings.
    """
    if task in REAL_VALUED:
        return functional.mse_loss(logits.float(), labels.float().view_as(logits))
    classes = logits.shape[-1]
    return functional.cross_entropy(
        logits.reshape(-1, classes).float(), labels.reshape(-1).long(), ignore_index=IGNORED
    )


def random_labels(task: str, logits: Tensor, seed: int = 0) -> Tensor:
    """Draw labels that `task_loss` accepts for these logits, the same for the same seed."""
    # Drawn from the bare seed they would equal token ids of the same shape that were drawn from it.
    generator = torch.Generator().manual_seed(derive_seed(seed, "labels"))
    if task in REAL_VALUED:
        return torch.randn(logits.shape, generator=generator).to(logits.device)
    return torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator).to(logits.device)
