"""Measuring a model on held-out data."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from utils.adapters import ModelAdapter
from utils.adapters.objectives import IGNORED
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.tokenization import mask_tokens
from utils.training.metrics import bits_per_byte
from utils.training.prepared_data import PreparedData


def model_inputs(adapter: ModelAdapter, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name a batch's content as the model's forward does.

    Args:
        adapter: The model.
        batch: ``input_ids`` ``(batch, seq)`` or ``pixel_values`` ``(batch, channels, height, width)``, and ``labels``.
    """
    content = next(tensor for name, tensor in batch.items() if name != "labels")
    inputs = {adapter.main_input: content}
    for name in adapter.input_names[1:]:
        if name.endswith("_mask"):
            inputs[name] = torch.ones_like(content)
        elif name == "token_type_ids":
            inputs[name] = torch.zeros_like(content)
        elif name == "position_ids":
            inputs[name] = torch.arange(content.shape[1], device=content.device).expand_as(content)
    return inputs


def objective(
    adapter: ModelAdapter, data: PreparedData, batch: dict[str, Tensor], seed: int, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a batch and return loss, logits and labels; masked language models are masked anew from `seed`.

    Args:
        adapter: The model.
        data: What the batch is from.
        batch: ``input_ids`` or ``pixel_values``, and ``labels``.
        seed: Seed of the masking.
        label_smoothing: Share of each label spread over all classes (Szegedy et al., arXiv:1512.00567, section 7).

    Returns:
        The mean loss in nats (a scalar), the logits, and the labels with `IGNORED` where nothing is predicted.
    """
    if data.task == "masked_lm":
        tokenizer = data.tokenizer
        assert tokenizer is not None
        assert tokenizer.mask_id is not None
        special = [i for i in (tokenizer.eos_id, tokenizer.pad_id) if i is not None]
        inputs, labels = mask_tokens(batch["input_ids"], tokenizer.mask_id, tokenizer.vocab_size, special, seed=seed)
        batch = {"input_ids": inputs, "labels": labels}
    logits = adapter.logits(model_inputs(adapter, batch))
    labels = batch["labels"]
    if label_smoothing:
        classes = logits.shape[-1]
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
        ``loss`` in nats per predicted token or sample; ``accuracy`` for classifiers; ``bits_per_byte`` for causal
        language models: all nats over the held-out text, in bits, by its bytes in UTF-8.
    """
    device = adapter.device
    mean = MeanMetric().to(device)
    accuracy: MulticlassAccuracy | None = None
    counted = 0
    with preserved(adapter.module, seed, "validation"):
        adapter.module.eval()
        for start in range(0, data.validation_samples, batch_size):
            batch = {name: tensor[start : start + batch_size].to(device) for name, tensor in data.validation.items()}
            with context():
                loss, logits, labels = objective(adapter, data, batch, derive_seed(seed, "validation", start))
            weight = int((labels != IGNORED).sum())
            if weight == 0:
                continue
            counted += weight
            mean.update(loss.double(), weight)
            if data.task == "image_classification":
                if accuracy is None:
                    accuracy = MulticlassAccuracy(logits.shape[-1], average="micro").to(device)
                accuracy.update(logits.argmax(-1), labels)
    result = {"loss": float(mean.compute())}
    if accuracy is not None:
        result["accuracy"] = float(accuracy.compute())
    if data.task == "causal_lm":
        result["bits_per_byte"] = bits_per_byte(result["loss"] * counted, data.facts["validation_bytes"])
    return result
