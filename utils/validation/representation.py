"""How much of its width does each layer use? Effective rank of what the blocks pass on, from streamed covariances.

Only one matrix of width by width is kept per layer; the activations themselves are dropped as they come.
"""

import math
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
from utils.validation.statistics import thinned

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WIDEST = 4096
LARGEST_SUMS = 250_000_000
"""Most numbers in all covariances together, 2 GB."""
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


def vectors_of(child: nn.Module, output: Any) -> Tensor | None:
    """Return a module's output as vectors ``(n, width)``: tokens by width, or the places of an image by channels."""
    tensor = first_tensor(output)
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    if tensor.is_nested:
        # Texts without their padding, each of its own length.
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in tensor.unbind()])
    if tensor.dim() == 4 or (tensor.dim() > 2 and isinstance(child, CONVOLUTIONS)):
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1])


def largest_rank(child: nn.Module, width: int, count: int) -> int:
    """Return the largest rank that `count` outputs of a module can have.

    It is the width at most, and the number of vectors less one because their mean is taken out. What is linear cannot
    return more directions than it is given: a convolution is given one patch for each of its groups.
    """
    most = min(width, count - 1)
    if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward:
        most = min(most, child.in_features)
    for kind in CONVOLUTIONS:
        if isinstance(child, kind) and type(child).forward is kind.forward:
            patch = child.in_channels // child.groups * math.prod(child.kernel_size)
            most = min(most, child.groups * min(child.out_channels // child.groups, patch))
    return max(1, most)


def followed(adapter: ModelAdapter, budget: Budget) -> list[str]:
    """Return the modules to measure: blocks, and in place of one that is never called the layers inside it.

    A block may be a container whose parts are called one by one. A model without blocks is followed by its layers.
    """
    widths: dict[str, int] = {}

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if (vectors := vectors_of(child, output)) is not None and vectors.shape[1] <= WIDEST:
            widths[name] = vectors.shape[1]

    with observe(adapter.module, note):
        logits(adapter, sample_inputs(adapter, 1, text_length(adapter)))
    layers = [
        name
        for name, child in adapter.module.named_modules()
        if name in widths and isinstance(child, (nn.Linear, *CONVOLUTIONS))
    ]
    found = []
    for block in blocks(adapter.module).value:
        found += [block] if block in widths else [name for name in layers if name.startswith(f"{block}.")]
    found = found or [name for name in layers if name] or layers
    if not found:
        return []
    most = max(2, LARGEST_SUMS // max(widths[name] for name in found) ** 2)
    if len(found) > most:
        budget.reduced.append(f"about {most} of {len(found)} layers")
    return thinned(found, most)


def check_representation(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Measure effective rank, unused dimensions and the mean cosine of each block's output."""
    names = followed(adapter, budget)
    if not names:
        raise Skipped("no repeated block, linear layer or convolution is called that returns vectors")
    length = text_length(adapter, LENGTH)
    count = affordable_samples(adapter, budget, passes=2, wanted=WANTED_SAMPLES)
    kept: dict[str, Moments] = {}
    wanted = set(names)

    def record(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if name not in wanted or (vectors := vectors_of(child, output)) is None:
            return
        moments = kept.setdefault(name, Moments(vectors.shape[1]))
        if moments.width == vectors.shape[1]:
            moments.add(vectors)

    with observe(adapter.module, record):
        for start in range(0, count, 8):
            logits(adapter, sample_inputs(adapter, min(8, count - start), length, seed=start))
    rows: dict[str, dict[str, float]] = {}
    for name, moments in kept.items():
        if moments.count < 2:
            continue
        spectrum = moments.spectrum()
        limit = largest_rank(adapter.module.get_submodule(name), moments.width, moments.count)
        rank = effective_rank(spectrum)
        rows[name] = {
            "effective_rank": rank,
            "limit": limit,
            "width": moments.width,
            "used": rank / limit,
            "first_direction": float(spectrum[0] / spectrum.sum().clamp_min(1e-300)),
            "unused_dimensions": int((spectrum[:limit] < 1e-10 * spectrum[0]).sum())
            if moments.count > moments.width
            else 0,
            "mean_cosine": moments.mean_cosine(),
        }
    if not rows:
        raise Skipped("no block or layer returns more than one vector")
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
