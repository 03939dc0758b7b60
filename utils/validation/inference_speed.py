"""How fast is a forward pass, and does Python loop over positions or samples?

The loop is found by counting operators, not by timing; see `utils.validation.python_loops`.
"""

import statistics
import time

import torch

from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.resources import device_name
from utils.validation.check import Budget, Outcome
from utils.validation.probing import has_length, logits
from utils.validation.python_loops import find_loops

TIMED_LENGTH = 64
FEWEST_REPEATS, MOST_REPEATS, USEFUL_SECONDS = 3, 30, 1.0
LEAST_REPEATS = 2
"""Where there is no time left."""


def check_inference_speed(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Time repeated forward passes of one sample, and count operators at two lengths and two batch sizes.

    Code: ``slow_python_loop`` (warn).
    """
    sequence = has_length(adapter)
    length = adapter.legal_length(min(TIMED_LENGTH, adapter.max_length.value or TIMED_LENGTH)) if sequence else None
    findings, counts = find_loops(adapter, sequence)
    inputs = adapter.example_inputs(1, length)
    fewest = LEAST_REPEATS
    if budget.afford(USEFUL_SECONDS / 4, f"{LEAST_REPEATS} timed passes, the first of this size among them"):
        fewest = FEWEST_REPEATS
        logits(adapter, inputs)
    times: list[float] = []
    while len(times) < fewest or (len(times) < MOST_REPEATS and sum(times) < min(USEFUL_SECONDS, budget.remaining())):
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
    why = f"{rate:,.0f} {unit} per second ({median * 1000:.1f} ms, interquartile range {(high - low) * 1000:.1f} ms)"
    return Outcome(rate, None, why, findings, details)
