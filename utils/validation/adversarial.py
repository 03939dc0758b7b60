"""How few changes flip the answer? A gradient-guided search over tokens or a signed step over pixels, with a control.

A search that finds nothing more than chance does says nothing about robustness, so both are run with the same number
of trials.
"""

from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Outcome, Skipped
from utils.validation.pictures import line_chart
from utils.validation.responses import (
    affordable_samples,
    answer_place,
    answers,
    classifies,
    content_of,
    gradient_of,
    held_fixed,
    repeated,
    sample_inputs,
    text_length,
    told_fixed,
    with_content,
)
from utils.validation.sensitivity import other_tokens

SUBSTITUTIONS = 3
CANDIDATES = 16
STEP_SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
LENGTH = 17


def check_adversarial(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Search for the smallest change that flips the top answer, beside random changes of the same size."""
    first = answers(adapter, sample_inputs(adapter, 1, text_length(adapter, LENGTH)))
    if not classifies(adapter, first):
        raise Skipped("the answer is not a choice among classes, so there is nothing to flip")
    length = text_length(adapter, LENGTH)
    return _steps(adapter, budget) if length is None else _tokens(adapter, budget, length)


def _tokens(adapter: ModelAdapter, budget: Budget, length: int) -> Outcome:
    """Search token substitutions (HotFlip: Ebrahimi et al., 2018, equation 2)."""
    count = affordable_samples(adapter, budget, passes=SUBSTITUTIONS * (2 * CANDIDATES + 3), wanted=8)
    guided, random = [], []
    for sample in range(count):
        inputs = sample_inputs(adapter, 1, length, seed=sample)
        guided.append(search_tokens(adapter, inputs, seed=sample))
        random.append(search_tokens(adapter, inputs, seed=sample, guided=False))
    curves = {
        "gradient-guided": torch.tensor(guided).mean(0).tolist(),
        "random": torch.tensor(random).mean(0).tolist(),
    }
    flips = {name: [sum(run[k] <= 0 for run in runs) for k in range(SUBSTITUTIONS + 1)]
             for name, runs in (("gradient-guided", guided), ("random", random))}  # fmt: skip
    details: dict[str, Any] = {
        "samples": count, "held_fixed": held_fixed(adapter, inputs),
        "margin_by_substitutions": curves, "flipped_by_substitutions": flips,
    }  # fmt: skip
    share = flips["gradient-guided"][SUBSTITUTIONS] / count
    control = flips["random"][SUBSTITUTIONS] / count
    why = (
        f"{SUBSTITUTIONS} chosen tokens flip {share:.0%} of answers, {SUBSTITUTIONS} random ones {control:.0%}"
        f"{told_fixed(adapter, inputs)}"
    )
    picture = line_chart(
        range(SUBSTITUTIONS + 1), curves, "margin of the first answer over the next", "tokens substituted",
        "Below zero the answer has flipped.",
    )  # fmt: skip
    return Outcome(share, None, why, (), details, [picture])


def search_tokens(adapter: ModelAdapter, inputs: dict[str, Tensor], seed: int = 0, guided: bool = True) -> list[float]:
    """Substitute tokens greedily so that the answer's margin shrinks.

    Args:
        adapter: The model.
        inputs: One sample.
        seed: Seed of the random candidates.
        guided: Whether the gradient proposes candidates; otherwise they are drawn at random.

    Returns:
        Margin of the original answer over the best other one after 0, 1, ... substitutions.
    """
    name, generator = adapter.main_input, torch.Generator().manual_seed(seed)
    ids = inputs[name].clone()
    target = int(answers(adapter, inputs)[0].argmax())

    def margins(rows: Tensor) -> Tensor:
        others = rows.clone()
        others[:, target] = float("-inf")
        return rows[:, target] - others.amax(-1)

    history = [float(margins(answers(adapter, inputs))[0])]
    # The token that the answer belongs to is the question itself; every other place may change.
    question = answer_place(adapter, ids.shape[1])
    places = [place for place in range(ids.shape[1]) if place != question] or [0]
    for _ in range(SUBSTITUTIONS):
        current = {**inputs, name: ids}
        proposals = _guided(adapter, current, margins, places) if guided else None
        if proposals is None:
            where = torch.tensor(places)[torch.randint(len(places), (CANDIDATES,), generator=generator)]
            what = other_tokens(adapter, ids.expand(CANDIDATES, -1), generator).cpu()[torch.arange(CANDIDATES), where]
            proposals = list(zip(where.tolist(), what.tolist(), strict=True))
        trials = ids.repeat(len(proposals), 1)
        for row, (place, token) in enumerate(proposals):
            trials[row, place] = token
        result = margins(answers(adapter, {**repeated(adapter, current, len(proposals)), name: trials}))
        best = int(result.argmin())
        if float(result[best]) < history[-1]:
            ids = trials[best : best + 1]
        history.append(min(history[-1], float(result[best])))
    return history


def _guided(
    adapter: ModelAdapter, inputs: dict[str, Tensor], margins: Any, places: list[int]
) -> list[tuple[int, int]] | None:
    """Return the substitutions that a linear expansion of the margin likes best; None without a table of tokens."""
    table = _table(adapter, inputs)
    if table is None:
        return None
    content = content_of(adapter, inputs).detach().requires_grad_()
    with torch.enable_grad():
        gradient = gradient_of(margins(with_content(adapter, inputs, content)).sum(), content)
    slope = gradient[0, places].float()
    size = adapter.readable_ids()
    gain = slope @ table[:size].float().T - (slope * content[0, places].detach().float()).sum(-1, keepdim=True)
    present = inputs[adapter.main_input][0, places]
    gain[torch.arange(len(places), device=gain.device), present] = float("inf")
    if (padding := adapter.pad_token_id.value) is not None and padding < size:
        gain[:, padding] = float("inf")
    best = gain.flatten().topk(min(CANDIDATES, gain.numel()), largest=False).indices.tolist()
    return [(places[index // size], index % size) for index in best]


def _table(adapter: ModelAdapter, inputs: dict[str, Tensor]) -> Tensor | None:
    """Return the weights of the table whose rows the content is, if it is one without further arithmetic."""
    content, ids = content_of(adapter, inputs), inputs[adapter.main_input]
    for child in adapter.module.modules():
        if isinstance(child, nn.Embedding) and child.weight.shape[0] >= adapter.readable_ids():
            weight = child.weight.detach()
            if weight.shape[1] == content.shape[-1] and torch.equal(weight[ids], content):
                return weight
    return None


def _steps(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Take one signed gradient step of growing size (Goodfellow et al., 2015), beside random signs."""
    count = affordable_samples(adapter, budget, passes=2 * len(STEP_SIZES) + 3)
    inputs = sample_inputs(adapter, count)
    content = content_of(adapter, inputs).detach()
    generator = torch.Generator().manual_seed(0)
    point = content.clone().requires_grad_()
    with torch.enable_grad():
        rows = with_content(adapter, inputs, point)
        top = rows.argmax(-1)
        loss = nn.functional.cross_entropy(rows, top, reduction="sum")
        gradient = gradient_of(loss, point)
    signs = {
        "gradient": gradient.sign(),
        "random": (torch.rand(content.shape, generator=generator) < 0.5).to(content) * 2 - 1,
    }
    scale = content.float().std()
    curves: dict[str, list[float]] = {}
    for name, sign in signs.items():
        curves[name] = []
        for size in STEP_SIZES:
            with torch.no_grad():
                changed = with_content(adapter, inputs, content + size * scale * sign).argmax(-1)
            curves[name].append(float((changed != top).float().mean()))
    details = {
        "samples": count, "held_fixed": held_fixed(adapter, inputs),
        "step_sizes": list(STEP_SIZES), "flipped": curves,
    }  # fmt: skip
    what = "input's" if inputs[adapter.main_input].is_floating_point() else "embeddings'"
    why = (
        f"a step of {STEP_SIZES[2]:.0%} of the {what} spread flips {curves['gradient'][2]:.0%} of answers, "
        f"a random one {curves['random'][2]:.0%}{told_fixed(adapter, inputs)}"
    )
    picture = line_chart(STEP_SIZES, curves, "share of flipped answers by size of the step", f"step / {what} spread")
    return Outcome(curves["gradient"][2], None, why, (), details, [picture])
