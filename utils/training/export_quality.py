"""What an exported model is worth on held-out data, beside the original."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from utils.adapters import ModelAdapter
from utils.training.evaluation import evaluate
from utils.training.prepared_data import PreparedData

WINDOWS = 64
"""Held-out samples that are measured, at most."""
BATCH = 4


def held_out_quality(
    adapter: ModelAdapter,
    data: PreparedData,
    run: Callable[[Mapping[str, Any]], Tensor] | None = None,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Measure the first held-out samples.

    Args:
        adapter: The original model, in eval mode on the CPU.
        data: The run's data.
        run: The exported model; None measures the original.
        names: The exported model's inputs in its order.

    Returns:
        ``samples``, ``loss``, ``perplexity`` for causal language models, and what else the task is measured by.
    """
    few = min(WINDOWS, data.validation_samples)
    # Exported files take no positions, so the original is measured without them too.
    facts = {name: value for name, value in data.facts.items() if name != "positions_argument"}
    part = replace(data, validation={name: value[:few] for name, value in data.validation.items()}, facts=facts)
    answering = adapter
    if run is not None:
        answering = copy.copy(adapter)
        answer = run
        # What is measured must be the file and nothing else, with the inputs that it was exported with.
        answering.logits = lambda inputs: answer({name: inputs[name] for name in names})  # type: ignore[method-assign]
    measured = evaluate(answering, part, BATCH)
    # Over a part of the held-out text there are no bits per byte: the bytes of that part are not known.
    measured.pop("bits_per_byte", None)
    if data.task == "causal_lm":
        measured["perplexity"] = math.exp(min(measured["loss"], 700.0))
    return {"samples": float(few), **measured}
