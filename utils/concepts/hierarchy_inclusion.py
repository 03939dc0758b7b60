"""Which concepts are included in which others: estimate, error and probability of every pair.

A pair's own covariance is a weak witness where concepts are rare or all but include one another: most samples in which
a rare concept is seen without its parent are flipped labels. All other concepts together say which samples those are.
"""

import math

import torch
from torch import Tensor

from utils.concepts.hierarchy_noise import RIDGE, Moments, spread_of_product

SIDE = 1.96
"""Standard errors on each side of a 95 % interval."""
REFUTED = 3.0
"""Standard errors below 1 from which a pair's own covariance rules an inclusion out; it loses one in 740."""
DECIDED, REJECTED = 2 / 3, 0.05
"""Probabilities from which a pair counts as an inclusion, and below which it is ruled out; between, it is undecided."""
BINS, TURNS = 5, 50
"""Steps of the density of the coefficients of overlaps, and rounds in which it is fitted."""
CELLS = 1_000_000
"""Numbers (samples times pairs) that are weighed at once."""
DOUBLINGS, STEPS = 20, 4
"""How often the samples are doubled in search of what would decide, and the steps of each doubling."""


class Witnesses:
    """What all other concepts say about a pair, and the test of inclusion that listens to them.

    Let u be an observation on the scale on which absence is 0 and presence 1 in the mean. If c is included in p, then
    E[w u_c (1 - u_p)] = 0 for *every* weight w that depends on other concepts only, because disturbances are
    independent. With w = 1 that is the plain covariance. These are all the tests that hold whatever the rest of the
    hierarchy looks like, and by the inequality of Cauchy and Schwarz the best of them has w in proportion to
    E[u_c (1 - u_p) | others] / E[(u_c (1 - u_p))^2 | others]. For siblings both the numerator and the presence of c are
    in proportion to that of their parents, and the denominator hardly varies; so w is the presence of c, predicted
    linearly from the others on the other half of the samples. Samples in which c can only be a false alarm then no
    longer add noise.
    """

    def __init__(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        """Fit the predictions.

        Args:
            values: ``(samples, concepts)``, float64.
            low: Mean where a concept is absent, ``(concepts,)``.
            high: Mean where it is present.
        """
        self.unit = (values - low) / (high - low)
        count, width = self.unit.shape
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self.halves = order.chunk(2)
        self._parts = []
        for fitted, read in (self.halves, self.halves[::-1]):
            mean = self.unit[fitted].mean(0)
            away = self.unit[fitted] - mean
            covariance = away.T @ away / len(fitted)
            # More where there are few samples for each concept (ridge regression).
            ridge = RIDGE + float(covariance.diagonal().mean()) * width / len(fitted)
            precision = torch.linalg.inv(covariance + ridge * torch.eye(width).double())
            self._parts.append((read, precision, (self.unit[read] - mean) @ precision))

    def weights(self, parent: Tensor, child: Tensor) -> Tensor:
        """Return how likely each sample has the child, judged by all concepts but the two: ``(samples, pairs)``."""
        found = torch.zeros(len(self.unit), len(parent)).double()
        for read, precision, score in self._parts:
            # The parent is taken out of the joint distribution (Schur complement of the precision); what remains of the
            # child's row is its regression on the others (Lauritzen 1996, 5.1).
            pull = precision[child, parent] / precision[parent, parent]
            own = precision[child, child] - pull * precision[child, parent]
            found[read] = self.unit[read][:, child] - (score[:, child] - pull * score[:, parent]) / own
        return found.clamp(0, 1)

    def coefficients(self, parent: Tensor, child: Tensor, unsure: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted coefficient of homogeneity of pairs and its standard error (delta method).

        Args:
            parent: int64 ``(pairs,)``.
            child: int64 ``(pairs,)``.
            unsure: Standard errors of the levels on the scale of `unit`, ``(2, concepts)``.
        """
        many = max(1, CELLS // len(self.unit))
        made = [self._some(*pairs, unsure) for pairs in zip(parent.split(many), child.split(many), strict=True)]
        return torch.cat([one for one, _ in made]), torch.cat([one for _, one in made])

    def _some(self, parent: Tensor, child: Tensor, unsure: Tensor) -> tuple[Tensor, Tensor]:
        weight, u_child, u_parent = self.weights(parent, child), self.unit[:, child], self.unit[:, parent]
        rare = (1 - u_parent.mean(0)).clamp(min=1 / len(weight))
        seen = weight * u_child
        total = seen.mean(0).clamp(min=1 / len(weight))
        without = (seen * (1 - u_parent)).mean(0) / total
        effect = seen * ((1 - u_parent) - without) / total / rare + without / rare**2 * (u_parent - u_parent.mean(0))
        moved = unsure[0][child] * (weight * (1 - u_child) * (1 - u_parent)).mean(0).clamp(min=0)
        moved = (moved + unsure[1][parent] * (seen * u_parent).mean(0)) / total / rare
        return 1 - without / rare, ((effect**2).mean(0) / len(weight) + moved**2).sqrt()


class Spread:
    """How the true coefficients of associated pairs are spread: a point at 1 and a density below.

    The density between 0 and 1 is a step in each of `BINS` equal parts; its shares and that of the point are found by
    expectation and maximisation (adaptive shrinkage: Stephens, "False discovery rates: a new deal", 2017). So few
    inclusions among many overlaps need more evidence, which is the control for many pairs. The shares begin as if two
    pairs had been seen, one included and one anywhere.
    """

    def __init__(self, coefficient: Tensor, error: Tensor) -> None:
        """Fit to estimates ``(pairs,)`` and their standard errors."""
        prior = torch.tensor([1.0] + [1 / BINS] * BINS).double()
        density, self.shares = self._density(coefficient, error), prior / prior.sum()
        for _ in range(TURNS):
            chance = density * self.shares
            chance = chance / chance.sum(1, keepdim=True)
            self.shares = (prior + chance.sum(0)) / (prior.sum() + len(chance))

    def chance(self, coefficient: Tensor, error: Tensor) -> Tensor:
        """Return the probability that the true coefficients are 1: ``(pairs,)``."""
        found = self._density(coefficient, error) * self.shares
        return found[:, 0] / found.sum(1)

    @staticmethod
    def _density(coefficient: Tensor, error: Tensor) -> Tensor:
        """Return the density of estimates under each part, ``(pairs, 1 + BINS)``."""
        # An estimate beyond the ends speaks for the end, and not against all parts.
        value, error = coefficient.clamp(0, 1)[:, None], error[:, None]
        edges = torch.linspace(0, 1, BINS + 1).double()
        below = torch.special.ndtr((value - edges) / error)
        point = torch.exp(-0.5 * ((value - 1) / error) ** 2) / (error * (2 * torch.pi) ** 0.5)
        return torch.cat([point, (below[:, :-1] - below[:, 1:]) * BINS], 1).clamp(min=1e-300)


class Search:
    """All pairs at once; rows are parents, columns concepts."""

    def __init__(
        self,
        values: Tensor,
        held: Moments,
        low: Tensor,
        high: Tensor,
        unsure: Tensor,
        inclusion: float,
        significance: float,
    ) -> None:
        """Take the levels ``(concepts,)`` and ``unsure``, the standard errors ``(2, concepts)`` of low and high."""
        self.bound, self.significance, self.samples = inclusion, significance, held.count
        tiny = 1e-9
        below, above = (held.mean - low).clamp(min=tiny), (high - held.mean).clamp(min=tiny)
        scale = high - low
        self.share = (held.mean - low) / scale
        count = len(held.mean)
        everyone = torch.arange(count)
        parent, child = everyone.repeat_interleave(count), everyone.repeat(count)
        product = below[child] * above[parent]
        flat = held.covariance[parent, child] / product
        error = spread_of_product(held, parent, child, above[parent], below[child], flat) / product
        # What is not known of the levels; a common flip rate moves both of a pair's, so that the two add up.
        moved = unsure[0][child] / below[child] + unsure[1][parent] / above[parent]
        error = (error**2 + (flat * moved) ** 2).sqrt()
        # A coefficient seen on few samples is never known better than by one of them.
        least = (1 / (held.count * self.share.clamp(min=1 / held.count))).expand(count, count)
        self.coefficient, self.error = flat.view(count, count), torch.maximum(error.view(count, count), least)
        self.z = held.association
        # An association of its own, found without the help of others, so that shuffled columns have none.
        strong = (self.z > significance) & ~torch.eye(count, dtype=torch.bool)
        # Ties go to the earlier column, so that the order of frequencies is total and no cycle can come about.
        order = torch.argsort(torch.argsort(self.share, descending=True, stable=True))
        rarer = order[:, None] < order[None]
        possible = strong & (self.coefficient + REFUTED * self.error >= 1)
        if possible.any():
            parent, child = possible.nonzero(as_tuple=True)
            value, error = Witnesses(values, low, high).coefficients(parent, child, unsure / scale)
            error = torch.maximum(error, least[parent, child])
            better = error < self.error[parent, child]
            parent, child = parent[better], child[better]
            self.coefficient[parent, child], self.error[parent, child] = value[better], error[better]
        # Each pair counts once, in the direction that its frequencies allow.
        counted = strong & rarer
        self.spread = Spread(self.coefficient[counted], self.error[counted])
        self.chance = torch.zeros(count, count).double()
        self.chance[possible] = self.spread.chance(self.coefficient[possible], self.error[possible])
        unit = held.covariance / (scale[:, None] * scale[None])
        own = unit.diagonal()
        self.apart = self.share[:, None] - self.share[None]
        self.step = ((own[:, None] + own[None] - 2 * unit).clamp(min=0) / held.count).sqrt()
        inside = (self.chance >= DECIDED) & (self.coefficient > inclusion)
        maybe = (self.chance > REJECTED) & rarer
        tied = self.apart.abs() <= SIDE * self.step
        self.equivalent = inside & inside.T & tied
        # Where the frequencies are the same within the error and the other direction is open, so is this one.
        self.unclear = inside & tied & ~inside.T & (self.chance.T > REJECTED)
        self.accepted = inside & rarer & ~self.equivalent & ~self.unclear
        self.open = maybe & (~inside | self.unclear)

    def samples_needed(self, parent: int, child: int) -> int | None:
        """Return the samples that would decide a pair if its estimates stayed as they are; None: too many to tell."""
        factor = 2 ** (torch.arange(1, DOUBLINGS * STEPS + 1).double() / STEPS)

        def decides(p: int, c: int) -> Tensor:
            value = self.coefficient[p, c].expand(len(factor))
            chance = self.spread.chance(value, self.error[p, c] / factor.sqrt())
            return (chance < REJECTED) | ((chance >= DECIDED) & (value > self.bound))

        decided = decides(parent, child)
        if self.unclear[parent, child]:
            told = self.apart[parent, child].abs() > SIDE * self.step[parent, child] / factor.sqrt()
            decided = told | decides(child, parent)
        if not decided.any():
            return None
        return math.ceil(self.samples * float(factor[decided][0]))
