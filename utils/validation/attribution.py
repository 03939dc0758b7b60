"""Which part of the input made the answer? Integrated gradients with their own error, and a second opinion beside them.

Attributions of a path must add up to the change of the output between its ends (completeness); what is missing
measures how far they can be trusted. Occlusion, which needs no gradient, is computed on the same parts, and the
agreement of both is reported. Contributions are trusted when they add up and occlusion ranks the parts alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.check import Budget, Outcome
from utils.validation.pictures import Picture, heat_map, line_chart, token_strip
from utils.validation.probing import forward_seconds
from utils.validation.responses import (
    answers,
    content_of,
    gradient_of,
    held_fixed,
    repeated,
    sample_inputs,
    text_length,
    told_fixed,
    with_content,
)
from utils.validation.statistics import rank_correlation

STEPS = (16, 64, 256)
ENOUGH = 0.02
CHUNK_ELEMENTS = 20e6
GRID = 8
PARTS = 256
"""Most parts of an input without tokens or pixels; a longer one, such as a wave, is cut into so many runs."""
LENGTH = 17
ADDS_UP, AGREES = 0.05, 0.5
"""Largest completeness error, and least rank correlation with occlusion, of contributions that can be trusted."""


@dataclass(frozen=True)
class Attribution:
    """How much each part of one sample's content contributed to one score."""

    values: Tensor
    """Contributions, in the shape of one sample's content; tokens and images keep the feature or channel axis."""
    target: int
    """Index of the explained score."""
    change: float
    """Score of the sample minus score of empty content, which the contributions should add up to."""
    gap: float
    """What they miss of it."""
    steps: int
    """Points on the path."""

    @property
    def error(self) -> float:
        """The gap as a share of what was to be explained, ``|gap| / |change|``."""
        return abs(self.gap) / max(abs(self.change), 1e-12)


def integrated_gradients(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], target: int | None = None, budget: Budget | None = None
) -> Attribution:
    """Attribute one score to the content of one sample (Sundararajan, Taly and Yan, 2017, equation 1).

    The path runs from empty content (zero embeddings, black images, zero features) to the sample; the integral is
    taken by Gauss-Legendre quadrature with 16 points, and 64 and 256 where the contributions do not add up yet.

    Args:
        adapter: The model, in eval mode.
        inputs: One sample.
        target: Index of the score; the largest by default.
        budget: Time to spend; the first 16 points are always run.

    Raises:
        Skipped: Token ids that no embedding table reads.
    """
    content = content_of(adapter, inputs)
    with torch.no_grad():
        full = with_content(adapter, inputs, content)
        empty = with_content(adapter, inputs, torch.zeros_like(content))
    chosen = int(full[0].argmax()) if target is None else target
    change = float(full[0, chosen] - empty[0, chosen])
    spent = 0.0
    found: Attribution | None = None
    for steps in STEPS:
        if found is not None and budget is not None and spent * steps / found.steps > budget.remaining():
            budget.reduced.append(f"{found.steps} points on the path; {steps} would be more exact")
            break
        before = budget.spent() if budget else 0.0
        values = _integral(adapter, inputs, content, chosen, steps)
        spent = budget.spent() - before if budget else 0.0
        found = Attribution(values, chosen, change, change - float(values.sum()), steps)
        if found.error < ENOUGH:
            break
    assert found is not None
    return found


def _one(adapter: ModelAdapter, content: Tensor) -> Tensor:
    """Return the content of the first sample; all of it where there is no axis of samples."""
    return content[0] if adapter.batched else content


def _scores(adapter: ModelAdapter, inputs: Mapping[str, Tensor], points: Tensor, target: int) -> Tensor:
    """Return the first sample's score for each of several contents ``(points, ...)`` in its place."""
    if adapter.batched:
        return with_content(adapter, repeated(adapter, inputs, len(points)), points)[:, target]
    # Without an axis of samples there is no room for several points in one pass.
    return torch.stack([with_content(adapter, inputs, point)[0, target] for point in points])


def _integral(adapter: ModelAdapter, inputs: Mapping[str, Tensor], content: Tensor, target: int, steps: int) -> Tensor:
    """Return the path integral of the gradient times the content."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    one = _one(adapter, content)
    shares = torch.as_tensor((nodes + 1) / 2, dtype=one.dtype, device=one.device)
    parts = torch.as_tensor(weights / 2, dtype=torch.float64)
    total = torch.zeros(one.shape, dtype=torch.float64)
    width = (adapter.vocab_size.value or 1) * (one.shape[0] if one.dim() == 2 else 1)
    chunk = max(1, min(steps, int(CHUNK_ELEMENTS / max(width, one.numel()))))
    for start in range(0, steps, chunk):
        share = shares[start : start + chunk].view(-1, *[1] * one.dim())
        point = (share * one).detach().requires_grad_()
        gradient = gradient_of(_scores(adapter, inputs, point, target).sum(), point)
        weighted = gradient.double().cpu() * parts[start : start + chunk].view(-1, *[1] * one.dim())
        total += weighted.sum(0) * one.double().cpu()
    return total


@torch.no_grad()
def occlusion(adapter: ModelAdapter, inputs: Mapping[str, Tensor], target: int) -> Tensor:
    """Return how much the score falls when one part of the content is emptied; see `part_numbers`."""
    content = _one(adapter, content_of(adapter, inputs))
    numbers = part_numbers(adapter, inputs, content).to(content.device)
    base = _scores(adapter, inputs, content[None], target)
    parts = torch.arange(int(numbers.max()) + 1, device=content.device)
    falls = []
    for some in parts.split(32):
        emptied = content * (numbers != some.view(-1, *[1] * content.dim()))
        falls.append(base - _scores(adapter, inputs, emptied, target))
    return torch.cat(falls).double().cpu()


def part_numbers(adapter: ModelAdapter, inputs: Mapping[str, Tensor], content: Tensor) -> Tensor:
    """Number the parts of one sample's content, in a shape that broadcasts against it.

    Parts are tokens, an image's tiles, features, or the numbers in an embedding where the sample is one id. More than
    `PARTS` features, or vectors of a sequence, are taken in runs.

    Args:
        adapter: The model.
        inputs: The batch that the content is from.
        content: The content without an axis of samples.
    """
    main, shape = inputs[adapter.main_input], content.shape
    if not main.is_floating_point() and main.dim() > 1:
        return torch.arange(main[0].numel()).view(*main.shape[1:], 1)
    if adapter.modality == "image" and len(shape) == 3:
        rows, columns = (torch.arange(size) * min(GRID, size) // size for size in shape[1:])
        return rows[:, None] * min(GRID, shape[2]) + columns
    size = shape[0] if shape else 1
    return (torch.arange(size) * min(PARTS, size) // size).view(-1, *[1] * (len(shape) - 1))


def check_attribution(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Explain the top score of one sample by integrated gradients, and hold occlusion beside it."""
    inputs = sample_inputs(adapter, 1, text_length(adapter, LENGTH))
    with torch.enable_grad():
        found = integrated_gradients(adapter, inputs, budget=budget)
    numbers = part_numbers(adapter, inputs, found.values)
    parts = int(numbers.max()) + 1
    per_part = torch.zeros(parts, dtype=torch.float64)
    per_part.index_add_(0, numbers.expand(found.values.shape).reshape(-1), found.values.reshape(-1))
    agreement, occluded = None, False
    falls = torch.full_like(per_part, float("nan"))
    if parts * forward_seconds(adapter, text_length(adapter, LENGTH)) <= max(2.0, budget.remaining()):
        falls, occluded = occlusion(adapter, inputs, found.target), True
        agreement = rank_correlation(per_part.numpy(), falls.numpy())
    else:
        budget.reduced.append("no occlusion beside the gradients")
    details: dict[str, Any] = {
        "target": found.target,
        "score": float(answers(adapter, inputs)[0, found.target]),
        "change": found.change,
        "completeness_gap": found.gap,
        "completeness_error": found.error,
        "path_points": found.steps,
        "per_part": per_part.tolist(),
        "occlusion": falls.tolist(),
        "rank_correlation_with_occlusion": agreement,
        "held_fixed": held_fixed(adapter, inputs),
    }
    why = f"{_verdict(found, agreement, occluded)}{told_fixed(adapter, inputs)}"
    return Outcome(found.error, None, why, (), details, _pictures(adapter, inputs, found, per_part, falls))


def _verdict(found: Attribution, agreement: float | None, occluded: bool) -> str:
    """Say how far contributions can be trusted: their sizes when they add up, their order when occlusion agrees."""
    if found.change == 0 and not bool(found.values.any()):
        return "nothing to explain: the score is the same for empty content"
    if found.error >= ADDS_UP:
        trust = "do not trust their sizes: they do not add up"
    elif agreement is None:
        trust = "they add up, and nothing confirms their order"
    elif agreement < AGREES:
        trust = "they add up, but do not trust their order: occlusion ranks the parts otherwise"
    else:
        trust = "they can be trusted"
    if agreement is not None:
        beside = f"rank correlation with occlusion {agreement:.2f}"
    else:
        beside = "all parts rank alike" if occluded else "occlusion was not run"
    return f"contributions miss {found.error:.1%} of the change they explain: {trust}; {beside}"


def _pictures(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], found: Attribution, per_part: Tensor, falls: Tensor
) -> list[Picture]:
    """Draw contributions as text, as an image or as a line."""
    caption = f"Contributions to score {found.target}; completeness error {found.error:.2%}."
    main = inputs[adapter.main_input]
    if not main.is_floating_point() and main.dim() > 1:
        names = [str(token) for token in main[0].flatten().tolist()]
        return [token_strip(names, per_part.tolist(), "which tokens made the answer (ids)", caption)]
    if adapter.modality == "image" and found.values.dim() == 3:
        pixels = found.values.sum(0)
        largest = float(pixels.abs().max()) or 1.0
        return [heat_map(pixels.numpy(), "which pixels made the answer", caption, -largest, largest)]
    series = {"integrated gradients": per_part.tolist(), "occlusion": falls.tolist()}
    size = found.values.shape[0] if found.values.dim() else 1
    what = "row" if not adapter.batched else "place" if found.values.dim() > 1 else "feature"
    what = what if main.is_floating_point() else f"{what} of the embedding"
    across = what if size == len(per_part) else f"{what}, {size} of them in {len(per_part)} runs"
    return [line_chart(range(len(per_part)), series, "which features made the answer", across, caption)]
