"""Which concepts are included in which others: estimate, error and probability of every pair.

A pair's own covariance is a weak witness where concepts are rare or all but include one another: most samples in which
a rare concept is seen without its parent are flipped labels. All other concepts together say which samples those are.
"""

import math

import torch
from torch import Tensor

from utils.concepts.hierarchy_noise import MOST_PAIRS, RIDGE, FlipRates, Moments, spread_of_product

SIDE = 1.96
"""Standard errors on each side of a 95 % interval."""
REFUTED = 3.0
"""Standard errors below 1 from which a pair's own covariance rules an inclusion out; it loses one in 740."""
DECIDED, REJECTED = 2 / 3, 0.05
"""Probabilities from which a pair counts as an inclusion, and below which it is ruled out; between, it is undecided."""
EDGES, TURNS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0), 50
"""Steps of the density of the coefficients of overlaps, finer towards 1, and rounds in which it is fitted."""
COARSE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""The same where noise or levels are estimated: all coefficients then share an error, and a pile a little below 1 says
nothing."""
TRUST, TRUST_COARSE = 10.0, 1.0
"""Inclusions that count as seen before the data, so that fine and coarse steps do not take the place of the point."""
NO_EXCEPTION = 3 / 6**0.5
"""Least standard error in samples: a normal one that gives three exceptions, where none is seen, the chance exp(-3)."""
PARTS = (0.75, 0.5, 0.25, 0.0)
"""Shares of an estimated rate at which it is asked whether less noise explains the pairs too."""
DISMISSED = 1.0
"""Nats for each concept by which half of the estimated rate, or less, must explain the pairs worse to be dismissed."""
CELLS = 1_000_000
"""Numbers (samples times pairs) that are weighed at once."""
MOSTLY = 0.5
"""Coefficient from which two concepts mostly go together."""
MARGIN = 1.5
"""Times the samples that would decide a pair if its estimates stayed as they are: with them new data decided 49 of 56
pairs, without them 39."""
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

    The density between 0 and 1 is a step between every two edges; its shares and that of the point are found by
    expectation and maximisation (adaptive shrinkage: Stephens, "False discovery rates: a new deal", 2017). So few
    inclusions among many overlaps need more evidence, which is the control for many pairs. The shares begin as if some
    inclusions had been seen, and one pair that lies anywhere.
    """

    def __init__(self, coefficient: Tensor, error: Tensor, coarse: bool = False) -> None:
        """Fit to estimates ``(pairs,)`` and their standard errors, with fine or `coarse` steps."""
        self.edges = torch.tensor(COARSE if coarse else EDGES).double()
        prior = torch.cat([torch.tensor([TRUST_COARSE if coarse else TRUST]).double(), self.edges.diff()])
        density, self.shares = self._density(coefficient, error), prior / prior.sum()
        for _ in range(TURNS):
            chance = density * self.shares
            chance = chance / chance.sum(1, keepdim=True)
            self.shares = (prior + chance.sum(0)) / (prior.sum() + len(chance))
        self.likelihood = float((density @ self.shares).log().sum())

    def chance(self, coefficient: Tensor, error: Tensor) -> Tensor:
        """Return the probability that the true coefficients are 1: ``(pairs,)``."""
        found = self._density(coefficient, error) * self.shares
        return found[:, 0] / found.sum(1)

    def _density(self, coefficient: Tensor, error: Tensor) -> Tensor:
        """Return the density of estimates under each part, ``(pairs, 1 + steps)``."""
        # An estimate beyond the ends speaks for the end, and not against all parts.
        value, error = coefficient.clamp(0, 1)[:, None], error[:, None]
        below = torch.special.ndtr((value - self.edges) / error)
        point = torch.exp(-0.5 * ((value - 1) / error) ** 2) / (error * (2 * torch.pi) ** 0.5)
        return torch.cat([point, (below[:, :-1] - below[:, 1:]) / self.edges.diff()], 1).clamp(min=1e-300)


def rates_as_likely(held: Moments, found: FlipRates, significance: float) -> tuple[list[Tensor], float]:
    """Return smaller flip rates that the data do not dismiss, float64 ``(concepts,)`` each; none if the estimate holds.

    An estimate takes the line along which many pairs pile up for that of inclusion. Overlaps that all but are
    inclusions pile up too, at a smaller rate or none. So smaller rates are given the density of overlaps that suits
    them best. Pairs share concepts, so what speaks against a rate must grow with the number of concepts; the bound was
    set so that overlaps of 0.9 to 0.95 in 200 to 500 samples stay below it (up to 0.65 nats for each concept) and
    planted hierarchies in 6,000 samples above it.

    Returns:
        The rates, and how many times as many samples would dismiss them: infinite if nothing speaks against them.
    """
    rarer = held.mean[:, None] > held.mean[None]
    parent, child = ((held.association > significance) & rarer).nonzero(as_tuple=True)
    if not len(parent) or not (found.rates > 0).any():
        return [], 1.0
    if len(parent) > MOST_PAIRS:
        chosen = torch.randperm(len(parent), generator=torch.Generator().manual_seed(0))[:MOST_PAIRS]
        parent, child = parent[chosen], child[chosen]

    def likelihood(rates: Tensor) -> float:
        below, above = held.mean[child] - rates[child], 1 - rates[parent] - held.mean[parent]
        product = below * above
        flat = held.covariance[parent, child] / product
        error = spread_of_product(held, parent, child, above, below, flat) / product
        moved = found.errors[child] / below + found.errors[parent] / above
        density = Spread(flat, (error**2 + (flat * moved) ** 2).sqrt()).likelihood
        # Of the covariances, which are the same for all rates, so that likelihoods can be compared.
        return density - float(product.log().sum())

    behind = likelihood(found.rates) - max(likelihood(part * found.rates) for part in PARTS if part <= 0.5)
    needed = DISMISSED * len(torch.cat([parent, child]).unique())
    if behind >= needed:
        return [], 1.0
    return [part * found.rates for part in PARTS], needed / behind if behind > 0 else math.inf


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
        coarse: bool = False,
    ) -> None:
        """Take the levels ``(concepts,)``, `unsure`, the standard errors ``(2, concepts)`` of low and high.

        With `coarse` only the density with coarse steps is fitted.
        """
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
        # A coefficient is never known better than by the samples of the child that can speak against it.
        tell = self.share[None].clamp(min=1 / held.count) * (1 - self.share[:, None]).clamp(1 / held.count, 1)
        least = NO_EXCEPTION / (held.count * tell)
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
        found = self.coefficient[counted], self.error[counted]
        self.spreads = [Spread(*found, coarse=True)] + ([] if coarse else [Spread(*found)])
        self.chance = torch.zeros(count, count).double()
        self.chance[possible] = self._probable(self.coefficient[possible], self.error[possible])
        self.own, self.factor = self.chance, 1.0
        self.others: list[Search] = []
        self.low, self.high = self.coefficient - SIDE * self.error, self.coefficient + SIDE * self.error
        unit = held.covariance / (scale[:, None] * scale[None])
        own = unit.diagonal()
        self.apart = self.share[:, None] - self.share[None]
        self.step = ((own[:, None] + own[None] - 2 * unit).clamp(min=0) / held.count).sqrt()
        self.rarer, self.strong = rarer, strong
        self._judge()

    def _probable(self, coefficient: Tensor, error: Tensor) -> Tensor:
        """Return the probability of inclusion under the least favourable of the fitted densities."""
        return torch.stack([one.chance(coefficient, error) for one in self.spreads]).amin(0)

    def beside(self, others: list["Search"], factor: float) -> None:
        """Accept only what searches at other levels, which are as possible, accept too; more samples dismiss them."""
        self.others, self.factor = others, factor
        self.chance = torch.stack([self.own, *(other.own for other in others)]).amin(0)
        self.low = torch.stack([self.low, *(other.low for other in others)]).amin(0)
        self.high = torch.stack([self.high, *(other.high for other in others)]).amax(0)
        self._judge()

    def _judge(self) -> None:
        """Sort the pairs into accepted, equivalent and open ones."""
        inside = (self.chance >= DECIDED) & (self.coefficient > self.bound)
        maybe = (self.own > REJECTED) & self.rarer
        tied = self.apart.abs() <= SIDE * self.step
        self.equivalent = inside & inside.T & tied
        # Where the frequencies are the same within the error and the other direction is open, so is this one.
        self.unclear = inside & tied & ~inside.T & (self.own.T > REJECTED)
        self.accepted = inside & self.rarer & ~self.equivalent & ~self.unclear
        self.open = maybe & (~inside | self.unclear)
        held = self.accepted | self.open | self.equivalent
        self.refuted = self.strong & self.rarer & (self.coefficient > MOSTLY) & ~held

    def samples_needed(self, parent: int, child: int) -> int | None:
        """Return samples that would decide about nine of ten such pairs (see `MARGIN`); None: too many to tell."""
        factor = 2 ** (torch.arange(1, DOUBLINGS * STEPS + 1).double() / STEPS)

        def verdicts(search: Search, p: int, c: int) -> tuple[Tensor, Tensor]:
            value = search.coefficient[p, c].expand(len(factor))
            chance = search._probable(value, search.error[p, c] / factor.sqrt())
            return (chance >= DECIDED) & (value > self.bound), chance < REJECTED

        def decides(p: int, c: int) -> Tensor:
            (yes, no), told = verdicts(self, p, c), factor >= self.factor
            others = [verdicts(other, p, c)[0] for other in self.others]
            agreed = torch.stack([yes, *others]).all(0)
            return no | agreed | (yes & told)

        decided = decides(parent, child)
        if self.unclear[parent, child]:
            told = self.apart[parent, child].abs() > SIDE * self.step[parent, child] / factor.sqrt()
            decided = told | decides(child, parent)
        if not decided.any():
            return None
        return math.ceil(MARGIN * self.samples * float(factor[decided][0]))
