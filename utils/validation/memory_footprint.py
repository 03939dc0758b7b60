"""What does the model need to run and to train, and what batch fits?

Activations are measured, not guessed: autograd says which tensors it keeps for the backward pass. Each is counted once
by its storage, and dropped at once, so measuring takes no more memory than a forward pass without gradients.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.resources import device_memory, format_bytes, format_count, is_out_of_memory
from utils.runtime.seeding import seed_streams
from utils.validation.allocations import Allocations
from utils.validation.check import Budget, Finding, Outcome
from utils.validation.pictures import Picture
from utils.validation.probing import ModelCrash, forward_seconds, guarded, has_length, longest_length, short_length
from utils.validation.svg import bar_list

T4_BYTES = 15.0e9
"""What a 16 GB T4 leaves for a program."""
PICTURE = "Memory of training at batch size 1"
RESERVE = 0.9
"""Part of a device's memory that tensors can fill; the rest goes to the allocator, kernels and the program."""


def check_memory_footprint(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Measure weights, gradients, optimizer state and activations per sample at the longest affordable length.

    Codes: ``out_of_memory``: fail when the weights alone exceed the device, warn when training at batch 1 does.
    """
    unique = {id(p): p for p in adapter.module.parameters()}.values()
    weights = sum(p.numel() * p.element_size() for p in unique)
    buffers = sum(b.numel() * b.element_size() for b in adapter.module.buffers())
    gradients = sum(p.numel() * p.element_size() for p in unique if p.requires_grad)
    # AdamW keeps two moments of each trainable number, in the parameter's own type.
    optimizer = 2 * gradients
    length, activations, how = _activations_at_length(adapter, budget)
    fixed = weights + buffers + gradients + optimizer
    capacity = device_memory(adapter.device)
    training = fixed + activations
    details: dict[str, Any] = {
        "weights": weights,
        "buffers": buffers,
        "gradients": gradients,
        "adamw_state": optimizer,
        "activations_per_sample": activations,
        "activations_how": how,
        "length": length,
        "training_batch_1": training,
        "device_memory": capacity,
        "largest_batch_here": _largest_batch(capacity * RESERVE, fixed, activations),
        "largest_batch_t4": _largest_batch(T4_BYTES, fixed, activations),
        **_training_peak(adapter, budget, weights + buffers),
    }
    findings = []
    if weights > capacity:
        message = f"the weights take {format_bytes(weights)}, this device has {format_bytes(capacity)}"
        hint = "Use a smaller model, a lower precision or a larger device."
        findings.append(Finding("out_of_memory", "fail", adapter.name, message, hint))
    elif training > capacity:
        message = f"training at batch size 1 takes {format_bytes(training)}, this device has {format_bytes(capacity)}"
        hint = "Train shorter sequences, recompute activations (checkpointing), or use a larger device."
        findings.append(Finding("out_of_memory", "warn", adapter.name, message, hint))
    why = (
        f"training takes {format_bytes(training)} at batch size 1"
        + (f" and length {length}" if length else "")
        + f"; largest batch {format_count(details['largest_batch_here'])} here, "
        + f"{format_count(details['largest_batch_t4'])} on a 16 GB T4"
    )
    parts = {"weights": weights, "gradients": gradients, "AdamW moments": optimizer, "activations": activations}
    chart = bar_list(list(parts), list(parts.values()), [format_bytes(size) for size in parts.values()], PICTURE)
    picture = Picture(PICTURE, chart, "Only the activations grow with the batch.")
    return Outcome(format_bytes(training), format_bytes(capacity), why, findings, details, [picture])


def _training_peak(adapter: ModelAdapter, budget: Budget, weights: int) -> dict[str, Any]:
    """Measure the most bytes of tensors alive at once in a forward and backward pass of one short sample."""
    length = short_length(adapter) if has_length(adapter) else None
    # Recording, the backward pass and the counting take about as long as five plain passes.
    seconds = 5 * forward_seconds(adapter, length) if budget.remaining() else math.inf
    if not budget.afford(seconds, "the peak of a training step was not measured"):
        return {}
    inputs = adapter.example_inputs(1, length)
    seed_streams(0, "forward")
    try:
        with torch.enable_grad(), Allocations(adapter.module, inputs.values()) as tracker:
            result = guarded(adapter, inputs, "", lambda: adapter.logits(inputs))
            if result.requires_grad:
                adapter.loss(result, adapter.random_labels(result)).backward()
            del result
    except ModelCrash:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A backward pass that raises is the business of gradient_flow.
        return {}
    adapter.module.zero_grad(set_to_none=True)
    return {"measured_peak": weights + tracker.peak, "measured_peak_length": length}


def _largest_batch(capacity: float, fixed: float, per_sample: float) -> int:
    """Return how many samples fit beside the fixed part."""
    return max(0, int((capacity - fixed) // max(per_sample, 1)))


def _activations_at_length(adapter: ModelAdapter, budget: Budget) -> tuple[int | None, int, str]:
    """Measure activations per sample; beyond what the budget allows, extend the exact quadratic in the length."""
    if not has_length(adapter):
        return None, saved_bytes(adapter, 2) - saved_bytes(adapter, 1), "measured"
    limit = adapter.max_length.value
    # A forward pass that records for autograd takes about twice as long as one that does not.
    reduced = list(budget.reduced)
    length = longest_length(adapter, budget, passes=2)
    if limit is None or length == limit or length < 64:
        return length, saved_bytes(adapter, 1, length), "measured"
    points = [adapter.legal_length(n) for n in (length // 4, length // 2, length)]
    if len(set(points)) < len(points):
        return length, saved_bytes(adapter, 1, length), "measured"
    sizes = [saved_bytes(adapter, 1, n) for n in points]
    budget.reduced[:] = reduced
    budget.reduced.append(f"activations measured at lengths {points}, extended by their quadratic to {limit}")
    return limit, int(_quadratic(points, sizes, limit)), f"measured at {points}, extended to {limit}"


def _quadratic(points: list[int], sizes: list[int], at: int) -> float:
    """Evaluate at one point the quadratic through three others."""
    total = 0.0
    for i, size in enumerate(sizes):
        factor = 1.0
        for j, point in enumerate(points):
            if i != j:
                factor *= (at - point) / (points[i] - point)
        total += size * factor
    return total


def saved_bytes(adapter: ModelAdapter, batch_size: int, length: int | None = None) -> int:
    """Return the bytes that one forward pass and loss keep for the backward pass, parameters and buffers excluded."""
    known = {t.untyped_storage()._cdata for t in (*adapter.module.parameters(), *adapter.module.buffers())}
    # A weak reference keeps a storage's identity from being reused after its memory is gone.
    counted: dict[int, StorageWeakRef] = {}
    total = 0

    def pack(tensor: Tensor) -> None:
        nonlocal total
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in known and reference.cdata not in counted:
            counted[reference.cdata] = reference
            total += storage.nbytes()

    def unpack(nothing: None) -> Tensor:
        raise RuntimeError("measured only")

    inputs = adapter.example_inputs(batch_size, length)
    seed_streams(0, "forward")
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = guarded(adapter, inputs, "", lambda: adapter.logits(inputs))
        loss = adapter.loss(result, adapter.random_labels(result))
        del result, loss
    return total
