"""A concept taken out of vectors in closed form, so that no linear classifier can find it, with the least change.

LEACE (Belrose et al., arXiv:2306.03819, theorems 4.2 and 4.3). Unusual: the whitening comes from the singular values of
the centred rows and not from their covariance, which would square the ratio of the largest to the smallest of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.concepts.checks import as_tensor, fitted_table, read_table
from utils.runtime.errors import ConfigError, DataError

NOTHING = 1e-10
"""A correlation up to which nothing has to be erased."""


@dataclass(frozen=True, eq=False)
class Eraser:
    """The affine map ``x - (x - mean) @ reading.T @ writing.T``."""

    reading: Tensor
    """float64 ``(rank, width)``: what is read of a vector's distance to the mean."""
    writing: Tensor
    """float64 ``(width, rank)``: what is taken away for each unit of what was read."""
    mean: Tensor
    """float64 ``(width,)``: the mean of the rows that it was fitted on, which it keeps."""

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return len(self.mean)

    @property
    def rank(self) -> int:
        """Dimensions that are taken out."""
        return len(self.reading)

    def apply(self, values: Tensor) -> Tensor:
        """Return vectors ``(..., width)`` without the concept, in their own dtype and on their device.

        Raises:
            ConfigError: They are no floating-point tensor, or have another width.
        """
        values = read_table(values, self.width, "the eraser", flat=False)
        # Half precision would leave a part of the concept in its rounding.
        kind = torch.promote_types(values.dtype, torch.float32)
        reading, writing, mean = (part.to(values.device, kind) for part in (self.reading, self.writing, self.mean))
        rows = values.to(kind)
        return (rows - (rows - mean) @ reading.T @ writing.T).to(values.dtype)

    def change(self, values: Tensor) -> float:
        """Return how far rows ``(n, width)`` move: the root of their mean squared distance to where they were."""
        rows = read_table(values, self.width, "the eraser").double().cpu()
        return float((rows - self.apply(rows)).square().sum(1).mean().sqrt())

    def to_dict(self) -> dict[str, Any]:
        """Return rank and width."""
        return {"rank": self.rank, "width": self.width}

    def __repr__(self) -> str:
        return f"Eraser of {self.rank} of {self.width} dimensions"

    def _repr_html_(self) -> str:
        """Show rank and width."""
        from utils.concepts.concept_view import told_html

        return told_html("Takes a concept out of vectors", {"dimensions taken out": self.rank, "width": self.width})


def fit_eraser(values: Tensor, labels: Tensor, shrinkage: float = 0.0) -> Eraser:
    """Fit the affine map of least change after which vectors and labels have no covariance.

    Without covariance no linear classifier with a convex loss does better than one that reads nothing, and the means of
    all classes are equal (theorem 3.1 there).

    Args:
        values: ``(n, width)``.
        labels: ``(n,)`` classes as whole numbers or booleans; or real numbers, ``(n,)`` or ``(n, k)``.
        shrinkage: From 0 to below 1: how far the metric in which the change is least goes from that of the rows'
            covariance towards that of equal variance everywhere. The covariance is zero afterwards with any. Above 0
            the concept is also found in new rows where there are few rows for the width.

    Raises:
        DataError: No such shapes, values that are not finite, or labels that are all equal.
        ConfigError: The shrinkage is out of range.
    """
    if isinstance(shrinkage, bool) or not isinstance(shrinkage, (int, float)) or not 0 <= shrinkage < 1:
        raise ConfigError(
            f"The shrinkage is {shrinkage!r}.",
            "Expected a number from 0 to below 1.",
            "Choose 0, or width / (rows + width) where there are few rows for the width.",
        )
    rows, targets = checked_labels(values, labels)
    mean = rows.mean(0)
    frame = _Frame(rows, shrinkage)
    crossed = (rows - mean).T @ (targets - targets.mean(0)) / len(rows)
    # With labels of variance 1 the whitened columns are correlations, of which the smallest are rounding.
    spread = targets.std(0, correction=0)
    whitened = frame.whitened(crossed / torch.where(spread > 0, spread, torch.inf))
    bases, sizes, _ = torch.linalg.svd(whitened, full_matrices=False)
    basis = bases[:, sizes > NOTHING]
    return Eraser(frame.whitened(basis).T.contiguous(), frame.coloured(basis), mean)


def random_erasers(
    values: Tensor, like: Eraser, count: int, generator: torch.Generator, shrinkage: float = 0.0
) -> list[Eraser]:
    """Return changes as large as an eraser's, of as many dimensions, in directions drawn at random.

    The directions are uniform where the rows are white: they are those of labels that have nothing to do with the rows.
    Each change is scaled to move the rows as far as `like` does.

    Args:
        values: ``(n, width)``, the rows that `like` was fitted on.
        like: The eraser to compare with.
        count: How many.
        generator: Draws them.
        shrinkage: That of `like`.
    """
    rows = values.detach().double().cpu()
    mean, size = rows.mean(0), like.change(rows)
    frame = _Frame(rows, shrinkage)
    made = []
    for _ in range(count):
        drawn = torch.randn(len(frame.scales), like.rank, generator=generator, dtype=torch.float64)
        basis = frame.axes.T @ torch.linalg.qr(drawn).Q
        eraser = Eraser(frame.whitened(basis).T, frame.coloured(basis), mean)
        made.append(Eraser(eraser.reading, eraser.writing * (size / max(eraser.change(rows), 1e-300)), mean))
    return made


def checked_labels(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows ``(n, width)`` and targets ``(n, k)`` in float64 on the CPU; classes become one-hot.

    Raises:
        DataError: No such shapes, values that are not finite, labels that do not match or are all equal.
    """
    rows, labels = fitted_table(values, "vectors").double(), as_tensor(labels)
    if len(rows) < 2:
        raise DataError(
            f"There {'is 1 vector' if len(rows) else 'are no vectors'}.", "Expected two at least.", "Give more rows."
        )
    plain = isinstance(labels, Tensor) and labels.layout == torch.strided
    if not plain or labels.ndim not in (1, 2) or len(labels) != len(rows):
        kind = f"of the shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise DataError(
            f"There are {len(rows)} vectors, and the labels are {kind}.",
            f"Expected a tensor ({len(rows)},) of classes or ({len(rows)}, k) of numbers.",
            "Give one label for each row.",
        )
    if labels.ndim == 1 and labels.is_floating_point():
        labels = labels[:, None]
    targets = labels.detach().cpu()
    if targets.ndim == 1:
        kinds, places = torch.unique(targets, return_inverse=True)
        targets = torch.nn.functional.one_hot(places, len(kinds))
    targets = targets.double()
    if not bool(torch.isfinite(targets).all()):
        raise DataError("The labels are not all finite.", "Expected numbers.", "Leave out rows without a label.")
    if bool((targets == targets[0]).all()):
        raise DataError(
            "All labels are equal.", "Expected two kinds at least.", "Give examples without the concept too."
        )
    return rows, targets


class _Frame:
    """The metric of the rows: multiplies by the root of the inverse of their covariance, and by its inverse."""

    def __init__(self, rows: Tensor, shrinkage: float) -> None:
        _, sizes, axes = torch.linalg.svd((rows - rows.mean(0)) / len(rows) ** 0.5, full_matrices=False)
        # What is left of equal rows after their mean is rounding of the size of the rows, not of the differences.
        kept = sizes > float(rows.abs().max()) * max(rows.shape) * torch.finfo(rows.dtype).eps
        self.axes, self.scales, self.floor = axes[kept], sizes[kept], 0.0
        if shrinkage and bool(kept.any()):
            variance = float(self.scales.square().sum()) / rows.shape[1]
            self.floor = (shrinkage * variance) ** 0.5
            self.scales = ((1 - shrinkage) * self.scales.square() + shrinkage * variance).sqrt()

    def whitened(self, columns: Tensor) -> Tensor:
        """Return columns ``(width, k)`` times the root of the inverse covariance."""
        return self._scaled(columns, 1 / self.scales, 1 / self.floor if self.floor else 0.0)

    def coloured(self, columns: Tensor) -> Tensor:
        """Return columns ``(width, k)`` times the root of the covariance."""
        return self._scaled(columns, self.scales, self.floor)

    def _scaled(self, columns: Tensor, scales: Tensor, outside: float) -> Tensor:
        inside = self.axes @ columns
        made = self.axes.T @ (scales[:, None] * inside)
        # Where the rows do not reach, there is nothing to whiten unless the metric was shrunk.
        return made + outside * (columns - self.axes.T @ inside) if outside else made
