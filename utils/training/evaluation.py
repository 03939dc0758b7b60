"""Measuring a model on held-out data."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.runtime.errors import DataError
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.tokenization import mask_tokens
from utils.training.batch_inputs import model_inputs
from utils.training.batching import collate
from utils.training.metrics import bits_per_byte
from utils.training.prepared_data import PreparedData

CLASSIFIERS = ("text_classification", "image_classification", "audio_classification", "tabular_classification")
"""Tasks whose answer is one class per sample."""


def masking_seed(seed: int, batch_number: int, rank: int) -> int:
    """Return the seed of what is masked in a training batch of a process."""
    return derive_seed(seed, "masking", batch_number, rank)


def held_out_seeds(seed: int, samples: Tensor) -> list[int]:
    """Return the seeds of what is masked in held-out samples, given their numbers: the same in batches of any size."""
    return [derive_seed(seed, "validation", number) for number in samples.tolist()]


def masked(data: PreparedData, batch: dict[str, Tensor], seed: int | Sequence[int]) -> dict[str, Tensor]:
    """Return a batch as the model is to see it: of masked language models tokens are hidden, all else stays.

    Args:
        data: What the batch is from.
        batch: What `utils.training.batching.collate` returns.
        seed: Seed of the masking, or one for each sample.
    """
    if data.task != "masked_lm":
        return batch
    tokenizer = data.tokenizer
    assert tokenizer is not None
    assert tokenizer.mask_id is not None
    # Only what texts are made of is hidden, or put in the place of something hidden.
    special = {i for i in (*tokenizer.special_ids, tokenizer.eos_id, tokenizer.pad_id) if i is not None}
    rows, seeds = ((batch["input_ids"],), (seed,)) if isinstance(seed, int) else (batch["input_ids"].split(1), seed)
    hidden = [
        mask_tokens(row, tokenizer.mask_id, tokenizer.vocab_size, special, seed=own)
        for row, own in zip(rows, seeds, strict=True)
    ]
    inputs, labels = (torch.cat(parts) for parts in zip(*hidden, strict=True))
    # What fills up the last window counts for no one.
    return {"input_ids": inputs, "labels": torch.where(batch["labels"] == IGNORED, IGNORED, labels)}


def objective(
    adapter: ModelAdapter,
    data: PreparedData,
    batch: dict[str, Tensor],
    seed: int | Sequence[int],
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a batch and return loss, logits and labels; masked language models are masked anew from `seed`.

    Args:
        adapter: The model.
        data: What the batch is from.
        batch: What `utils.training.batching.collate` returns, on the model's device.
        seed: Seed of the masking, or one for each sample, so that batches of any size mask a sample alike.
        label_smoothing: Share of each label spread over all classes (Szegedy et al., arXiv:1512.00567, section 7).

    Returns:
        The mean loss in nats (a scalar), the logits, and the labels with `IGNORED` where nothing is predicted.
    """
    batch = masked(data, batch, seed)
    logits = adapter.logits(model_inputs(adapter, batch, data))
    labels = batch["labels"]
    if data.task in REAL_VALUED:
        return adapter.loss(logits, labels), logits, labels
    classes = logits.shape[-1]
    if logits.numel() // classes != labels.numel():
        raise DataError(
            f"The model answers with scores of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}.",
            "Expected one row of scores for each label.",
            "Check the model's task: " + adapter.task.reason + ". If it is wrong, say ModelSpec(task=...).",
        )
    if label_smoothing and classes == 1:
        # One score is a choice of two classes: the share goes to both alike.
        kept = labels.reshape(-1) != IGNORED
        wanted = labels.reshape(-1)[kept].float() * (1 - label_smoothing) + label_smoothing / 2
        scores = logits.reshape(-1).float()[kept]
        return functional.binary_cross_entropy_with_logits(scores, wanted), logits, labels
    if label_smoothing:
        flat = logits.reshape(-1, classes).float()
        smoothed = functional.cross_entropy(
            flat, labels.reshape(-1), ignore_index=IGNORED, label_smoothing=label_smoothing
        )
        return smoothed, logits, labels
    return adapter.loss(logits, labels), logits, labels


@torch.no_grad()
def evaluate(
    adapter: ModelAdapter,
    data: PreparedData,
    batch_size: int,
    seed: int = 0,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Measure a model on all held-out samples; the model and the random streams are left as they were.

    Args:
        adapter: The model.
        data: Where the held-out samples are.
        batch_size: Samples per forward pass.
        seed: Seed of the masking, the same at every call, so that measurements compare.
        context: Makes the context of each forward pass, for mixed precision.

    Returns:
        ``loss`` in nats per predicted token or sample, or the mean squared error in deviations of the training targets;
        ``accuracy`` for classifiers; ``rmse`` in the units of the data and ``r2`` for regression; ``bits_per_byte`` for
        causal language models: all nats over the held-out text, in bits, by its bytes in UTF-8, unless some of the text
        has no id of its own, so that the loss does not cover it.
    """
    device = adapter.device
    # Kept on the device, in 64 bits: the sum over a large set would lose digits, and to read it would wait.
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct, counted = 0, 0
    fit = Fit()
    with preserved(adapter.module, seed, "validation"):
        adapter.module.eval()
        for start in range(0, data.validation_samples, batch_size):
            chosen = torch.arange(start, min(start + batch_size, data.validation_samples))
            batch = {name: tensor.to(device) for name, tensor in collate(data.validation, chosen).items()}
            with context():
                loss, logits, labels = objective(adapter, data, batch, held_out_seeds(seed, chosen))
            real = data.task in REAL_VALUED
            weight = labels.numel() if real else int((labels != IGNORED).sum())
            if weight == 0:
                continue
            counted += weight
            total += loss.double() * weight
            if real:
                fit.update(logits, labels)
            elif data.task in CLASSIFIERS:
                correct += int((predicted_classes(logits).reshape(-1) == labels.reshape(-1)).sum())
    result = {"loss": float(total) / counted if counted else math.nan}
    if data.task in CLASSIFIERS:
        result["accuracy"] = correct / max(1, counted)
    if data.task in REAL_VALUED:
        result |= fit.compute(data.facts.get("target_deviation", 1.0))
    if data.task == "causal_lm" and not data.facts.get("validation_unknown"):
        result["bits_per_byte"] = bits_per_byte(result["loss"] * counted, data.facts["validation_bytes"])
    return result


def predicted_classes(logits: Tensor) -> Tensor:
    """Return the likeliest class; a single score says yes above zero."""
    return (logits[..., 0] > 0).long() if logits.shape[-1] == 1 else logits.argmax(-1)


class Fit:
    """How well numbers are predicted, summed up batch by batch in float64."""

    def __init__(self) -> None:
        """Start with no sample."""
        self.count = 0
        self.errors = self.total = self.squares = 0.0

    def update(self, predicted: Tensor, wanted: Tensor) -> None:
        """Add a batch."""
        predicted, wanted = predicted.double().reshape(-1), wanted.double().reshape(-1)
        self.count += wanted.numel()
        self.errors += float((predicted - wanted).square().sum())
        self.total += float(wanted.sum())
        self.squares += float(wanted.square().sum())

    def compute(self, unit: float) -> dict[str, float]:
        """Return the root of the mean squared error times `unit`, and the share of the variance that is explained.

        ``r2`` is absent where the held-out targets are all the same.
        """
        variance = self.squares - self.total**2 / max(1, self.count)
        result = {"rmse": unit * math.sqrt(self.errors / max(1, self.count))}
        if variance > 1e-12 * max(1.0, self.squares):
            result["r2"] = 1 - self.errors / variance
        return result
