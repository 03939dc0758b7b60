"""Which part of the input made the answer? Integrated gradients with their own error, and a second opinion beside them.

Attributions of a path must add up to the change of the output between its ends (completeness); what is missing
measures how far they can be trusted. Occlusion, which needs no gradient, is computed on the same parts, and the
agreement of both is reported.
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
from utils.validation.responses import answers, content_of, repeated, sample_inputs, text_length, with_content
from utils.validation.statistics import rank_correlation

STEPS = (16, 64, 256)
ENOUGH = 0.02
CHUNK_ELEMENTS = 20e6
GRID = 8
LENGTH = 17


@dataclass(frozen=True)
class Attribution:
    """How much each part of one sample's content contributed to one score."""

    values: Tensor
    """Contributions, in the content's shape without its batch; tokens and images keep the feature or channel axis."""
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


def _integral(adapter: ModelAdapter, inputs: Mapping[str, Tensor], content: Tensor, target: int, steps: int) -> Tensor:
    """Return the path integral of the gradient times the content."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    shares = torch.as_tensor((nodes + 1) / 2, dtype=content.dtype, device=content.device)
    parts = torch.as_tensor(weights / 2, dtype=torch.float64)
    total = torch.zeros(content.shape[1:], dtype=torch.float64)
    width = (adapter.vocab_size.value or 1) * (content.shape[1] if content.dim() == 3 else 1)
    chunk = max(1, min(steps, int(CHUNK_ELEMENTS / max(width, content[0].numel()))))
    for start in range(0, steps, chunk):
        share = shares[start : start + chunk].view(-1, *[1] * (content.dim() - 1))
        point = (share * content).detach().requires_grad_()
        scores = with_content(adapter, repeated(inputs, len(point)), point)[:, target]
        (gradient,) = torch.autograd.grad(scores.sum(), point)
        weighted = gradient.double().cpu() * parts[start : start + chunk].view(-1, *[1] * (content.dim() - 1))
        total += weighted.sum(0) * content[0].double().cpu()
    return total


@torch.no_grad()
def occlusion(adapter: ModelAdapter, inputs: Mapping[str, Tensor], target: int) -> Tensor:
    """Return how much the score falls when one part of the content is emptied: a token, an image's tile, a feature."""
    content = content_of(adapter, inputs)
    masks = part_masks(content).to(content.device)
    base = float(with_content(adapter, inputs, content)[0, target])
    falls = []
    for start in range(0, len(masks), 32):
        emptied = content * ~masks[start : start + 32]
        falls.append(base - with_content(adapter, repeated(inputs, len(emptied)), emptied)[:, target])
    return torch.cat(falls).double().cpu()


def part_masks(content: Tensor) -> Tensor:
    """Return one mask per part of the content, ``(parts, ...)`` that broadcasts against one sample."""
    shape = content.shape[1:]
    if len(shape) == 3:
        tiles = [
            (rows, columns)
            for rows in np.array_split(np.arange(shape[1]), min(GRID, shape[1]))
            for columns in np.array_split(np.arange(shape[2]), min(GRID, shape[2]))
        ]
        masks = torch.zeros(len(tiles), 1, *shape[1:], dtype=torch.bool)
        for index, (rows, columns) in enumerate(tiles):
            masks[index, 0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        return masks
    parts = shape[0]
    return torch.eye(parts, dtype=torch.bool).view(parts, parts, *[1] * (len(shape) - 1))


def check_attribution(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Explain the top score of one sample by integrated gradients, and hold occlusion beside it."""
    inputs = sample_inputs(adapter, 1, text_length(adapter, LENGTH))
    with torch.enable_grad():
        found = integrated_gradients(adapter, inputs, budget=budget)
    content = content_of(adapter, inputs)
    masks = part_masks(content)
    per_part = torch.stack([(found.values * mask).sum() for mask in masks])
    agreement = None
    if len(masks) * forward_seconds(adapter, text_length(adapter, LENGTH)) <= max(2.0, budget.remaining()):
        falls = occlusion(adapter, inputs, found.target)
        agreement = rank_correlation(per_part.numpy(), falls.numpy())
    else:
        budget.reduced.append("no occlusion beside the gradients")
        falls = torch.full_like(per_part, float("nan"))
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
    }
    trust = "they can be trusted" if found.error < 0.05 else "do not trust their sizes: they do not add up"
    agrees = "occlusion was not run" if agreement is None else f"rank correlation with occlusion {agreement:.2f}"
    why = f"contributions miss {found.error:.1%} of the change they explain: {trust}; {agrees}"
    return Outcome(found.error, None, why, (), details, _pictures(adapter, inputs, found, per_part, falls))


def _pictures(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], found: Attribution, per_part: Tensor, falls: Tensor
) -> list[Picture]:
    """Draw contributions as text, as an image or as a line."""
    caption = f"Contributions to score {found.target}; completeness error {found.error:.2%}."
    if adapter.modality == "tokens":
        names = [str(token) for token in inputs[adapter.main_input][0].flatten().tolist()]
        return [token_strip(names, per_part.tolist(), "which tokens made the answer (ids)", caption)]
    if found.values.dim() == 3:
        pixels = found.values.sum(0)
        largest = float(pixels.abs().max()) or 1.0
        return [heat_map(pixels.numpy(), "which pixels made the answer", caption, -largest, largest)]
    series = {"integrated gradients": per_part.tolist(), "occlusion": falls.tolist()}
    return [line_chart(range(len(per_part)), series, "which features made the answer", "feature", caption)]
