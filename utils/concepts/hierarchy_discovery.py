"""A hierarchy found in data: which concepts are included in which others, in spite of noisy labels.

That most samples with c have p too proves little: p may be common, or c's labels wrong. What is tested is the
noise-corrected coefficient of homogeneity (see `hierarchy_noise`): 1 where c is included in p, 0 where the two are
independent, whatever their frequencies and the noise. All inclusions together make a partial order, whose transitive
reduction has every direct parent, be there one or several.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.hierarchy_noise import (
    SMALLEST_GAP,
    FlipRates,
    Moments,
    flip_rates,
    level_errors,
    moments,
    spread_of_product,
    two_levels,
)
from utils.concepts.hierarchy_order import HierarchyError
from utils.concepts.hierarchy_parts import IS_A, Relation, check_name
from utils.runtime.errors import DataError
from utils.runtime.seeding import derive_seed

SIDE = 1.96
"""Standard errors on each side of a 95 % interval."""
REFUTED = 3.0
"""Standard errors below 1 from which a coefficient rules an inclusion out; one true inclusion in 740 is lost by it."""
FEWEST_SAMPLES, MOST_CONCEPTS = 30, 4096
SPARSE = 0.2
"""Share of exact zeros in non-negative activations from which "not zero" means that the concept is there."""
Noise = float | Sequence[float] | tuple[Any, Any] | None


@dataclass(frozen=True)
class Inclusion:
    """What the data say about one pair."""

    concept: str
    parent: str
    coefficient: float
    """1: included; 0: independent. Corrected for noise, so that it may exceed 1 by chance."""
    low: float
    """Of its 95 % interval."""
    high: float
    z: float
    """Of the association, against independence."""
    together: float
    """Share of the samples with the concept that have the parent, corrected for noise."""
    share: float
    """Share of all samples that have the concept, corrected for noise."""
    parent_share: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True, repr=False, eq=False)
class DiscoveredHierarchy:
    """A hierarchy with the evidence for each of its relations."""

    hierarchy: ConceptHierarchy
    evidence: tuple[Inclusion, ...]
    """One for every relation, strongest first."""
    undecided: tuple[Inclusion, ...]
    """Pairs left out although an inclusion is possible within the error: more samples would decide."""
    equivalent: tuple[tuple[str, str], ...]
    """Pairs included in each other, equally frequent within the error; no relation between them."""
    excluded: dict[str, str]
    """Concepts that could not be tested, and why; they stand alone."""
    low: tuple[float, ...]
    """Mean observation where a concept is absent: for labels, the rate of false alarms."""
    high: tuple[float, ...]
    """Mean observation where it is present: for labels, one less the rate of misses."""
    controls: tuple[int, ...]
    """Relations found in each copy of the data whose columns were shuffled on their own; all should be 0."""
    samples: int
    reason: str
    """How the values were read, and where the noise is known from."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "hierarchy": self.hierarchy.to_dict(),
            "evidence": [one.to_dict() for one in self.evidence],
            "undecided": [one.to_dict() for one in self.undecided],
            "equivalent": [list(pair) for pair in self.equivalent],
            "excluded": self.excluded,
            "low": list(self.low),
            "high": list(self.high),
            "controls": list(self.controls),
            "samples": self.samples,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        """Say what was found."""
        lines = [
            f"{len(self.evidence)} relations between {len(self.hierarchy)} concepts in {self.samples:,} samples; "
            f"in {len(self.controls)} copies with shuffled columns {sum(self.controls)}.",
            self.reason,
        ]
        if self.equivalent:
            lines.append("Equivalent: " + ", ".join(" = ".join(pair) for pair in self.equivalent) + ".")
        if self.undecided:
            lines.append(f"Undecided for want of samples: {len(self.undecided)} pairs.")
        lines += [f"{name}: {why}." for name, why in self.excluded.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the picture and what it rests on."""
        from utils.concepts.hierarchy_view import hierarchy_html

        said = "".join(f"<p>{escape(line)}</p>" for line in str(self).splitlines())
        return f"{hierarchy_html(self.hierarchy)}{said}"


def discover_hierarchy(
    values: Any,
    names: Sequence[str] | None = None,
    relation: str = IS_A,
    noise: Noise = None,
    inclusion: float = 0.8,
    significance: float = 6.0,
    controls: int = 20,
    seed: int = 0,
) -> DiscoveredHierarchy:
    """Find which concepts are included in which, from labels or activations.

    A concept gets a parent when both go together (z above `significance`), the parent is the more frequent one, and
    the noise-corrected coefficient is above `inclusion` and less than three standard errors below 1, those of the
    levels included; what follows from other relations is left out. An overlap that is nearer to an inclusion than the
    samples can tell counts as one.

    Args:
        values: ``(samples, concepts)``: labels 0 and 1, or activations. Non-negative activations with many exact zeros
            are read as present or absent; of others, two levels are fitted to each concept.
        names: Of the concepts; None numbers them.
        relation: What an inclusion is called: ``"is-a"`` or ``"requires"``.
        noise: Share of labels that are flipped, for all concepts or one each, or a pair (false alarms, misses) of
            these; None estimates it from the data, with misses and false alarms of a concept equally frequent.
        inclusion: Coefficient from which a pair counts as an inclusion.
        significance: Standard errors; 6 leaves no room for chance among millions of pairs.
        controls: Copies of the data with shuffled columns that are searched too.
        seed: Of the shuffling.

    Raises:
        DataError: The values are no finite table of at least 30 samples and two concepts.
        HierarchyError: Names, noise or bounds do not fit.
    """
    table = _table(values)
    names = [f"concept {number}" for number in range(table.shape[1])] if names is None else list(names)
    _check(table, names, inclusion, significance, controls)
    labels, read = _labels(table)
    if noise is not None and labels is None:
        raise HierarchyError(
            "A noise was given for activations that are neither 0 and 1 nor sparse.",
            "Their levels are fitted to each concept instead.",
            "Leave noise out, or give labels 0 and 1.",
        )
    used = table.double() if labels is None else labels.double()
    why = {
        name: "it has the same value in all samples"
        for name, same in zip(names, (used == used[0]).all(0).tolist(), strict=True)
        if same
    }
    kept = [number for number, name in enumerate(names) if name not in why]
    low, high = torch.zeros(len(names)).double(), torch.ones(len(names)).double()
    unsure = torch.zeros(2, len(names)).double()
    if labels is None and kept:
        low[kept], high[kept], gap = two_levels(used[:, kept])
        for number, apart in zip(kept, gap.tolist(), strict=True):
            if not apart > SMALLEST_GAP:
                why[names[number]] = f"its activations do not fall into two groups (separation {apart:.1f} of 2)"
        kept = [number for number in kept if names[number] not in why]
        read += "; the levels of each concept were fitted"
    held = moments(used[:, kept])
    if labels is None:
        unsure[:, kept] = level_errors(held, low[kept], high[kept])
    if labels is not None and len(kept) > 1:
        known = _given(noise, len(names), [names[one] for one in kept], held, kept)
        found = flip_rates(used[:, kept], held, significance) if known is None else None
        if found is not None:
            low[kept], high[kept], unsure[:, kept] = found.rates, 1 - found.rates, found.errors
            read += f"; the flip rate is {_said(found)}"
        elif known is not None:
            low[kept], high[kept] = known[0], 1 - known[1]
            read += "; the noise was given"
    search = _Search(held, low[kept], high[kept], unsure[:, kept], inclusion, significance)
    hierarchy = ConceptHierarchy()
    shares = dict(zip((names[one] for one in kept), search.share.tolist(), strict=True))
    for name in names:
        facts = (
            {"share of samples": round(min(1.0, max(0.0, shares[name])), 4)} if name in shares else {"note": why[name]}
        )
        hierarchy.add(name, **facts)
    pairs = {(names[kept[c]], names[kept[p]]): (p, c) for p, c in search.accepted.nonzero().tolist()}
    hierarchy.relate_all((concept, relation, parent) for concept, parent in pairs)
    hierarchy = hierarchy.reduced()
    evidence = [search.inclusion(names, kept, *pairs[one.concept, one.parent]) for one in hierarchy.relations(relation)]
    hierarchy = _with_facts(hierarchy, relation, evidence)
    open_pairs = [search.inclusion(names, kept, p, c) for p, c in search.open.nonzero().tolist()]
    return DiscoveredHierarchy(
        hierarchy=hierarchy,
        evidence=tuple(sorted(evidence, key=lambda one: (-one.z, one.concept, one.parent))),
        undecided=tuple(sorted(open_pairs, key=lambda one: (-one.z, one.concept, one.parent))),
        equivalent=tuple((names[kept[p]], names[kept[c]]) for p, c in search.equivalent.triu(1).nonzero().tolist()),
        excluded=why,
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        controls=_controls(
            used[:, kept],
            low[kept],
            high[kept],
            unsure[:, kept],
            labels is not None and noise is None,
            search,
            controls,
            seed,
        ),
        samples=len(table),
        reason=f"{read[0].upper()}{read[1:]}.",
    )


class _Search:
    """All pairs at once; rows are parents, columns concepts."""

    def __init__(
        self, held: Moments, low: Tensor, high: Tensor, unsure: Tensor, inclusion: float, significance: float
    ) -> None:
        """Take the levels ``(concepts,)`` and ``unsure``, the standard errors ``(2, concepts)`` of low and high."""
        self.bound, self.significance = inclusion, significance
        tiny = 1e-9
        below, above = (held.mean - low).clamp(min=tiny), (high - held.mean).clamp(min=tiny)
        self.share = (held.mean - low) / (high - low)
        count = len(held.mean)
        everyone = torch.arange(count)
        parent, child = everyone.repeat_interleave(count), everyone.repeat(count)
        product = below[child] * above[parent]
        flat = held.covariance[parent, child] / product
        error = spread_of_product(held, parent, child, above[parent], below[child], flat) / product
        # A coefficient seen on few samples is never known better than by one of them.
        error = torch.maximum(error, 1 / (held.count * self.share.clamp(min=1 / held.count))[child])
        # What is not known of the levels; a common flip rate moves both of a pair's, so that the two add up.
        moved = unsure[0][child] / below[child] + unsure[1][parent] / above[parent]
        error = (error**2 + (flat * moved) ** 2).sqrt()
        self.coefficient, self.error = flat.view(count, count), error.view(count, count)
        self.z = held.association
        scale = high - low
        unit = held.covariance / (scale[:, None] * scale[None])
        own = unit.diagonal()
        apart = self.share[:, None] - self.share[None]
        step = ((own[:, None] + own[None] - 2 * unit).clamp(min=0) / held.count).sqrt()
        strong = (self.z > significance) & ~torch.eye(count, dtype=torch.bool)
        possible = self.coefficient + REFUTED * self.error >= 1
        inside = strong & possible & (self.coefficient > inclusion)
        self.equivalent = inside & inside.T & (apart.abs() <= SIDE * step)
        # Ties go to the earlier column, so that the order of frequencies is total and no cycle can come about.
        order = torch.argsort(torch.argsort(self.share, descending=True, stable=True))
        rarer = order[:, None] < order[None]
        self.accepted = inside & rarer & ~self.equivalent
        upper = self.coefficient + SIDE * self.error
        self.open = strong & rarer & ~inside & (upper >= 1)

    def inclusion(self, names: Sequence[str], kept: Sequence[int], parent: int, child: int) -> Inclusion:
        """Return what is known about a pair."""
        value, error = float(self.coefficient[parent, child]), float(self.error[parent, child])
        share = float(self.share[parent])
        return Inclusion(
            concept=names[kept[child]],
            parent=names[kept[parent]],
            coefficient=value,
            low=value - SIDE * error,
            high=value + SIDE * error,
            z=float(self.z[parent, child]),
            together=min(1.0, max(0.0, share + value * (1 - share))),
            share=float(self.share[child]),
            parent_share=share,
        )


def _controls(
    values: Tensor, low: Tensor, high: Tensor, unsure: Tensor, estimate: bool, search: _Search, count: int, seed: int
) -> tuple[int, ...]:
    """Count the relations in copies whose columns were shuffled, searched as the data were."""
    found, columns = [], values.T
    for number in range(count):
        generator = torch.Generator().manual_seed(derive_seed("hierarchy control", seed, number))
        shuffled = values.gather(0, torch.rand(columns.shape, generator=generator).argsort(1).T)
        away = shuffled - shuffled.mean(0)
        scale = (away**2).sum(0).sqrt()
        z = (away.T @ away) / (scale[:, None] * scale[None]) * len(values) ** 0.5
        if not (z.triu(1) > search.significance).any():
            # Nothing goes together, so nothing can be included: the rest of the search needs no look.
            found.append(0)
            continue
        held = moments(shuffled)
        levels = (low, high, unsure)
        if estimate:
            made = flip_rates(shuffled, held, search.significance)
            levels = (made.rates, 1 - made.rates, made.errors.expand(2, -1))
        found.append(int(_Search(held, *levels, search.bound, search.significance).accepted.sum()))
    return tuple(found)


def _with_facts(hierarchy: ConceptHierarchy, relation: str, evidence: Sequence[Inclusion]) -> ConceptHierarchy:
    """Return the hierarchy with the evidence at its relations."""
    made = ConceptHierarchy()
    for name in hierarchy:
        made.put(hierarchy.concept(name))
    made.relate_all(
        Relation(
            one.concept, relation, one.parent,
            {"coefficient": round(one.coefficient, 3), "low": round(one.low, 3), "high": round(one.high, 3),
             "z": round(one.z, 1)},
        )
        for one in evidence
    )  # fmt: skip
    return made


def _said(found: FlipRates) -> str:
    """Tell flip rates in a few words."""
    least, most = float(found.rates.min()), float(found.rates.max())
    number = f"{least:.1%}" if most - least < 5e-4 else f"{least:.1%} to {most:.1%}"
    return f"{number} ({found.reason})"


def _table(values: Any) -> Tensor:
    """Return the values as a tensor on the CPU, checked."""
    try:
        table = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The values are a {type(values).__name__} ({error}).",
            "A table (samples, concepts) of numbers was expected.",
            "Give a tensor or an array.",
        ) from None
    if table.dim() != 2 or table.is_complex() or len(table) < FEWEST_SAMPLES or table.shape[1] < 2:
        raise DataError(
            f"The values have the shape {tuple(table.shape)} and the type {str(table.dtype).removeprefix('torch.')}.",
            f"Real numbers of at least {FEWEST_SAMPLES} samples (rows) and 2 concepts (columns) were expected.",
            "Give one row per sample and one column per concept.",
        )
    if table.shape[1] > MOST_CONCEPTS:
        raise DataError(
            f"There are {table.shape[1]:,} concepts.",
            f"All pairs of at most {MOST_CONCEPTS:,} are compared.",
            "Choose those that matter, for example the features that are used most.",
        )
    if table.is_floating_point() and not table.isfinite().all():
        row, column = (~table.isfinite()).nonzero()[0].tolist()
        raise DataError(
            f"The value of sample {row}, concept {column} is {float(table[row, column])}.",
            "Finite numbers were expected.",
            "Remove the samples without a value.",
        )
    return table


def _labels(table: Tensor) -> tuple[Tensor | None, str]:
    """Return the values as labels if that is what they are, and how they were read."""
    if table.dtype == torch.bool or bool(((table == 0) | (table == 1)).all()):
        return table.bool(), "the values are labels 0 and 1"
    if bool((table >= 0).all()) and bool(((table == 0).double().mean(0) >= SPARSE).all()):
        return (
            table > 0,
            f"the values are never negative and at least {SPARSE:.0%} of each concept's are 0: above 0 it is there",
        )
    return None, "the values are activations"


def _check(table: Tensor, names: list[str], inclusion: float, significance: float, controls: int) -> None:
    """Check what goes with the table."""
    for name in names:
        check_name(name, "concept")
    if len(names) != table.shape[1] or len(set(names)) != len(names):
        raise HierarchyError(
            f"There are {len(names)} names, {len(set(names))} of them different, for {table.shape[1]} columns.",
            "Every concept needs a name of its own.",
            "Give as many different names as there are columns.",
        )
    if not 0 < inclusion < 1 or not significance > 0 or controls < 0:
        raise HierarchyError(
            f"inclusion is {inclusion}, significance {significance}, controls {controls}.",
            "Expected 0 < inclusion < 1, significance > 0 and controls >= 0.",
            "0.8, 6 and 20 are the usual ones.",
        )


def _given(
    noise: Noise, count: int, names: Sequence[str], held: Moments, kept: Sequence[int]
) -> tuple[Tensor, Tensor] | None:
    """Return false alarms and misses of the concepts that are tested, checked; None if they are to be estimated."""
    if noise is None:
        return None
    both = noise if isinstance(noise, tuple) and len(noise) == 2 else (noise, noise)
    rates = []
    for one in both:
        try:
            given = torch.as_tensor(one, dtype=torch.float64).cpu()
            rates.append(given.expand(count)[list(kept)])
        except (TypeError, ValueError, RuntimeError):
            raise HierarchyError(
                f"The noise is {str(noise)[:80]}.",
                f"Expected a share, {count} of them, or a pair (false alarms, misses) of these.",
                "Give for example noise=0.05.",
            ) from None
    alarms, misses = rates
    for name, alarm, miss, mean in zip(names, alarms.tolist(), misses.tolist(), held.mean.tolist(), strict=True):
        if not (0 <= alarm < mean < 1 - miss <= 1):
            raise HierarchyError(
                f"{name!r} is labelled in {mean:.2%} of the samples; false alarms are {alarm:.2%}, misses {miss:.2%}.",
                "With such noise the share lies between the false alarms and one less the misses.",
                "Give a smaller noise, or noise=None to estimate it.",
            )
    return alarms, misses
