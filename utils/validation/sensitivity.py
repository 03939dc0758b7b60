"""How much does the answer move when the input does? Substitution, noise and order, each with a confidence interval.

Distances are total variation between predicted distributions (0 to 1), or relative distances where there are no
classes. What is read by degrees is shifted by noise; whole numbers are replaced by others that are legal.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Outcome, Skipped
from utils.validation.pictures import Picture, line_chart
from utils.validation.responses import (
    affordable_samples,
    answer_place,
    answers,
    content_of,
    distance,
    held_fixed,
    sample_inputs,
    text_length,
    told_fixed,
    with_content,
)
from utils.validation.statistics import Interval, mean_interval

NOISE_LEVELS = (0.01, 0.03, 0.1, 0.3)
REPEATS = 4


def other_tokens(adapter: ModelAdapter, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each token a random other one that is legal and not padding."""
    size, padding = adapter.readable_ids(), adapter.pad_token_id.value
    step = torch.randint(1, max(2, size), ids.shape, generator=generator).to(ids.device)
    other = (ids + step) % size
    if padding is not None and size > 2:
        other = torch.where(other == padding, (other + 1) % size, other)
        other = torch.where(other == ids, (other + 1) % size, other)
    return other


def other_values(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each whole number of a table another one that its column has; the same one where it has no other."""
    columns = values.reshape(len(values), -1).cpu()
    drawn = []
    for column in columns.unbind(1):
        seen = column.unique()
        step = torch.randint(1, max(2, len(seen)), column.shape, generator=generator)
        drawn.append(seen[(torch.searchsorted(seen, column.contiguous()) + step) % len(seen)])
    return torch.stack(drawn, 1).view_as(values).to(values.device)


def check_sensitivity(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Measure the mean distance between answers before and after small changes of the input."""
    count = affordable_samples(adapter, budget, passes=REPEATS * (len(NOISE_LEVELS) + 3) + 2)
    inputs = sample_inputs(adapter, count)
    base = answers(adapter, inputs)
    generator = torch.Generator().manual_seed(0)

    def measured(change: Callable[[], Tensor]) -> Interval:
        # Repeats of one sample are not independent: each sample counts once, with its mean.
        with torch.no_grad():
            moved = torch.stack([distance(adapter, base, change()) for _ in range(REPEATS)]).mean(0)
        return mean_interval(moved.double().cpu().numpy())

    found: dict[str, Interval] = {}
    whole = not inputs[adapter.main_input].is_floating_point()
    without_noise = ""
    try:
        found |= _noise(adapter, inputs, measured, generator)
    except Skipped as reason:
        # Only whole numbers can lack content that moves by degrees, and these can be replaced.
        without_noise = str(reason)
    levels = list(found.values())
    if whole:
        found |= _replacements(adapter, inputs, measured, generator)
    if text_length(adapter) is not None:
        found |= _reorderings(adapter, inputs, measured, generator)
    details = {
        "samples": count,
        "held_fixed": held_fixed(adapter, inputs),
        **({"without_noise": without_noise} if without_noise else {}),
        **{name: {"mean": i.mean, "low": i.low, "high": i.high} for name, i in found.items()},
    }
    shown = ", ".join(f"{name} {interval.mean:.2g}" for name, interval in list(found.items())[-3:])
    why = f"mean distance of the answer: {shown}" + (f"; no noise: {without_noise}" if without_noise else "")
    value = found.get(_replaced_name(adapter), levels[2] if levels else None)
    assert value is not None
    pictures = [_picture(levels)] if levels else []
    return Outcome(value.mean, None, f"{why}{told_fixed(adapter, inputs)}", (), details, pictures)


def _picture(levels: list[Interval]) -> Picture:
    """Draw distances by the level of the noise."""
    series = {
        "mean": [i.mean for i in levels],
        "95% low": [i.low for i in levels],
        "95% high": [i.high for i in levels],
    }
    return line_chart(
        NOISE_LEVELS, series, "distance of the answer by noise on the content", "noise relative to the content's spread"
    )


def _noise(
    adapter: ModelAdapter,
    inputs: dict[str, Tensor],
    measured: Callable[[Callable[[], Tensor]], Interval],
    generator: torch.Generator,
) -> dict[str, Interval]:
    """Measure noise of several levels on the content."""
    content = content_of(adapter, inputs)
    scale = content.float().std() if content.numel() > 1 else content.float().abs().max()
    found = {}
    for level in NOISE_LEVELS:

        def noisy(level: float = level) -> Tensor:
            noise = torch.randn(content.shape, generator=generator).to(content)
            return with_content(adapter, inputs, content + level * scale * noise)

        found[f"noise of {level:.0%}"] = measured(noisy)
    return found


def _replaced_name(adapter: ModelAdapter) -> str:
    """Return what the replacement of one whole number is called."""
    return "one token" if adapter.modality == "tokens" else "one value"


def _replacements(
    adapter: ModelAdapter,
    inputs: dict[str, Tensor],
    measured: Callable[[Callable[[], Tensor]], Interval],
    generator: torch.Generator,
) -> dict[str, Interval]:
    """Measure one whole number of each sample replaced by another: a token, or a value of a table's column."""
    name = adapter.main_input
    ids = inputs[name]
    rows = torch.arange(len(ids), device=ids.device)

    def replaced() -> Tensor:
        other = (
            other_tokens(adapter, ids, generator) if adapter.modality == "tokens" else other_values(ids, generator)
        ).reshape(len(ids), -1)
        changed = ids.reshape(len(ids), -1).clone()
        place = torch.randint(changed.shape[1], (len(ids),), generator=generator).to(ids.device)
        changed[rows, place] = other[rows, place]
        return answers(adapter, {**inputs, name: changed.view_as(ids)})

    return {_replaced_name(adapter): measured(replaced)}


def _reorderings(
    adapter: ModelAdapter,
    inputs: dict[str, Tensor],
    measured: Callable[[Callable[[], Tensor]], Interval],
    generator: torch.Generator,
) -> dict[str, Interval]:
    """Measure two neighbours swapped and all tokens shuffled, but for the one that the answer belongs to."""
    name = adapter.main_input
    ids = inputs[name]
    rows, length = torch.arange(len(ids), device=ids.device), ids.shape[1]
    place = answer_place(adapter, length)
    movable = torch.tensor([i for i in range(length) if i != place], device=ids.device)
    pairs = torch.tensor([i for i in range(length - 1) if place not in (i, i + 1)], device=ids.device)

    def swapped() -> Tensor:
        first = pairs[torch.randint(len(pairs), (len(ids),), generator=generator).to(ids.device)]
        changed = ids.clone()
        changed[rows, first], changed[rows, first + 1] = ids[rows, first + 1], ids[rows, first]
        return answers(adapter, {**inputs, name: changed})

    def shuffled() -> Tensor:
        order = torch.argsort(torch.rand(len(ids), len(movable), generator=generator), dim=1).to(ids.device)
        changed = ids.clone()
        changed[:, movable] = ids[:, movable].gather(1, order)
        return answers(adapter, {**inputs, name: changed})

    return {"neighbours swapped": measured(swapped), "order shuffled": measured(shuffled)} if len(pairs) else {}
