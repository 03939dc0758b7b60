"""How noisy labels are, read off the labels themselves, and what a concept's activations are when it is there.

Let concept c be included in concept p: whatever has c has p. Every observation is a zero-mean disturbance of a low
level (concept absent) or a high one (present), drawn independently for every concept. Then, exactly,

    cov(p, c) = (mean(c) - low(c)) * (high(p) - mean(p)),

whatever the disturbance. For labels that are flipped at the rate e, low is e and high is 1 - e; without noise the
quotient of both sides is Loevinger's coefficient of homogeneity H ("The technic of homogeneous tests", 1948).
A pair that is not included has a smaller covariance, so inclusions show the flip rate as the line along which many
pairs pile up.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RATES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2)
"""Flip rates round which rates that differ by concept are tried."""
SPREADS = (0.15, 0.3)
"""Standard deviations of the rates of concepts, as shares of their centre."""
STEP, FINE_STEP, HIGHEST = 0.0025, 0.00025, 0.3
"""Steps, those about the likeliest, and end of the flip rates that are tried for all concepts alike."""
LOOSE, OUTSIDE, SHARE_OUTSIDE = 0.8, 1.3, 0.1
"""Coefficients of pairs that are not included spread over 0 to `LOOSE`, a share of them as far as `OUTSIDE`."""
ROUNDS, COOLING = 80, 50
"""Rounds of expectation and maximisation, and those in which the spread of the rates still widens the line."""
FEWEST_PAIRS, MOST_PAIRS = 3, 4000
"""Associated pairs without which no rate is estimated, and those that are looked at."""
END_SHARE, END_ERRORS = 0.1, 2.0
"""Share of the samples at each end of a prediction that bounds a rate, and standard errors that the bound allows."""
COMPLICATION = 3.0
"""Nats by which rates that differ must explain the pairs better than one rate."""
STARTS = (0.5, 0.15, 0.04)
"""Shares of the samples in which a concept may be present, from which the fit of its levels begins."""
SETTLED, MOST_SAMPLES = 1e-6, 5_000
"""Nats per sample by which a fit that has ended still changes, and samples that it looks at."""
RIDGE = 1e-3
"""Added to the variances of labels, so that copies of a concept can be told apart in a regression."""
SMALLEST_GAP = 2.0
"""Ashman's D from which two levels of an activation are told apart (Ashman, Bird and Zepf 1994)."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and mixed central moments of columns; rows of a matrix are parents, columns are children. All float64."""

    count: int
    """Samples."""
    mean: Tensor
    """``(concepts,)``."""
    covariance: Tensor
    """``(concepts, concepts)``."""
    squares: Tensor
    """Mean of d_p^2 d_c^2, d being the deviation from the mean."""
    by_child: Tensor
    """Mean of d_p d_c^2."""

    @property
    def variance(self) -> Tensor:
        """``(concepts,)``."""
        return self.covariance.diagonal()

    @property
    def association(self) -> Tensor:
        """Every covariance in standard errors under independence."""
        return self.covariance / (self.variance[:, None] * self.variance[None] / self.count).sqrt()


def moments(values: Tensor) -> Moments:
    """Return the moments of values ``(samples, concepts)``."""
    values = values.double()
    mean = values.mean(0)
    away = values - mean
    square, count = away**2, len(values)
    return Moments(count, mean, away.T @ away / count, square.T @ square / count, away.T @ square / count)


def spread_of_product(held: Moments, parent: Tensor, child: Tensor, above: Tensor, below: Tensor, h: Tensor) -> Tensor:
    """Return the standard error of ``cov - h * below * above`` by the delta method.

    Args:
        held: Moments.
        parent: int64 ``(pairs,)``.
        child: int64 ``(pairs,)``.
        above: high - mean of the parent.
        below: mean - low of the child.
        h: The coefficient at which the error is wanted.
    """
    cov, variance = held.covariance[parent, child], held.variance
    total = held.squares[parent, child] - cov**2
    total = total - 2 * h * (above * held.by_child[parent, child] - below * held.by_child[child, parent])
    total = total + h**2 * (
        above**2 * variance[child] + below**2 * variance[parent] - 2 * above * below * cov
    )  # fmt: skip
    return (total.clamp(min=1 / held.count) / held.count).sqrt()


@dataclass(frozen=True, eq=False)
class FlipRates:
    """Flip rates of labels."""

    rates: Tensor
    """float64 ``(concepts,)``."""
    errors: Tensor
    """Their standard errors, float64 ``(concepts,)``."""
    supporting: float
    """Pairs that lie on the line of inclusion; what the estimate rests on."""
    reason: str
    """How they were found."""


class _Pairs:
    """Associated pairs, and how well rates explain their covariances."""

    def __init__(self, held: Moments, parent: Tensor, child: Tensor, most: Tensor) -> None:
        self.held, self.parent, self.child = held, parent, child
        self.covariance = held.covariance[parent, child]
        # Short of the bounds, so that every level stays apart from the mean.
        self.room = torch.minimum(0.98 * torch.minimum(held.mean, 1 - held.mean), most)

    def sides(self, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean - low of the children, high - mean of the parents, and the standard error of an inclusion."""
        below = self.held.mean[self.child] - rates[self.child]
        above = 1 - rates[self.parent] - self.held.mean[self.parent]
        one = torch.ones_like(below)
        return below, above, spread_of_product(self.held, self.parent, self.child, above, below, one)

    def weigh(self, product: Tensor, error: Tensor, share: float, loose: float = LOOSE) -> tuple[Tensor, float]:
        """Return for every pair how likely it is an inclusion, and the log-likelihood of all."""

        def spread_to(top: float) -> Tensor:
            ends = torch.special.ndtr(self.covariance / error)
            return (ends - torch.special.ndtr((self.covariance - top * product) / error)) / (top * product)

        included = (
            share * torch.exp(-0.5 * ((self.covariance - product) / error) ** 2) / (error * (2 * torch.pi) ** 0.5)
        )
        other = (1 - share) * ((1 - SHARE_OUTSIDE) * spread_to(loose) + SHARE_OUTSIDE * spread_to(OUTSIDE))
        total = included + other + 1e-300
        return included / total, float(total.log().sum())

    def common(self) -> tuple[float, float, float, float]:
        """Return the rate that all concepts share, its standard error, its log-likelihood and the supporting pairs."""
        top = min(HIGHEST, float(self.room.min()))
        likelihood, near, support = max(self.tried(torch.arange(0, top, STEP).tolist(), STEP, LOOSE))
        # The least of all bounds is often a little below the rate. And overlaps that nearly are inclusions must have a
        # place beside the line here, or they pull the rate up.
        most = min(HIGHEST, 0.98 * float(torch.minimum(self.held.mean, 1 - self.held.mean).min()), near + 2 * STEP)
        fine = torch.arange(max(0.0, near - 2 * STEP), most + FINE_STEP / 2, FINE_STEP).tolist()
        chance, rates, _ = torch.tensor(self.tried(fine, FINE_STEP, 1.0)).double().T
        # Of the rates under a flat prior: mean and deviation.
        chance = chance.softmax(0)
        rate = float(chance @ rates)
        return rate, float(chance @ (rates - rate) ** 2) ** 0.5, likelihood, support

    def tried(self, rates: list[float], step: float, loose: float) -> list[tuple[float, float, float]]:
        """Return the log-likelihood of each rate, the rate and the pairs that support it."""
        found = []
        for rate in rates:
            below, above, error = self.sides(torch.full_like(self.room, rate))
            # Rates between two steps must not fall between two stools.
            error = (error**2 + (step / 2 * (below + above)) ** 2).sqrt() if rate else error
            share, likelihood = 0.3, 0.0
            for _ in range(15):
                weights, likelihood = self.weigh(below * above, error, share, loose)
                share = float(weights.mean())
            found.append((likelihood, rate, share * len(weights)))
        return found

    def varied(self, centre: float, spread: float) -> tuple[Tensor, Tensor, float, float]:
        """Return rates that differ by concept, drawn from a normal prior: maximum a posteriori, Laplace's evidence.

        The second are their standard errors, of the same approximation.
        """
        prior = (spread * centre) ** 2
        rates, share = torch.minimum(torch.full_like(self.room, centre), 0.8 * self.room), 0.4
        weights, likelihood, curvature = torch.zeros_like(self.covariance), 0.0, torch.ones_like(self.room)
        for turn in range(ROUNDS):
            below, above, error = self.sides(rates)
            heat = max(0.0, 1 - turn / COOLING) * prior
            error = (error**2 + heat * (below**2 + above**2)).sqrt()
            weights, likelihood = self.weigh(below * above, error, share)
            share = float(weights.mean())
            pull, excess = weights / error**2, below * above - self.covariance
            slope, curvature = (rates - centre) / prior, torch.full_like(rates, 1 / prior)
            slope = slope.index_add(0, self.child, -pull * above * excess)
            slope = slope.index_add(0, self.parent, -pull * below * excess)
            curvature = curvature.index_add(0, self.child, pull * above**2).index_add(0, self.parent, pull * below**2)
            # Half a Newton step for all at once.
            rates = torch.minimum((rates - 0.5 * slope / curvature).clamp(min=0), self.room)
        evidence = likelihood - 0.5 * float(((rates - centre) ** 2 / prior).sum() + (curvature * prior).log().sum())
        return rates, curvature.rsqrt(), evidence, float(weights.sum())


def highest_rates(labels: Tensor) -> Tensor:
    """Return for every concept a flip rate that its labels cannot exceed.

    Whatever other concepts say, a label is 1 at least as often as flips make it so. The others' best linear prediction,
    fitted on one half and read on the other, picks the samples where the label is rarest (and most frequent).

    Args:
        labels: ``(samples, concepts)``, 0 and 1, float64.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    halves = order.chunk(2)
    count = max(1, int(END_SHARE * len(halves[1])))
    ends = torch.zeros(2, labels.shape[1]).double()
    for fitted, read in (halves, halves[::-1]):
        held = labels[fitted]
        centred = held - held.mean(0)
        covariance = centred.T @ centred / len(held)
        covariance = covariance + RIDGE * torch.eye(len(covariance)).double()
        # Row by row of the inverse covariance: the regression of each concept on all others (Lauritzen 1996, 5.1).
        precision = torch.linalg.inv(covariance)
        weights = -precision / precision.diagonal()
        predicted = (labels[read] - held.mean(0)) @ weights.fill_diagonal_(0)
        ranked = labels[read].gather(0, predicted.argsort(0))
        ends += torch.stack([ranked[:count].mean(0), 1 - ranked[-count:].mean(0)]) / 2
    error = (ends * (1 - ends) / (2 * count)).sqrt() + 1 / (2 * count)
    return (ends + END_ERRORS * error).amin(0)


def flip_rates(labels: Tensor, held: Moments, significance: float) -> FlipRates:
    """Estimate the flip rates of labels from the pairs of concepts that include one another.

    One rate for all concepts is compared with rates that differ; the latter must be clearly likelier. Misses and false
    alarms of a concept are taken as equally frequent. Where nothing is included in anything, nothing pins the rate
    down: with too few associated pairs it is taken as 0, which can only lose relations.

    Args:
        labels: ``(samples, concepts)``, 0 and 1, none of them constant, float64.
        held: Their moments.
        significance: z of the association from which a pair is looked at.
    """
    rarer = held.mean[:, None] > held.mean[None]
    parent, child = ((held.association > significance) & rarer).nonzero(as_tuple=True)
    nothing = torch.zeros_like(held.mean)
    if len(parent) < FEWEST_PAIRS:
        return FlipRates(nothing, nothing, 0.0, f"taken as 0: only {len(parent)} pairs of concepts go together")
    if len(parent) > MOST_PAIRS:
        chosen = torch.randperm(len(parent), generator=torch.Generator().manual_seed(0))[:MOST_PAIRS]
        parent, child = parent[chosen], child[chosen]
    pairs = _Pairs(held, parent, child, highest_rates(labels))
    rate, error, likelihood, support = pairs.common()
    best = FlipRates(
        nothing + rate,
        nothing + error,
        support,
        f"one rate for all concepts, estimated from {support:.0f} of {len(parent)} pairs",
    )
    for centre in RATES:
        for spread in SPREADS:
            rates, errors, evidence, support = pairs.varied(centre, spread)
            if evidence - COMPLICATION > likelihood:
                likelihood = evidence - COMPLICATION
                said = f"a rate for each concept, estimated from {support:.0f} of {len(parent)} pairs"
                best = FlipRates(rates, errors, support, said)
    if best.supporting < FEWEST_PAIRS:
        return FlipRates(nothing, nothing, best.supporting, "taken as 0: hardly any pair looks like an inclusion")
    return best


def two_levels(values: Tensor, rounds: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Fit two normal distributions to every column by expectation and maximisation.

    Args:
        values: ``(samples, concepts)``, no column constant.
        rounds: Of expectation and maximisation.

    Returns:
        The lower mean, the higher mean and how far they are apart, float64 ``(concepts,)`` each: Ashman's D, which
        tells two groups apart above 2, or 0 where one normal distribution does as well as two.
    """
    if len(values) > MOST_SAMPLES:
        values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[:MOST_SAMPLES]]
    values = values.double()
    centre, scale = values.mean(0), values.std(0, unbiased=False)
    values = (values - centre) / scale
    best, levels, gap = torch.full_like(centre, -torch.inf), torch.zeros(2, len(centre)).double(), centre * 0
    for share_present in STARTS:
        # Begun from a cut, because the concept may be there in half of the samples or in a few of a hundred.
        cut = values > values.quantile(1 - share_present, 0)
        weights = torch.stack([~cut, cut]).double().clamp(1e-3, 1 - 1e-3)
        likelihood = best
        for _ in range(rounds):
            total = weights.sum(1)
            mean = (weights * values).sum(1) / total
            # The floor keeps a spike, such as many exact zeros, from becoming infinitely thin.
            width = ((weights * (values - mean[:, None]) ** 2).sum(1) / total).sqrt().clamp(min=1e-3)
            density = (total / len(values)).log()[:, None] - width.log()[:, None]
            density = density - 0.5 * ((values - mean[:, None]) / width[:, None]) ** 2
            before, likelihood = likelihood, density.logsumexp(0).mean(0)
            if bool(((likelihood - before).abs() < SETTLED).all()):
                break
            weights = density.softmax(0).clamp(min=1e-12)
        better = likelihood > best
        best = torch.where(better, likelihood, best)
        levels = torch.where(better, mean, levels)
        gap = torch.where(better, (mean[1] - mean[0]).abs() * 2**0.5 / (width**2).sum(0).sqrt(), gap)
    # One normal distribution has the mean log-likelihood -1/2 here; two must pay for three more numbers (Schwarz 1978).
    gap = torch.where((best + 0.5) * len(values) > 1.5 * math.log(len(values)), gap, 0.0)
    levels = levels * scale + centre
    return levels.amin(0), levels.amax(0), gap


def level_errors(held: Moments, low: Tensor, high: Tensor) -> Tensor:
    """Return the standard errors of fitted levels, ``(2, concepts)``, as if it were known which sample is at which.

    Args:
        held: Moments of the activations.
        low: ``(concepts,)``, and so `high`, both of `two_levels`.
        high: See there.
    """
    share = ((held.mean - low) / (high - low)).clamp(1 / held.count, 1 - 1 / held.count)
    within = (held.variance - share * (1 - share) * (high - low) ** 2).clamp(min=0)
    return (within / (torch.stack([1 - share, share]) * min(held.count, MOST_SAMPLES))).sqrt()
