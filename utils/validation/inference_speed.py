"""How fast is a forward pass, and does Python loop over positions or samples?

The loop is found by counting operators, not by timing: an operator count that grows with the length or the batch is
the same on every machine.
"""

import statistics
import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.resources import device_name
from utils.validation.check import Budget, Finding, Outcome
from utils.validation.probing import has_length, logits

TIMED_LENGTH = 128
FEWEST_REPEATS, MOST_REPEATS, USEFUL_SECONDS = 3, 30, 1.0
COUNTED_LENGTHS = (8, 24)
COUNTED_BATCHES = (2, 6)
PER_STEP = 2
"""Operators per further position or sample from which on a loop is assumed."""


class OperatorCount(TorchFunctionMode):
    """Counts the torch functions that Python calls inside the block.

    Below that level a fused LSTM kernel would look like a loop, because it is taken apart into steps there.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one call and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def check_inference_speed(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Time repeated forward passes of one sample, and count operators at two lengths and two batch sizes.

    Code: ``slow_python_loop`` (warn).
    """
    sequence = has_length(adapter)
    length = adapter.legal_length(min(TIMED_LENGTH, adapter.max_length.value or TIMED_LENGTH)) if sequence else None
    counts = _count_operators(adapter, sequence)
    inputs = adapter.example_inputs(1, length)
    logits(adapter, inputs)
    times: list[float] = []
    while len(times) < FEWEST_REPEATS or (
        len(times) < MOST_REPEATS and sum(times) < min(USEFUL_SECONDS, budget.remaining())
    ):
        started = time.perf_counter()
        logits(adapter, inputs)
        if adapter.device.type == "cuda":
            torch.cuda.synchronize(adapter.device)
        times.append(time.perf_counter() - started)
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    rate = (length or 1) / median
    unit = "tokens" if length else "samples"
    details = {
        "median_seconds": median, "iqr_seconds": high - low, "repeats": len(times), f"{unit}_per_second": rate,
        "length": length, "batch_size": 1, "device": device_name(adapter.device), "operators": counts,
    }  # fmt: skip
    findings = _loops(adapter, counts)
    why = f"{rate:,.0f} {unit} per second ({median * 1000:.1f} ms, interquartile range {(high - low) * 1000:.1f} ms)"
    return Outcome(rate, None, why, findings, details)


def _count_operators(adapter: ModelAdapter, sequence: bool) -> dict[str, int]:
    """Count the operators of forward passes that differ in batch size and, for sequences, in length."""
    longest = adapter.max_length.value or COUNTED_LENGTHS[1]
    short, long = (adapter.legal_length(min(n, longest)) for n in COUNTED_LENGTHS)
    sizes = [(COUNTED_BATCHES[0], short if sequence else None), (COUNTED_BATCHES[1], short if sequence else None)]
    if sequence and long > short:
        sizes.append((COUNTED_BATCHES[0], long))
    counts = {}
    for batch_size, length in sizes:
        inputs = adapter.example_inputs(batch_size, length)
        logits(adapter, inputs)
        with OperatorCount() as counter:
            logits(adapter, inputs)
        counts[f"batch {batch_size}" + (f", length {length}" if length else "")] = counter.count
    return counts


def _loops(adapter: ModelAdapter, counts: dict[str, int]) -> list[Finding]:
    """Judge how operator counts grow."""
    names = list(counts)
    findings = []
    for index, what, growth in ((1, "sample", COUNTED_BATCHES), (2, "position", COUNTED_LENGTHS)):
        if index >= len(names):
            continue
        first, second = counts[names[0]], counts[names[index]]
        steps = growth[1] - growth[0]
        if index == 2:
            low, high = (int(names[i].rsplit(" ", 1)[1]) for i in (0, 2))
            steps = high - low
        per_step = (second - first) / steps
        if per_step >= PER_STEP and second > 1.3 * first:
            message = f"{first} operators at {names[0]}, {second} at {names[index]}: {per_step:.0f} more per {what}"
            hint = f"Work on whole tensors instead of looping over {what}s in Python, where the recurrence allows it."
            findings.append(Finding("slow_python_loop", "warn", adapter.name, message, hint))
    return findings
