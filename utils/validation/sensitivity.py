"""How much does the answer move when the input does? Substitution, noise and order, each with a confidence interval.

Distances are total variation between predicted distributions (0 to 1), or relative distances where there are no
classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Outcome
from utils.validation.pictures import Picture, line_chart
from utils.validation.responses import (
    affordable_samples,
    answers,
    content_of,
    distance,
    sample_inputs,
    text_length,
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
    content = content_of(adapter, inputs)
    scale = content.float().std()
    for level in NOISE_LEVELS:

        def noisy(level: float = level) -> Tensor:
            noise = torch.randn(content.shape, generator=generator).to(content)
            return with_content(adapter, inputs, content + level * scale * noise)

        found[f"noise of {level:.0%}"] = measured(noisy)
    if text_length(adapter) is not None:
        found |= _text_changes(adapter, inputs, measured, generator)
    details = {
        "samples": count,
        **{name: {"mean": i.mean, "low": i.low, "high": i.high} for name, i in found.items()},
    }
    shown = ", ".join(f"{name} {interval.mean:.2g}" for name, interval in list(found.items())[-3:])
    levels = [found[f"noise of {level:.0%}"] for level in NOISE_LEVELS]
    series = {
        "mean": [i.mean for i in levels],
        "95% low": [i.low for i in levels],
        "95% high": [i.high for i in levels],
    }
    picture: Picture = line_chart(
        NOISE_LEVELS, series, "distance of the answer by noise on the content", "noise relative to the content's spread"
    )
    value = found.get("one token", levels[2])
    return Outcome(value.mean, None, f"mean distance of the answer: {shown}", (), details, [picture])


def _text_changes(
    adapter: ModelAdapter,
    inputs: dict[str, Tensor],
    measured: Callable[[Callable[[], Tensor]], Interval],
    generator: torch.Generator,
) -> dict[str, Interval]:
    """Measure one token replaced, two neighbours swapped, and all but the last token shuffled."""
    name = adapter.main_input
    ids = inputs[name]
    rows, length = torch.arange(len(ids), device=ids.device), ids.shape[1]

    def replaced() -> Tensor:
        place = torch.randint(length, (len(ids),), generator=generator).to(ids.device)
        changed = ids.clone()
        changed[rows, place] = other_tokens(adapter, ids, generator)[rows, place]
        return answers(adapter, {**inputs, name: changed})

    def swapped() -> Tensor:
        place = torch.randint(max(1, length - 2), (len(ids),), generator=generator).to(ids.device)
        changed = ids.clone()
        changed[rows, place], changed[rows, place + 1] = ids[rows, place + 1], ids[rows, place]
        return answers(adapter, {**inputs, name: changed})

    def shuffled() -> Tensor:
        order = torch.argsort(torch.rand(len(ids), length - 1, generator=generator), dim=1).to(ids.device)
        changed = torch.cat([ids[:, :-1].gather(1, order), ids[:, -1:]], dim=1)
        return answers(adapter, {**inputs, name: changed})

    found = {"one token": measured(replaced)}
    if length > 2:
        found["neighbours swapped"] = measured(swapped)
        found["order shuffled"] = measured(shuffled)
    return found
