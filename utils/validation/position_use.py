"""How far back does the model look? The influence of a token on the answer as a function of its distance."""

import numpy as np
import torch

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Outcome, Skipped
from utils.validation.pictures import line_chart
from utils.validation.responses import (
    affordable_samples,
    answer_place,
    answers,
    distance,
    held_fixed,
    sample_inputs,
    text_length,
    told_fixed,
)
from utils.validation.sensitivity import other_tokens
from utils.validation.statistics import mean_interval

LENGTH = 64
DISTANCES = 16


def check_position_use(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Replace the token at each of several distances before the answer and measure how far the answer moves."""
    length = text_length(adapter, LENGTH)
    if length is None or length < 3:
        raise Skipped("no sequence of tokens with a place for the answer")
    place = answer_place(adapter, length)
    if place is None:
        raise Skipped("the answer has no place in the text, so no token has a distance to it")
    reach = np.unique(np.geomspace(1, place, min(DISTANCES, place)).round().astype(int))
    count = affordable_samples(adapter, budget, passes=(len(reach) + 1) * length / (text_length(adapter) or length))
    inputs = sample_inputs(adapter, count, length)
    ids, generator = inputs[adapter.main_input], torch.Generator().manual_seed(0)
    base = answers(adapter, inputs)
    means, lows, highs = [], [], []
    for steps in reach:
        changed = ids.clone()
        changed[:, place - steps] = other_tokens(adapter, ids, generator)[:, place - steps]
        moved = distance(adapter, base, answers(adapter, {**inputs, adapter.main_input: changed}))
        interval = mean_interval(moved.double().cpu().numpy())
        means.append(interval.mean)
        lows.append(interval.low)
        highs.append(interval.high)
    # Distances are spaced geometrically, so what lies between is read off the line through them.
    shares = np.cumsum(np.interp(np.arange(1, place + 1), reach, means))
    half = int(np.searchsorted(shares, shares[-1] / 2)) + 1 if shares[-1] > 0 else None
    details = {
        "samples": count, "length": length, "distance": reach.tolist(), "influence": means,
        "low": lows, "high": highs, "half_within": half, "held_fixed": held_fixed(adapter, inputs),
    }  # fmt: skip
    why = (
        f"half of the influence comes from the nearest {half} of {place} tokens before the answer"
        if half is not None
        else "no token before the answer has any influence on it"
    ) + told_fixed(adapter, inputs)
    picture = line_chart(
        reach.tolist(), {"mean": means, "95% low": lows, "95% high": highs}, "influence by distance", "tokens back"
    )
    return Outcome(half, None, why, (), details, [picture])
