"""How much of its width does each layer use? Effective rank of what the blocks pass on, from streamed covariances.

Only one matrix of width by width is kept per layer; the activations themselves are dropped as they come.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor, observe
from utils.adapters.model_adapter import ModelAdapter
from utils.adapters.structure import blocks
from utils.validation.check import Budget, Outcome, Skipped
from utils.validation.pictures import line_chart
from utils.validation.probing import logits
from utils.validation.responses import affordable_samples, sample_inputs, text_length

WIDEST = 4096
LENGTH = 64
WANTED_SAMPLES = 64


@dataclass
class Moments:
    """Running sums over vectors ``(n, width)`` in float64."""

    width: int
    """Length of the vectors."""
    count: int = 0
    """Vectors seen."""
    pointing: int = 0
    """Those of them that are not zero."""
    total: Tensor = field(init=False)
    """Sum of the vectors."""
    products: Tensor = field(init=False)
    """Sum of their outer products."""
    directions: Tensor = field(init=False)
    """Sum of the vectors divided by their lengths."""

    def __post_init__(self) -> None:
        """Start at zero."""
        self.total = torch.zeros(self.width, dtype=torch.float64)
        self.directions = torch.zeros(self.width, dtype=torch.float64)
        self.products = torch.zeros(self.width, self.width, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Take in a batch of vectors."""
        rows = vectors.detach().double().cpu()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows
        lengths = rows.norm(dim=1, keepdim=True)
        pointing = lengths[:, 0] > 0
        self.pointing += int(pointing.sum())
        self.directions += (rows[pointing] / lengths[pointing]).sum(0)

    def spectrum(self) -> Tensor:
        """Return the eigenvalues of the covariance, largest first, none below zero."""
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        return torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)

    def mean_cosine(self) -> float:
        """Return the mean cosine between two different vectors, those of length zero left out."""
        if self.pointing < 2:
            return float("nan")
        return float((self.directions.square().sum() - self.pointing) / (self.pointing * (self.pointing - 1)))


def effective_rank(eigenvalues: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    Args:
        eigenvalues: Of a covariance; singular values are their roots.
    """
    singular = eigenvalues.clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def vectors_of(output: Any) -> Tensor | None:
    """Return a block's output as vectors ``(n, width)``: tokens by width, or the places of an image by channels."""
    tensor = first_tensor(output)
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    if tensor.dim() == 4:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1, tensor.shape[-1])


def check_representation(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Measure effective rank, unused dimensions and the mean cosine of each block's output."""
    names = blocks(adapter.module).value or [
        name for name, child in adapter.module.named_modules() if name and isinstance(child, (nn.Linear, nn.Conv2d))
    ]
    if not names:
        raise Skipped("the model has no repeated blocks and no linear layers to follow")
    length = text_length(adapter, LENGTH)
    count = affordable_samples(adapter, budget, passes=2, wanted=WANTED_SAMPLES)
    kept: dict[str, Moments] = {}
    wanted = set(names)

    def record(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if name not in wanted or (vectors := vectors_of(output)) is None or vectors.shape[1] > WIDEST:
            return
        kept.setdefault(name, Moments(vectors.shape[1])).add(vectors)

    with observe(adapter.module, record):
        for start in range(0, count, 8):
            logits(adapter, sample_inputs(adapter, min(8, count - start), length, seed=start))
    rows: dict[str, dict[str, float]] = {}
    for name, moments in kept.items():
        if moments.count < 2:
            continue
        spectrum = moments.spectrum()
        limit = min(moments.width, moments.count - 1)
        rank = effective_rank(spectrum)
        rows[name] = {
            "effective_rank": rank,
            "limit": limit,
            "used": rank / limit,
            "first_direction": float(spectrum[0] / spectrum.sum().clamp_min(1e-300)),
            "unused_dimensions": int((spectrum < 1e-10 * spectrum[0]).sum()) if moments.count > moments.width else 0,
            "mean_cosine": moments.mean_cosine(),
        }
    if not rows:
        raise Skipped("no block returns vectors to measure")
    lowest = min(rows, key=lambda name: rows[name]["used"])
    why = (
        f"lowest at {lowest}: effective rank {rows[lowest]['effective_rank']:.1f} of at most "
        f"{rows[lowest]['limit']:.0f} ({rows[lowest]['used']:.0%})"
    )
    series = {
        "effective rank / limit": [row["used"] for row in rows.values()],
        "mean cosine": [row["mean_cosine"] for row in rows.values()],
        "share of the first direction": [row["first_direction"] for row in rows.values()],
    }
    details = {"vectors": max(m.count for m in kept.values()), "layers": rows}
    picture = line_chart(
        range(len(rows)), series, "capacity use by layer", "layer",
        "High rank and low cosine: tokens stay apart. A first direction near 1: they have collapsed.",
    )  # fmt: skip
    return Outcome(rows[lowest]["used"], None, why, (), details, [picture])
