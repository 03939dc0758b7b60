"""The loss that belongs to a task, in nats, labels to try it with, and the loss that a model returns by itself.

`OBJECTIVES` holds the losses that models are known to compute, right and wrong ones, as functions of scores: comparing
gradients tells which of them a model's own loss is, however it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.adapters.capture import named_tensors, observe
from utils.runtime.seeding import derive_seed, seed_streams

if TYPE_CHECKING:
    from utils.adapters.model_adapter import ModelAdapter

IGNORED = -100
"""Label of positions that do not count, as in `torch.nn.functional.cross_entropy`."""

SWITCHED_OFF = -1e4
"""Score of a class that a model rules out."""

REAL_VALUED = ("regression", "embedding")
"""Tasks whose targets are numbers rather than classes."""

SHIFTED_BY_MODEL = ("labels", "label", "lm_labels")
"""Names under which a causal model gets its own input and shifts it, as in transformers."""
SHIFTED_BY_CALLER = ("targets", "target", "y")
"""Names under which a causal model gets the next tokens, as in nanoGPT."""


def task_loss(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss over the labels that count.

    Args:
        task: One of `utils.adapters.TASKS`.
        logits: ``(batch, seq, vocab)``, ``(batch, classes)`` or, for regression and embeddings, any shape.
        labels: ``(batch, seq)`` or ``(batch,)`` class indices already aligned with `logits`, `IGNORED` where a
            position does not count; for regression and embeddings a tensor shaped like `logits`.

    Returns:
        A scalar: cross-entropy in nats, binary for a single score, or the mean squared error for regression and
        embeddings.
    """
    if task in REAL_VALUED:
        return functional.mse_loss(logits.float(), labels.float().view_as(logits))
    classes = logits.shape[-1]
    if classes == 1:
        # One score for yes or no: the softmax of a single class would be 1 whatever it is.
        kept = labels.reshape(-1) != IGNORED
        scores, wanted = logits.reshape(-1).float()[kept], labels.reshape(-1)[kept].float()
        return functional.binary_cross_entropy_with_logits(scores, wanted)
    return functional.cross_entropy(
        logits.reshape(-1, classes).float(), labels.reshape(-1).long(), ignore_index=IGNORED
    )


def random_labels(task: str, logits: Tensor, seed: int = 0) -> Tensor:
    """Draw labels that `task_loss` accepts for these logits, the same for the same seed."""
    # Drawn from the bare seed they would equal token ids of the same shape that were drawn from it.
    generator = torch.Generator().manual_seed(derive_seed(seed, "labels"))
    if task in REAL_VALUED:
        return torch.randn(logits.shape, generator=generator).to(logits.device)
    # A single score answers yes or no.
    drawn = torch.randint(max(2, logits.shape[-1]), logits.shape[:-1], generator=generator).to(logits.device)
    # A class that the model switches off is never a label.
    off = (logits.detach() <= SWITCHED_OFF).flatten(0, -2).all(0) if logits.dim() > 1 else None
    if off is None or not bool(off.any()) or bool(off.all()):
        return drawn
    allowed = (~off).nonzero()[:, 0]
    return allowed[drawn % len(allowed)]


def distinct_labels(shape: tuple[int, ...], classes: int, seed: int = 0) -> Tensor:
    """Draw class labels that repeat as late as possible, so that a label tells which position it belongs to."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "distinct labels"))
    count = int(torch.Size(shape).numel())
    rounds = [torch.randperm(classes, generator=generator) for _ in range(-(-count // classes))]
    return torch.cat(rounds)[:count].view(shape)


Objective = Callable[[Tensor, Tensor], Tensor]


def _chosen(values: Tensor, labels: Tensor) -> Tensor:
    """Return each row's value at its label."""
    return values.gather(-1, labels[:, None])[:, 0]


def _one_hot(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.one_hot(labels, scores.shape[-1]).to(scores.dtype)


def _binary(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of each row of probabilities against its one-hot label."""
    inside = probabilities.clamp(1e-30, 1.0)
    chosen = _chosen(inside, labels)
    others = (1.0 - probabilities).clamp_min(1e-7).log()
    return -(chosen.log() + others.sum(-1) - _chosen(others, labels))


OBJECTIVES: dict[str, Objective] = {
    "cross-entropy": lambda scores, labels: functional.cross_entropy(scores, labels, reduction="none"),
    "cross-entropy of a softmax": lambda scores, labels: functional.cross_entropy(
        scores.softmax(-1), labels, reduction="none"
    ),
    "cross-entropy of a sigmoid": lambda scores, labels: functional.cross_entropy(
        scores.sigmoid(), labels, reduction="none"
    ),
    "negative score": lambda scores, labels: -_chosen(scores, labels),
    "negative probability": lambda scores, labels: -_chosen(scores.softmax(-1), labels),
    "negative log of the output": lambda scores, labels: -_chosen(scores.clamp_min(1e-30).log(), labels),
    "squared error of the scores": lambda scores, labels: (scores - _one_hot(scores, labels)).square().mean(-1),
    "squared error of a softmax": lambda scores, labels: (
        (scores.softmax(-1) - _one_hot(scores, labels)).square().mean(-1)
    ),
    "binary cross-entropy": lambda scores, labels: functional.binary_cross_entropy_with_logits(
        scores, _one_hot(scores, labels), reduction="none"
    ).mean(-1),
    "binary cross-entropy of the output": _binary,
}
"""Losses of scores ``(rows, classes)`` and labels ``(rows,)``, one number per row, by a name for people."""


@dataclass(frozen=True)
class OwnLoss:
    """What a model returned when it was given labels."""

    loss: Tensor
    """The scalar that it returned, with its graph."""
    scores: Tensor | None
    """Its logits from the same call, shaped as without labels; None when it returned none."""
    gradient: Tensor | None
    """The loss's gradient by the scores; None when the loss was not made from them."""
    attached: bool
    """The scores carry a gradient, so that a loss made from them would have had one."""


def labels_input(adapter: ModelAdapter) -> str | None:
    """Return the argument, or the entry of one, through which forward takes labels, or None."""
    taken = [*adapter.loss_inputs] or [name for name in adapter.argument_names if name not in adapter.input_names]
    usual = (*SHIFTED_BY_MODEL, *SHIFTED_BY_CALLER)
    named = sorted((name for name in taken if last_part(name) in usual), key=lambda name: usual.index(last_part(name)))
    return next(iter([*named, *adapter.loss_inputs]), None)


def last_part(name: str) -> str:
    """Return the name of an argument, or of an entry of one that is a dict."""
    return name.rsplit(".", 1)[-1]


def like_example(adapter: ModelAdapter, labels: Tensor) -> Tensor:
    """Return labels in the shape and the dtype of the user's example of them, where they fit it."""
    name = labels_input(adapter)
    example = adapter.loss_inputs.get(name or "")
    if example is None or not example.dim():
        return labels
    fits = labels.dim() > 0 and labels[0].numel() == example[0].numel()
    if fits and labels.shape[1:] != example.shape[1:]:
        labels = labels.reshape(len(labels), *example.shape[1:])
    elif labels.dim() == 2 and example.dim() == 1:
        # One label for each position of all samples.
        labels, fits = labels.flatten(), True
    if not fits:
        return labels
    return labels.to(adapter.real_dtype if example.is_floating_point() else example.dtype)


def own_loss(adapter: ModelAdapter, inputs: Mapping[str, Any], labels: Tensor, expected: Tensor) -> OwnLoss | None:
    """Call a model with labels.

    Args:
        adapter: A model for which `labels_input` is not None.
        inputs: Its other inputs.
        labels: What to pass as labels.
        expected: The logits without labels; those beside the loss are told by their shape.

    Returns:
        The loss and where it came from; None when nothing returned is a single real number.
    """
    name = labels_input(adapter)
    assert name is not None
    labels = like_example(adapter, labels)
    seed_streams(0, "forward")
    with _settings_kept(adapter.module):
        output = adapter.forward({**inputs, name: labels})
    found = [(path, tensor) for path, tensor in named_tensors(output) if tensor.is_floating_point()]
    scalars = [(path.rsplit(".", 1)[-1], tensor) for path, tensor in found if tensor.numel() == 1 and tensor.dim() < 2]
    if not scalars or expected.numel() == 1:
        return None
    loss = min(scalars, key=lambda item: (item[0] != "loss", "loss" not in item[0]))[1].reshape(())
    alike = [t for _, t in found if t.numel() == expected.numel() and t.shape[-1] == expected.shape[-1]]
    # An embedding as wide as the vocabulary is long could look like the logits; where the path says so, believe it.
    scores = next((t for path, t in found if path == adapter.output.value and any(t is a for a in alike)), None)
    scores = scores if scores is not None else next(iter(alike), None)
    gradient = None
    if scores is not None and loss.requires_grad and scores.requires_grad:
        gradient = torch.autograd.grad(loss, scores, retain_graph=True, allow_unused=True)[0]
    attached = scores is not None and scores.requires_grad
    return OwnLoss(loss, _arranged(scores, expected), _arranged(gradient, expected), attached)


def _arranged(tensor: Tensor | None, expected: Tensor) -> Tensor | None:
    """Bring scores, or their gradient, that are flat or time first into the shape of the logits without labels."""
    if tensor is None:
        return None
    turned = tensor.dim() == 3 and tensor.shape != expected.shape and tensor.transpose(0, 1).shape == expected.shape
    return (tensor.transpose(0, 1) if turned else tensor).detach().reshape(expected.shape)


def loss_site(adapter: ModelAdapter, inputs: Mapping[str, Any], labels: Tensor) -> str:
    """Return the innermost module of the user's own that returns the loss; a criterion of torch is never to blame."""
    name = labels_input(adapter)
    assert name is not None
    sites: list[tuple[str, float]] = []

    def note(site: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if not isinstance(child, nn.modules.loss._Loss):
            sites.extend(
                (site, float(t.detach())) for _, t in named_tensors(output) if t.is_floating_point() and t.numel() == 1
            )

    labels = like_example(adapter, labels)
    seed_streams(0, "forward")
    with _settings_kept(adapter.module), observe(adapter.module, note):
        output = adapter.forward({**inputs, name: labels})
    values = {float(t.detach()) for _, t in named_tensors(output) if t.is_floating_point() and t.numel() == 1}
    return next((site for site, value in sites if site and value in values), "") or adapter.name


def output_site(adapter: ModelAdapter, inputs: Mapping[str, Any], result: Tensor) -> str:
    """Return the innermost module that already returns the values of `result`, in whatever shape."""
    sites: list[str] = []
    wanted = result.detach().reshape(-1)

    def note(site: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if sites or any(t.numel() == wanted.numel() and _same(t, wanted) for _, t in named_tensors(given)):
            return
        if any(t.numel() == wanted.numel() and _same(t, wanted) for _, t in named_tensors(output)):
            sites.append(site)

    seed_streams(0, "forward")
    with torch.no_grad(), observe(adapter.module, note):
        adapter.forward(inputs)
    return (sites[0] if sites else "") or adapter.name


def _same(tensor: Tensor, wanted: Tensor) -> bool:
    """Tell whether two tensors hold the same values, in whatever order."""
    flat = tensor.detach().reshape(-1).to(wanted.dtype)
    return torch.equal(flat, wanted) or torch.equal(flat.sort().values, wanted.sort().values)


@contextmanager
def _settings_kept(module: nn.Module) -> Iterator[None]:
    """Put the settings back that some models change on the first call with labels, such as the type of problem."""
    holders = {id(child.config): child.config for child in module.modules() if hasattr(child, "config")}
    kept = [(vars(config), dict(vars(config))) for config in holders.values() if hasattr(config, "__dict__")]
    try:
        yield
    finally:
        for now, before in kept:
            now.clear()
            now.update(before)
