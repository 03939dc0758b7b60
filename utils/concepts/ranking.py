"""How well scores tell two groups apart: the area under the ROC curve, with an interval."""

import math

import torch
from torch import Tensor

Z = 1.959963984540054
"""Two-sided 95% point of the normal distribution."""


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Return how often a positive score is above a negative one; a tie counts half.

    Args:
        positive: ``(n,)``, finite.
        negative: ``(m,)``, finite.
    """
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive) + torch.searchsorted(ordered, positive, right=True)
    return float(below.double().mean()) / 2 / len(negative)


def auroc_interval(value: float, positives: int, negatives: int) -> tuple[float, float]:
    """Return the 95% interval of an AUROC by its score test, which has a width at 0 and 1 too.

    Newcombe (Statistics in Medicine 25, 2006, p. 559, method 5): all values from which the measured one is not further
    than 1.96 of the standard errors that Hanley & McNeil (1982) give for them.

    Args:
        value: The measured AUROC.
        positives: Independent positive examples that were tested.
        negatives: Independent negative ones.
    """
    mean = (positives + negatives) / 2

    def error(true: float) -> float:
        both = (1 - true) / (2 - true) + true / (1 + true)
        return math.sqrt(true * (1 - true) * (1 + (mean - 1) * both) / (positives * negatives))

    ends = []
    for limit in (0.0, 1.0):
        near, far = value, limit
        for _ in range(60):
            middle = (near + far) / 2
            if abs(value - middle) <= Z * error(middle):
                near = middle
            else:
                far = middle
        ends.append(near)
    return ends[0], ends[1]
