"""How far a score may be off: test samples and students drawn anew, the same ones for all that is compared.

Both are drawn at once, each with replacement (Owen, Annals of Applied Statistics 1, 2007): the interval is about other
test samples and other students. With a handful of students percentiles are too narrow, as much as a normal interval is
beside Student's; they are taken further out to make up for it (Hesterberg, The American Statistician 69, 2015, section
4.4, "expanded percentile").
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from utils.runtime.seeding import derive_seed
from utils.validation.statistics import Interval

METRICS = ("auroc", "balanced_accuracy")
CHUNK = 1 << 22
"""Weights that are held at a time."""


class Resamples:
    """Draws of test samples and of students.

    Attributes:
        samples: int16 ``(draws, n)``: how often each test sample is in a draw.
        students: float64 ``(draws, s)``: the share of each student in a draw.
        chance: float64 ``(draws,)``: a standard normal number for each draw, see `single`.
    """

    def __init__(self, clusters: Sequence[str], strata: Tensor, students: int, draws: int, seed: int) -> None:
        """Draw.

        Args:
            clusters: What each sample belongs to, such as its group: samples of one cluster are drawn together.
            strata: int64 ``(n,)``: as many clusters are drawn of each stratum as it has; where a cluster is in several,
                all are drawn alike.
            students: How many there are.
            draws: How many draws.
            seed: Of the draws.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, "resamples"))
        names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
        members = torch.tensor([names[name] for name in clusters])
        stratum = torch.full((len(names),), -1)
        stratum[members] = strata
        if not torch.equal(stratum[members], strata):
            stratum = torch.zeros_like(stratum)
        counts = torch.zeros(draws, len(names), dtype=torch.int16)
        for value in stratum.unique():
            own = torch.nonzero(stratum == value)[:, 0]
            counts[:, own] = _counts(len(own), draws, generator)
        self.samples = counts[:, members]
        self.students = _counts(students, draws, generator).double() / students
        self.chance = torch.randn(draws, generator=generator, dtype=torch.float64)

    def over_students(self, values: Tensor) -> Tensor:
        """Return the mean over the students of each draw ``(draws,)`` of values ``(students, draws)``."""
        return (self.students * values.T).sum(1)

    def single(self, values: Sequence[float], drawn: Tensor) -> Tensor:
        """Return draws of one more thing of a kind, where there are draws of the mean of some.

        It is as far from the mean as they are, by a normal distribution: a predictive interval. `interval` takes the
        percentiles of few students further out, so the spread is that of those measured, as in the bootstrap.

        Args:
            values: The things, one for each student.
            drawn: ``(draws,)``: their mean on each draw.
        """
        return drawn + statistics.pstdev(values) * self.chance

    def means(self, values: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the mean of each draw over its samples and its students: ``(draws,)``.

        Args:
            values: ``(students, n)``, float64.
            chosen: bool ``(n,)``: the samples that count; None for all. Not a number where a draw has none of them.
        """
        samples = self.samples if chosen is None else self.samples[:, chosen]
        values = values if chosen is None else values[:, chosen]
        parts = samples.split(max(1, CHUNK // max(1, samples.shape[1])))
        made = [(values @ rows.double().T) / rows.sum(1) for rows in parts]
        return self.over_students(torch.cat(made, 1))

    def interval(self, value: float, drawn: Tensor) -> Interval:
        """Return a value with its 95% interval.

        Args:
            value: What was measured.
            drawn: ``(draws,)``: the same on each draw; what is not a number is left out.
        """
        from scipy.special import ndtr, stdtrit

        count = self.students.shape[1]
        tail = 0.025
        if count > 1:
            tail = float(ndtr(-math.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.975)))
        ordered = drawn[torch.isfinite(drawn)].sort().values
        ends = (
            [float(torch.quantile(ordered, share)) for share in (tail, 1 - tail)]
            if len(ordered)
            else [-math.inf, math.inf]
        )
        return Interval(value, ends[0], ends[1], count)


def _counts(size: int, draws: int, generator: torch.Generator) -> Tensor:
    """Return how often each of some things is drawn, of as many draws as there are things: int16 ``(draws, size)``."""
    made = torch.zeros(draws, size, dtype=torch.int16)
    step = max(1, CHUNK // max(1, size))
    for start in range(0, draws, step):
        rows = made[start : start + step]
        drawn = torch.randint(size, rows.shape, generator=generator)
        rows.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.int16))
    return made


def weighted_metric(metric: str, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return a metric of scores for several weightings of the samples: float64 ``(draws,)``.

    Args:
        metric: ``"auroc"``, in which a tie counts half, or ``"balanced_accuracy"`` of scores above zero.
        scores: ``(n,)``.
        labels: bool ``(n,)``.
        weights: ``(draws, n)``, whole numbers; not a number where one side weighs nothing.
    """
    parts = []
    for rows in weights.split(max(1, CHUNK // max(1, len(scores)))):
        rows = rows.double()
        positive, negative = rows[:, labels], rows[:, ~labels]
        sizes = positive.sum(1) * negative.sum(1)
        if metric == "auroc":
            order = scores[~labels].argsort()
            ordered = scores[~labels][order]
            summed = torch.nn.functional.pad(negative[:, order].cumsum(1), (1, 0))
            below = torch.searchsorted(ordered, scores[labels])
            upto = torch.searchsorted(ordered, scores[labels], right=True)
            won = (positive * (summed[:, below] + summed[:, upto])).sum(1) / 2
        else:
            right = (scores > 0) == labels
            hits = (positive * right[labels]).sum(1), (negative * right[~labels]).sum(1)
            won = (hits[0] * negative.sum(1) + hits[1] * positive.sum(1)) / 2
        parts.append(torch.where(sizes > 0, won / sizes, torch.nan))
    return torch.cat(parts)


def plain_metric(metric: str, scores: Tensor, labels: Tensor) -> float:
    """Return a metric of scores, every sample counting once."""
    return float(weighted_metric(metric, scores, labels, torch.ones(1, len(scores)))[0])
