"""Are outputs and loss finite, for ordinary and for extreme input, short and long?"""

from typing import Any

import torch
from torch import Tensor

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Finding, Outcome
from utils.validation.gradient_reach import training_inputs
from utils.validation.probing import (
    ModelCrash,
    content_input,
    first_nonfinite,
    forward_seconds,
    has_length,
    logits,
    longest_length,
    with_steps,
)
from utils.validation.reproduction import opening

HINT = "Look there for a division by zero, log or sqrt of zero, exp of large numbers, softmax over fully masked rows."
LONG_SECONDS = 1.5
"""Time for one long sequence; a large model gets a shorter one."""
LONG_HINT = (
    "It fails only for long input: look at decays, powers and sums over positions, and at the tail of position tables."
)


def check_numerical_stability(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Run random, constant and extreme inputs at short and at maximum length and require finite logits and loss.

    Codes: ``nan_output``; ``nan_long_sequence`` when only long input is affected.
    """
    short = training_inputs(adapter)[adapter.main_input].shape[1] if has_length(adapter) else None
    cases = list(_cases(adapter, 2, short, "length " + str(short) if short else "batch size 2"))
    if short is not None:
        one = adapter.legal_length(1)
        cases.append((f"random tokens, length {one}", adapter.example_inputs(2, one)))
    tried: list[dict[str, Any]] = []
    for situation, inputs in cases:
        if problem := _problem(adapter, inputs, situation, tried):
            return _outcome(adapter, inputs, "nan_output", problem, HINT, tried)
    if short is not None:
        allowed = Budget(min(LONG_SECONDS, budget.remaining()))
        longest = longest_length(adapter, allowed, passes=1)
        budget.reduced += allowed.reduced
        steps = [longest] if longest > 512 else [adapter.legal_length(n) for n in (64, 256, longest) if n <= longest]
        steps = sorted({n for n in steps if n > short})
        for length in steps:
            inputs = adapter.example_inputs(1, length)
            if problem := _problem(adapter, inputs, f"random tokens, length {length}", tried):
                return _outcome(adapter, inputs, "nan_long_sequence", problem, LONG_HINT, tried)
    for situation, inputs in _long_series(adapter, budget) if short is None else ():
        if problem := _problem(adapter, inputs, situation, tried):
            return _outcome(adapter, inputs, "nan_long_sequence", problem, LONG_HINT, tried)
    largest = max(entry["largest"] for entry in tried)
    return Outcome(
        largest, "finite", f"logits and loss are finite for {len(tried)} kinds of input", (), {"tried": tried}
    )


def _cases(
    adapter: ModelAdapter, batch_size: int, length: int | None, size: str
) -> list[tuple[str, dict[str, Tensor]]]:
    """Return inputs of one size: random, constant, extreme."""
    random = adapter.example_inputs(batch_size, length)
    names = {adapter.main_input, content_input(adapter)} if adapter.modality == "tokens" else {adapter.main_input}

    def filled(value: float | dict[str, int]) -> dict[str, Tensor]:
        chosen = value if isinstance(value, dict) else dict.fromkeys(names, value)
        return {key: torch.full_like(item, chosen[key]) if key in names else item for key, item in random.items()}

    if adapter.modality == "tokens":
        # Each input has a table of its own, and two languages have two vocabularies.
        last = {name: adapter.readable_ids(name) - 1 for name in names}
        middle = {name: top // 2 for name, top in last.items()}
        return [
            (f"random tokens, {size}", random),
            (f"one token repeated, {size}", filled(middle)),
            (f"the last id repeated, {size}", filled(last)),
        ]
    if not random[adapter.main_input].is_floating_point():
        # Columns of whole numbers have ranges of their own, and only the example's are known.
        return [(f"rows of the example, {size}", random)]
    if adapter.modality == "image":
        return [(f"noise, {size}", random), (f"black, {size}", filled(0.0)), (f"white, {size}", filled(1.0))]
    return [(f"noise, {size}", random), (f"zeros, {size}", filled(0.0)), (f"all 3, {size}", filled(3.0))]


def _long_series(adapter: ModelAdapter, budget: Budget) -> list[tuple[str, dict[str, Tensor]]]:
    """Return a series of real numbers as long as somebody stated that one may be; none where no such length runs."""
    inputs = adapter.example_inputs(1)
    main, longest = inputs[adapter.main_input], adapter.max_length.value
    if longest is None or main.dim() != 3 or not main.is_floating_point() or not adapter.batched:
        return []
    for axis in (2, 1):
        steps = main.shape[axis]
        growth = max(1.0, longest / steps) ** 2
        cost = forward_seconds(adapter, None, 1) * growth
        if longest <= steps or not budget.afford(cost, f"series of {longest} steps were not tried"):
            continue
        series = with_steps(adapter, inputs, axis, longest)
        try:
            logits(adapter, series)
        except ModelCrash:
            # The axis is that of the channels.
            continue
        return [(f"a series of {longest} steps", series)]
    return []


def _problem(
    adapter: ModelAdapter, inputs: dict[str, Tensor], situation: str, tried: list[dict[str, Any]]
) -> str | None:
    """Run one input and describe what is not finite."""
    result = logits(adapter, inputs, situation, whole=True)
    if not result.is_floating_point():
        result = result.float()
    low, high = (float(value) for value in torch.aminmax(result)) if result.numel() else (0.0, 0.0)
    entry: dict[str, Any] = {"input": situation, "largest": max(abs(low), abs(high))}
    tried.append(entry)
    if low == float("-inf") and high < float("inf"):
        # Minus infinity in the same columns everywhere switches ids off on purpose; anywhere else it is a fault.
        rows = (result == float("-inf")).reshape(-1, result.shape[-1])
        if bool((rows.all(0) == rows.any(0)).all()) and not bool(rows.all()):
            entry["largest"] = float(result[torch.isfinite(result)].abs().max())
            return None
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        bad = int((~torch.isfinite(result)).sum())
        return f"{bad:,} of {result.numel():,} logits are not finite for {situation}"
    labels = adapter.random_labels(result)
    loss = float(adapter.loss(result, labels))
    entry["loss"] = loss
    if not abs(loss) < float("inf"):
        return f"the loss is {loss} for {situation}"
    return None


def _outcome(
    adapter: ModelAdapter, inputs: dict[str, Tensor], code: str, problem: str, hint: str, tried: list[dict[str, Any]]
) -> Outcome:
    """Describe output that is not finite by the module it starts in."""
    lines = _reproduction(adapter, inputs)
    finding = Finding(code, "fail", first_nonfinite(adapter, inputs), problem, hint, lines)
    return Outcome("not finite", "finite", "", [finding], {"tried": tried})


def _reproduction(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> str:
    """Return lines that make inputs like these and look at the logits."""
    main = inputs[adapter.main_input]
    length = main.shape[1] if has_length(adapter) else None
    filled = [
        f"x[{name!r}].fill_({value.flatten()[0].item()}); "
        for name, value in inputs.items()
        if name in (adapter.main_input, content_input(adapter)) and value.unique().numel() == 1
    ]
    example = adapter.example_inputs(1)[adapter.main_input]
    if length is None and main.shape[1:] != example.shape[1:]:
        axis = next(axis for axis in (1, 2) if main.shape[axis] != example.shape[axis])
        steps = f"x = with_steps(a, x, {axis}, {main.shape[axis]})"
        filled.append(f"from utils.validation.probing import with_steps; {steps}; ")
    finite = "y = a.logits(x); print(y.isfinite().all(), a.loss(y, a.random_labels(y)))"
    return f"{opening(adapter, length, main.shape[0])}\n{''.join(filled)}{finite}"
