"""A concept as a direction in what a layer makes of samples, with the controls that a meaningless one does not pass.

Each example is scored by a direction that was found without it: two disjoint halves take turns. The same halves tell
how stable the direction is, and the same procedure with permuted labels tells what it makes of nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.concepts.checks import as_tensor, check_choice, check_count, fitted_table, read_table
from utils.concepts.content import paired_groups
from utils.concepts.examples import BATCH_SIZE, read_sides
from utils.concepts.ranking import auroc, auroc_interval
from utils.runtime.errors import DataError
from utils.runtime.optional import require
from utils.runtime.seeding import derive_seed

METHODS = ("mean_difference", "logistic")
LEAST = 10
"""Fewest different examples on each side: half of them are tested at a time."""
CONTROLS = 20
"""Permutations of the labels, and random directions."""
STABLE = 0.8
"""Least cosine between the directions of two disjoint halves."""
LEVEL = 0.01
"""The p value below which erasing a concept has an effect of its own."""
PENALTY = 1.0
"""Half of it times the squared norm is added to the sum of the logistic losses, as in scikit-learn with ``C=1``."""
LEAST_SPREAD = 0.05
"""Share of the median standard deviation of the features that each is taken to have at least."""


@dataclass(frozen=True, eq=False)
class ConceptDirection:
    """Where a concept points, how well it tells other examples apart, and whether to believe it."""

    vector: Tensor
    """float32 ``(width,)``, of length 1, from all examples."""
    bias: float
    """``values @ vector + bias`` is above zero for what is more like the positive examples."""
    auroc: float
    """Area under the ROC curve on held-out examples: mean of two halves, each scored by the other's direction."""
    interval: tuple[float, float]
    """Its 95% confidence interval, as wide as that of one half: the two share what they were found with."""
    controls: tuple[float, ...]
    """The same number for control concepts: labels permuted, with as many positives in each half."""
    stability: float
    """Cosine between the directions of the two halves."""
    random: tuple[float, ...] = ()
    """The same number for directions drawn at random, whose sign is found with the other half."""
    method: str = "mean_difference"
    """How the direction was found."""
    examples: tuple[int, int] = (0, 0)
    """Different positive and negative examples."""
    groups: tuple[int, int] = (0, 0)
    """Groups that the positive and the negative ones are of; ``(0, 0)`` where each example counts by itself."""
    layer: str = ""
    """The layer that made the values; empty where they were given as such."""
    side: str = "output"
    """The layer's ``"output"`` or ``"input"``."""
    pool: str = "mean"
    """What became of the positions of a sample."""
    effect: float | None = None
    """The p value of `utils.concepts.effect.erasure_effect`; None where no behaviour was looked at."""

    @property
    def found(self) -> bool:
        """Whether there is such a direction: it tells held-out examples apart (rule 1) and is stable (rule 3)."""
        return all(held for held, _ in self._rules()[:2])

    @property
    def accepted(self) -> bool:
        """Whether all three rules were measured and hold: it is found, and erasing it has an effect of its own."""
        return all(held for held, _ in self._rules())

    @property
    def verdict(self) -> str:
        """``"accepted"``, ``"not accepted"``, or ``"found, effect not measured"``."""
        if self.found and self.effect is None:
            return "found, effect not measured"
        return "accepted" if self.accepted else "not accepted"

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each rule, with its numbers."""
        return tuple(said for _, said in self._rules())

    def _rules(self) -> list[tuple[bool, str]]:
        low, best = self.interval[0], max(self.controls, default=0.5)
        counted = f", counted by {self.groups[0]} and {self.groups[1]} groups," if any(self.groups) else ","
        rules = [
            (
                low > best,
                f"Held-out AUROC {self.auroc:.3f}, at least {low:.3f} with 95% confidence{counted} "
                f"{'above' if low > best else 'not above'} {best:.3f}, "
                f"the best of {len(self.controls)} control concepts with permuted labels"
                + (f"; the best random direction has {max(self.random):.3f}." if self.random else "."),
            ),
            (
                self.stability >= STABLE,
                f"Directions of two disjoint halves have a cosine of {self.stability:.2f}, "
                f"{'at least' if self.stability >= STABLE else 'below'} {STABLE}.",
            ),
        ]
        if self.effect is None:
            return [
                *rules,
                (False, "What erasing it does to the model's behaviour was not measured: see examine_concept."),
            ]
        held = self.effect < LEVEL
        said = "lowers the behaviour more than" if held else "is not shown to lower the behaviour more than"
        return [*rules, (held, f"Erasing it {said} erasing random directions does (p = {self.effect:.3g}).")]

    def score(self, values: Tensor) -> Tensor:
        """Return how far rows ``(n, width)`` lie on the concept's side: ``(n,)``, in units of the values.

        Raises:
            ConfigError: The rows are no floating-point tensor, or have another width.
        """
        rows = read_table(values, len(self.vector), "the direction")
        return rows.to(self.vector) @ self.vector + self.bias

    def with_effect(self, p_value: float) -> "ConceptDirection":
        """Return it with what erasing the concept did, which the verdict then includes."""
        return replace(self, effect=p_value)

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain values that JSON can hold."""
        made = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "vector"}
        made = {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}
        told = {"found": self.found, "accepted": self.accepted, "reasons": list(self.reasons)}
        return made | {"vector": self.vector.tolist()} | told

    def __str__(self) -> str:
        return "\n".join([f"Concept {self.verdict}.", *self.reasons])

    def _repr_html_(self) -> str:
        """Show the picture and the same in words."""
        from utils.concepts.concept_view import direction_figure, shown_html

        return shown_html(partial(direction_figure, self), str(self))


def concept_direction(
    positive: Tensor, negative: Tensor, method: str = "mean_difference", seed: int = 0, *, controls: int = CONTROLS,
    groups: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> ConceptDirection:  # fmt: skip
    """Find the direction that leads from examples without a concept to examples with it, and test it.

    Repeated rows count once, so that none is on both sides of the split, and the order of rows does not matter. The
    control concepts are control tasks in the sense of Hewitt & Liang (arXiv:1909.03368).

    Args:
        positive: ``(n, width)``: what a layer makes of examples of the concept.
        negative: ``(m, width)``: the same of other examples.
        method: ``"mean_difference"`` of the two sides, or ``"logistic"`` regression on standardised features.
        seed: Of the split, the control concepts and the random directions.
        controls: How many control concepts and random directions.
        groups: The source or template of each positive and of each negative example. Those of one group are on one
            side of the split and are permuted together, and the interval counts groups instead of examples, as
            befits examples of one group that are all alike; where a group has both sides, its labels are swapped.

    Raises:
        DataError: Too few different examples or groups, the same examples on both sides, values that are not finite or
            all equal.
        ConfigError: No such method, or no control.
    """
    check_choice("method", method, METHODS)
    check_count("controls", controls, 1)
    positive, negative = as_tensor(positive), as_tensor(negative)
    sides = checked_sides(positive, negative)
    find = _mean_difference if method == "mean_difference" else _logistic
    generator = torch.Generator().manual_seed(derive_seed(seed, "concept direction"))
    ids = (torch.arange(len(sides[0])), len(sides[0]) + torch.arange(len(sides[1])))
    if groups is not None:
        ids = _grouped((positive, negative), group_numbers(groups, (len(positive), len(negative))))
    parted = group_halves(ids, generator)
    halves = [(sides[0][rows[0]], sides[1][rows[1]]) for rows in parted]
    blocks = [(ids[0][rows[0]], ids[1][rows[1]]) for rows in parted]
    found = [find(*half)[0] for half in halves]
    tested = _crossed(halves, found)
    parts = [min(_effective(block[side]) for block in blocks) for side in (0, 1)]
    null = []
    for _ in range(controls):
        shuffled = [_permuted(half, block, generator) for half, block in zip(halves, blocks, strict=True)]
        null.append(_crossed(shuffled, [find(*half)[0] for half in shuffled]))
    drawn = torch.randn(controls, sides[0].shape[1], generator=generator, dtype=torch.float64)
    random = [_crossed(halves, [_turned(vector, half) for half in halves]) for vector in drawn]
    vector, bias = find(*sides)
    return ConceptDirection(
        vector.float(), bias, tested, auroc_interval(tested, parts[0], parts[1]), tuple(null),
        float(found[0] @ found[1]), tuple(random), method, (len(sides[0]), len(sides[1])),
        (0, 0) if groups is None else (len(ids[0].unique()), len(ids[1].unique())),
    )  # fmt: skip


def find_direction(
    model: Any, positive: Any, negative: Any, layer: str | None = None, method: str = "mean_difference", *,
    pool: str = "auto", side: str = "output", channels: int | None = None, tokenizer: Any = None, seed: int = 0,
    controls: int = CONTROLS, batch_size: int = BATCH_SIZE,
    groups: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> ConceptDirection:  # fmt: skip
    """Find and test a concept's direction in a layer of a model; see `concept_direction`.

    Args:
        model: A run, a loaded model, an adapter or a module.
        positive: Examples with the concept: texts, or model inputs; see `utils.concepts.examples.example_batches`.
        negative: Examples without it.
        layer: Qualified name; None takes what the layer that makes the logits reads.
        method: ``"mean_difference"`` or ``"logistic"``.
        pool: What becomes of the positions of a sample: ``"mean"`` (also ``"auto"``), ``"last"`` or ``"flat"``.
        side: The layer's ``"output"`` or ``"input"``; for its default the input.
        channels: The axis of features, where the shape leaves it open.
        tokenizer: For texts; None takes the run's.
        seed: Of the split, the control concepts and the random directions.
        controls: How many control concepts and random directions.
        batch_size: Samples that go through the model at a time.
        groups: The source or template of each example, on either side; see `concept_direction`.

    Raises:
        ConfigError: No such layer, pool, side or method, or examples of no known kind.
        DataError: Too few different examples, some on both sides, values that are not finite or all equal.
        AdapterError: The model cannot be called, or the layer makes nothing of each sample.
    """
    check_choice("method", method, METHODS)
    check_count("controls", controls, 1)
    read = read_sides(
        model, positive, negative, layer, pool,
        side=side, channels=channels, tokenizer=tokenizer, batch_size=batch_size,
    )  # fmt: skip
    # What a layer makes of the same input in two batches may differ in rounding.
    distinct = [own.distinct(read.adapter.main_input) for _, own in read.paired]
    values = [side.values[kept] for (side, _), kept in zip(read.paired, distinct, strict=True)]
    numbers = None
    if groups is not None:
        told = group_numbers(groups, (len(read.positive), len(read.negative)))
        numbers = told[0][distinct[0]].tolist(), told[1][distinct[1]].tolist()
    found = concept_direction(values[0], values[1], method, seed, controls=controls, groups=numbers)
    return replace(found, layer=read.first.layer, side=read.first.side, pool=read.first.pool)


def checked_sides(positive: Tensor, negative: Tensor, least: int = LEAST) -> tuple[Tensor, Tensor]:
    """Return both sides in float64 on the CPU, each row once, in an order of their own.

    Args:
        positive: ``(n, width)``.
        negative: ``(m, width)``.
        least: Fewest different rows on each side.

    Raises:
        DataError: They are no tables of one width, hold values that are not finite or all equal, are the same on both
            sides, or too few.
    """
    sides = []
    for name, values in (("positive", positive), ("negative", negative)):
        values = fitted_table(values, f"{name} examples").double()
        sides.append(torch.unique(values, dim=0))
    first, second = sides
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"The positive examples are {first.shape[1]} wide and the negative ones {second.shape[1]}.",
            "Expected one width.",
            "Take both from the same layer.",
        )
    both = len(torch.unique(torch.cat(sides), dim=0))
    if both == 1 and len(positive) + len(negative) > 2:
        raise DataError(
            "All examples have the same values.", "Expected values that differ.", "Choose a layer that reads its input."
        )
    if len(first) and len(second) and both == max(len(first), len(second)):
        raise DataError(
            "The positive and the negative examples are the same, or those of one side are all on the other.",
            "Expected examples that differ in the concept.",
            "Give each example to one side.",
        )
    for name, side, given in (("positive", first, positive), ("negative", second, negative)):
        if len(side) < least:
            repeated = f" of {len(given)}" if len(given) > len(side) else ""
            raise DataError(
                f"There {'is' if len(side) == 1 else 'are'} {len(side)} different{repeated} {name} "
                f"example{'s' * (len(side) != 1)}.",
                f"Expected {least} on each side at least: held-out numbers with an interval need them.",
                "Give more examples.",
            )
    return first, second


def group_numbers(groups: tuple[Sequence[Any], Sequence[Any]], counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the group of each example on either side as a number, the same for the same group: int64 ``(n,)``.

    Args:
        groups: The source or template of each positive and of each negative example.
        counts: How many examples there are on either side.

    Raises:
        DataError: They are no pair, or not as many as examples.
    """
    told = paired_groups(groups, counts, ("positive examples", "negative examples"))
    names = {name: number for number, name in enumerate(sorted({*told[0], *told[1]}))}
    first, second = (torch.tensor([names[name] for name in side], dtype=torch.int64) for side in told)
    return first, second


def group_halves(ids: tuple[Tensor, Tensor], generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of both sides in two disjoint halves, those of one group together.

    Args:
        ids: The group of each row on either side, int64 ``(n,)``.
        generator: Of the split.

    Raises:
        DataError: One side has a single group, which cannot be in both halves.
    """
    own = [side.unique() for side in ids]
    for name, groups in zip(("positive", "negative"), own, strict=True):
        if len(groups) < 2:
            raise DataError(
                f"All {name} examples are of one group.",
                "Expected two groups on each side at least: a direction is tested on groups that it was found without.",
                "Give examples of more sources.",
            )
    # Examples that each are a group of their own are dealt as rows in their order.
    sole = [groups[~torch.isin(groups, other)] for groups, other in (own, own[::-1])]
    shared = own[0][torch.isin(own[0], own[1])]
    chosen = []
    for groups, more in ((sole[0], 0), (sole[1], 0), (shared, 1)):
        # Half of an odd number goes the other way for shared groups, so that no half is without a side.
        chosen.append(groups[torch.randperm(len(groups), generator=generator)][: (len(groups) + more) // 2])
    first = [torch.isin(side, torch.cat(chosen)) for side in ids]
    return [
        (torch.nonzero(first[0])[:, 0], torch.nonzero(first[1])[:, 0]),
        (torch.nonzero(~first[0])[:, 0], torch.nonzero(~first[1])[:, 0]),
    ]


def _grouped(given: tuple[Tensor, Tensor], numbers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the groups of the rows that `checked_sides` keeps; a row of several groups is of the first of them."""
    made = []
    for values, own in zip(given, numbers, strict=True):
        rows, place = torch.unique(values.detach().double().cpu(), dim=0, return_inverse=True)
        least = torch.full((len(rows),), int(own.max()))
        made.append(least.scatter_reduce(0, place, own, "amin"))
    return made[0], made[1]


def _effective(groups: Tensor) -> int:
    """Return how many independent examples rows are worth whose groups are all alike inside (Kish, 1965)."""
    sizes = groups.unique(return_counts=True)[1].double()
    return int(sizes.sum() ** 2 / sizes.square().sum() + 1e-9)


def _permuted(
    half: tuple[Tensor, Tensor], groups: tuple[Tensor, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return a half with its labels dealt anew to groups, as many of each; groups of both sides swap theirs or not."""
    rows, ids = torch.cat(half), torch.cat(groups)
    was = torch.arange(len(rows)) < len(half[0])
    own = [side.unique() for side in groups]
    sole = [side[~torch.isin(side, other)] for side, other in (own, own[::-1])]
    shared = own[0][torch.isin(own[0], own[1])]
    dealt = torch.cat(sole)[torch.randperm(len(sole[0]) + len(sole[1]), generator=generator)][: len(sole[0])]
    swapped = shared[torch.rand(len(shared), generator=generator) < 0.5]
    now = torch.isin(ids, dealt) | (torch.isin(ids, shared) & (was != torch.isin(ids, swapped)))
    return rows[now], rows[~now]


def _crossed(halves: list[tuple[Tensor, Tensor]], found: list[Tensor]) -> float:
    """Return the mean AUROC of each half under the direction of the other."""
    scored = [auroc(half[0] @ vector, half[1] @ vector) for half, vector in zip(halves, reversed(found), strict=True)]
    return sum(scored) / len(scored)


def _turned(vector: Tensor, half: tuple[Tensor, Tensor]) -> Tensor:
    """Return a direction with the sign that serves a half."""
    return vector if auroc(half[0] @ vector, half[1] @ vector) >= 0.5 else -vector


def _mean_difference(positive: Tensor, negative: Tensor) -> tuple[Tensor, float]:
    """Return the unit vector between the means of two sides, and the bias that puts zero midway."""
    means = positive.mean(0), negative.mean(0)
    vector = _unit(means[0] - means[1])
    return vector, -float((means[0] + means[1]) @ vector) / 2


def _logistic(positive: Tensor, negative: Tensor) -> tuple[Tensor, float]:
    """Return the unit vector and the bias of a logistic regression with a ridge penalty on standardised features."""
    rows = torch.cat([positive, negative])
    labels = torch.zeros(len(rows), dtype=rows.dtype)
    labels[: len(positive)] = 1
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    varies = spread > 1e-12 * rows.abs().amax(0)
    # One that hardly varies, such as a unit that is all but dead, would be blown up to the size of the others, and then
    # be all of the unit vector; one that does not vary, up to rounding, stays out.
    if bool(varies.any()):
        spread = spread.clamp_min(LEAST_SPREAD * float(spread[varies].median()))
    spread = torch.where(varies, spread, torch.inf)
    weights = _fitted((rows - mean) / spread, labels)
    vector = weights[:-1] / spread
    size = float(vector.norm())
    return _unit(vector), float(weights[-1] - mean @ vector) / size if size else 0.0


def _fitted(features: Tensor, labels: Tensor) -> Tensor:
    """Return weights and intercept ``(width + 1,)`` of least penalised logistic loss, which is convex: one minimum."""
    optimize = require("scipy.optimize", "fit a logistic regression")
    rows = torch.cat([features, torch.ones_like(features[:, :1])], 1).numpy()
    sign = 2 * labels.numpy() - 1
    ridge = np.full(rows.shape[1], PENALTY)
    ridge[-1] = 0

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = sign * (rows @ weights)
        pull = -sign / (1 + np.exp(np.minimum(margins, 500)))
        value = np.logaddexp(0, -margins).sum() + ridge @ weights**2 / 2
        return float(value), rows.T @ pull + ridge * weights

    options = {"maxiter": 2000, "maxfun": 4000, "gtol": 1e-6, "ftol": 1e-13}
    found = optimize.minimize(loss, np.zeros(rows.shape[1]), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(found.x)


def _unit(vector: Tensor) -> Tensor:
    """Return a vector of length 1; one of no length, where nothing tells two sides apart, stays as it is."""
    size = vector.norm()
    return vector / size if size > 0 else vector
