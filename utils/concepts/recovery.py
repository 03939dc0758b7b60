"""What a model keeps when a layer says no more than the features that a sparse autoencoder found in it.

Its answers with the reconstruction in the layer's place lie between those with the layer as it is and those with the
layer's mean in its place.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.activations import as_table, counted_positions, run_given
from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.concepts.autoencoder import AutoencoderFit
from utils.concepts.checks import as_tensor
from utils.concepts.examples import BATCH_SIZE, example_batches
from utils.concepts.features import check_layer
from utils.concepts.layer_reading import on_device
from utils.concepts.patching import changed
from utils.memory.key_reader import adapter_of
from utils.runtime.errors import DataError
from utils.runtime.isolation import preserved


@dataclass(frozen=True)
class Recovery:
    """What a model keeps when a layer says no more than its features: the layer as it is, its features, its mean."""

    agreement: float
    """Share of answers whose largest output is the same with the features; NaN where outputs are real numbers."""
    agreement_ablated: float
    """The same with the layer's mean."""
    divergence: float
    """Mean Kullback-Leibler divergence to the answers with the features, in nats; or squared difference of outputs that
    are real numbers."""
    divergence_ablated: float
    """The same with the layer's mean."""
    loss: float
    """Loss in nats with the layer as it is; NaN where no labels are known."""
    loss_reconstructed: float
    """The same with the features."""
    loss_ablated: float
    """The same with the layer's mean."""
    answers: int
    """Answers compared."""

    @property
    def recovered(self) -> float:
        """How far the answers are on the way from the mean's to the layer's: 1 less the ratio of divergences."""
        return 1 - self.divergence / self.divergence_ablated if self.divergence_ablated > 0 else math.nan

    @property
    def loss_recovered(self) -> float:
        """The same for the loss, as is usual; NaN where the layer's mean costs nothing, or without labels."""
        cost = self.loss_ablated - self.loss
        return (self.loss_ablated - self.loss_reconstructed) / cost if cost > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values; JSON wants `utils.runtime.files.null_nonfinite` where some are NaN."""
        return {**vars(self), "recovered": self.recovered, "loss_recovered": self.loss_recovered}

    def __str__(self) -> str:
        said = [f"{self.recovered:.1%} of the answers' divergence recovered"]
        if math.isnan(self.recovered):
            said = ["The answers do not depend on the layer, so that there is nothing to recover"]
        if not math.isnan(self.agreement):
            same = f"{self.agreement:.1%} of {self.answers} answers the same"
            said.append(f"{same} ({self.agreement_ablated:.1%} with the mean)")
        if not math.isnan(self.loss):
            kept = f"loss {self.loss:.3f}, with the features {self.loss_reconstructed:.3f}"
            said.append(f"{kept}, with the mean {self.loss_ablated:.3f}")
        return "; ".join(said) + "."


def recovery(
    model: Any, fit: AutoencoderFit, examples: Any, labels: Tensor | None = None, *, channels: int | None = None,
    tokenizer: Any = None, batch_size: int = BATCH_SIZE,
) -> Recovery:  # fmt: skip
    """Put the reconstruction in the place of what the layer makes, and compare the model's answers.

    Args:
        model: What the autoencoder was fitted on.
        fit: From `fit_layer_autoencoder`.
        examples: Texts or model inputs, best others than it was fitted on.
        labels: int64 ``(n,)``: the class of each example, for the loss. A causal language model needs none: its next
            tokens are in the examples.
        channels: As it was when the autoencoder was fitted, and so the next two.
        tokenizer: See there.
        batch_size: See there.

    Raises:
        ConfigError: The autoencoder was not fitted on a layer.
        DataError: There is no example, the labels do not match, or a mask hides positions and does not fit the logits.
        AdapterError: The model cannot be called, or the layer makes nothing of each sample.
    """
    check_layer(fit)
    adapter = adapter_of(model)
    made = example_batches(model, examples, tokenizer, batch_size)
    labels = as_tensor(labels)
    if labels is not None and not _are_classes(labels, len(made)):
        kind = f"of the shape {tuple(labels.shape)}, {labels.dtype}" if isinstance(labels, Tensor) else (
            f"a {type(labels).__name__}"
        )  # fmt: skip
        raise DataError(
            f"There are {len(made)} examples, and the labels are {kind}.".replace("torch.", ""),
            f"Expected a tensor ({len(made)},) of classes as whole numbers from 0.",
            "Give one class for each example.",
        )
    module = SparseOnDevice(fit, adapter)
    sums: dict[str, float] = {}
    start = count = counted = 0
    where: dict[str, Any] = {"side": fit.side, "flat": fit.pool == "flat", "channels": channels}
    with preserved(adapter.module, 0, "recovery"), torch.no_grad():
        adapter.module.eval()
        # What the model does not run on is told by its first two samples.
        run_given(adapter, on_device(adapter, {name: value[:2] for name, value in made.batches[0].items()}))
        for batch in made.batches:
            inputs = {name: value.to(adapter.device) for name, value in batch.items()}
            size = len(inputs[adapter.main_input])
            own = None if labels is None else labels[made.order[start : start + size]].to(adapter.device)
            start += size
            kept, targets = _answers(adapter, inputs, own)
            parts = {"": kept}
            for name, change in (("reconstructed", module.reconstruct), ("ablated", module.ablate)):
                content = inputs[adapter.main_input]
                with changed(adapter, fit.layer, change, content, **where):
                    parts[name], _ = _answers(adapter, inputs, own)
            count += len(kept)
            counted += 0 if targets is None else int((targets >= 0).sum())
            for name, value in _compared(parts, targets, adapter.task.value in REAL_VALUED).items():
                sums[name] = sums.get(name, 0.0) + value
    means = {name: value / (counted if name.startswith("loss") else count) for name, value in sums.items()}
    names = [name for name in Recovery.__dataclass_fields__ if name != "answers"]
    return Recovery(**{name: means.get(name, math.nan) for name in names}, answers=count)


class SparseOnDevice:
    """An autoencoder where its model is, and what to put in a layer's place."""

    def __init__(self, fit: AutoencoderFit, adapter: ModelAdapter) -> None:
        """Copy the autoencoder to the model's device."""
        self.module = copy.deepcopy(fit.autoencoder).to(adapter.device)

    def reconstruct(self, rows: Tensor) -> Tensor:
        """Return what the features make of rows."""
        made: Tensor = self.module(rows)
        return made

    def ablate(self, rows: Tensor) -> Tensor:
        """Return the mean in the place of each row."""
        return self.module.mean.to(rows.dtype).expand_as(rows)


def _are_classes(labels: Any, count: int) -> bool:
    """Return whether labels are one class for each example; negative ones stand for none, as `IGNORED` does."""
    return isinstance(labels, Tensor) and labels.shape == (count,) and not labels.is_floating_point()


def _answers(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return logits of each real position ``(rows, outputs)``, and the class wanted of each, `IGNORED` for none."""
    logits = adapter.logits(dict(inputs))
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim == 2:
        return logits, labels
    content = inputs[adapter.main_input]
    is_text = adapter.modality == "tokens"
    table, _ = as_table(logits, content, "the model", logits.ndim - 1 if is_text else None)
    real = counted_positions(inputs, table, "the model")
    targets = None
    if adapter.task.value == "causal_lm" and content.shape == table.shape[:2]:
        following = torch.full_like(content, IGNORED)
        following[:, :-1] = content[:, 1:].masked_fill(~real[:, 1:], IGNORED)
        targets = following[real]
    return table[real], targets


def _compared(parts: Mapping[str, Tensor], targets: Tensor | None, real_valued: bool) -> dict[str, float]:
    """Return sums over a batch of what `Recovery` is the means of."""
    kept = parts[""]
    sums = {}
    if real_valued or kept.shape[1] == 1:
        for name, suffix in (("reconstructed", ""), ("ablated", "_ablated")):
            sums[f"divergence{suffix}"] = float((parts[name] - kept).double().square().mean(1).sum())
        return sums
    logs = {name: value.double().log_softmax(1) for name, value in parts.items()}
    for name, suffix in (("reconstructed", ""), ("ablated", "_ablated")):
        sums[f"agreement{suffix}"] = float((logs[name].argmax(1) == logs[""].argmax(1)).sum())
        sums[f"divergence{suffix}"] = float((logs[""].exp() * (logs[""] - logs[name])).sum())
    if targets is not None:
        wrong = (targets >= kept.shape[1]) | ((targets < 0) & (targets != IGNORED))
        if bool(wrong.any()):
            raise DataError(
                f"A label is {int(targets[wrong][0])}.",
                f"Expected from 0 to {kept.shape[1] - 1}, the model's classes, or {IGNORED} for no label.",
                "Correct the labels.",
            )
        for name in parts:
            losses = torch.nn.functional.nll_loss(logs[name], targets.long(), reduction="sum")
            sums["loss" + (f"_{name}" if name else "")] = float(losses)
    return sums
