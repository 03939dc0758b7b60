"""A hierarchy found in data: which concepts are included in which others, in spite of noisy labels.

That most samples with c have p too proves little: p may be common, or c's labels wrong. What is tested is the
noise-corrected coefficient of homogeneity (see `hierarchy_noise`): 1 where c is included in p, 0 where the two are
independent, whatever their frequencies and the noise. How well it is known is in `hierarchy_inclusion`. All inclusions
together make a partial order, whose transitive reduction has every direct parent, be there one or several.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.hierarchy_inclusion import Search, rates_as_likely
from utils.concepts.hierarchy_noise import (
    SMALLEST_GAP,
    FlipRates,
    Moments,
    flip_rates,
    level_errors,
    moments,
    two_levels,
)
from utils.concepts.hierarchy_order import HierarchyError
from utils.concepts.hierarchy_parts import IS_A, RELATIONS, Relation, check_name
from utils.runtime.errors import DataError
from utils.runtime.seeding import derive_seed
from utils.runtime.settings import shown

FEWEST_SAMPLES, MOST_CONCEPTS, MOST_CONTROLS = 30, 4096, 10_000
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
    chance: float
    """Probability that it is an inclusion, given how the coefficients of all pairs are spread; the least one where the
    flip rate is uncertain. Held against overlaps in `benchmarks/concepts_hierarchy.py`: up to 0.95 it errs on the safe
    side. It is no calibrated frequency for overlaps nearer to 1 than the samples resolve (0.97 and more with 500
    samples, or with 6,000 and 5 % flipped), where it says a fourth to a twentieth of the errors, nor where the noise is
    not as said."""
    z: float
    """Of the association, against independence."""
    together: float
    """Share of the samples with the concept that have the parent, corrected for noise."""
    share: float
    """Share of all samples that have the concept, corrected for noise."""
    parent_share: float
    samples_needed: int | None = None
    """Of an undecided pair: samples that decide about nine of ten such pairs (measured: 88 %), None if over a million
    times as many."""

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
    """Pairs left out because the data can neither tell that they are inclusions nor that they are not, or not which of
    two includes the other; each says how many samples would probably decide. What follows from other relations is
    not among them."""
    ruled_out: int
    """Pairs that mostly go together (coefficient above a half) and yet have no relation, direct or by way of others."""
    equivalent: tuple[tuple[str, str], ...]
    """Pairs included in each other, equally frequent within the error; no relation between them."""
    excluded: dict[str, str]
    """Concepts that could not be tested, and why; they stand alone."""
    low: tuple[float, ...]
    """Mean observation where a concept is absent: for labels, the rate of false alarms."""
    high: tuple[float, ...]
    """Mean observation where it is present: for labels, one less the rate of misses."""
    controls: tuple[int, ...]
    """Relations found in each copy of the data whose columns were shuffled on their own; all should be 0. They control
    chance association only, not overlaps."""
    samples: int
    reason: str
    """How the values were read, and where the noise is known from."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "hierarchy": self.hierarchy.to_dict(),
            "evidence": [one.to_dict() for one in self.evidence],
            "undecided": [one.to_dict() for one in self.undecided],
            "ruled_out": self.ruled_out,
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
            f"in {len(self.controls)} copies with shuffled columns {sum(self.controls)} "
            "(these control chance, not overlaps).",
            self.reason,
        ]
        if self.equivalent:
            lines.append("Equivalent: " + ", ".join(" = ".join(pair) for pair in self.equivalent) + ".")
        if self.undecided:
            count, one = len(self.undecided), min(self.undecided, key=lambda one: one.samples_needed or math.inf)
            needed = f"{one.samples_needed:,}" if one.samples_needed else "far more"
            lines.append(
                f"Undecided for want of samples: {count} pair{'s' * (count != 1)}; the first to be decided would be "
                f"{one.concept} and {one.parent} (coefficient {one.coefficient:.2f}), with about {needed} samples."
            )
        if self.ruled_out:
            lines.append(
                f"{self.ruled_out} pair{'s' * (self.ruled_out != 1)} of concepts that mostly go together "
                f"{'were' if self.ruled_out != 1 else 'was'} ruled out; if misses and false alarms differ from the "
                "noise said above, give noise=(false alarms, misses)."
            )
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

    A concept gets a parent when both go together (z above `significance`), the parent is the more frequent one, the
    noise-corrected coefficient is above `inclusion`, and the pair is an inclusion with a probability of at least two
    thirds (see `hierarchy_inclusion`); what follows from other relations is left out. Pairs between that and 5 % are
    undecided. So are those that the estimated flip rate makes inclusions where the data do not rule out a smaller rate
    (see `rates_as_likely`). Where the middle one of three is undecided, a relation may lead past it.

    Args:
        values: ``(samples, concepts)``: labels 0 and 1, or activations. Non-negative activations with many exact zeros
            are read as present or absent; of others, two levels are fitted to each concept.
        names: Of the concepts; None numbers them.
        relation: What an inclusion is called: ``"is-a"`` or ``"requires"``.
        noise: Share of labels that are flipped, for all concepts or one each, or a pair (false alarms, misses) of
            these; None estimates it from the data, with misses and false alarms of a concept equally frequent. Give it
            where it is known: overlaps that are no inclusions, but whose concepts are as frequent everywhere outside
            the group they share, are distributed as inclusions whose labels are flipped that often.
        inclusion: Coefficient below which a pair is never called an inclusion.
        significance: Standard errors; 6 leaves no room for chance among millions of pairs.
        controls: Copies of the data with shuffled columns that are searched too.
        seed: Of the shuffling.

    Raises:
        DataError: The values are no finite table of at least 30 samples and two concepts.
        HierarchyError: Names, noise or bounds do not fit.
    """
    table = _table(values)
    names = _names(names, table.shape[1])
    _check(relation, inclusion, significance, controls, seed)
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
    held, found = moments(used[:, kept]), None
    if labels is None:
        unsure[:, kept] = level_errors(held, low[kept], high[kept])
    if labels is not None and len(kept) > 1:
        rates = _given(noise, len(names), [names[one] for one in kept], held, kept)
        found = flip_rates(used[:, kept], held, significance) if rates is None else None
        if found is not None:
            low[kept], high[kept], unsure[:, kept] = found.rates, 1 - found.rates, found.errors
            read += f"; the flip rate is {_said(found)}, with misses and false alarms taken as equally frequent"
        elif rates is not None:
            low[kept], high[kept] = rates[0], 1 - rates[1]
            read += "; the noise was given"
    # Whether the levels are estimated: the flip rate, or those of activations.
    bounds = (inclusion, significance, found is not None or labels is None)
    search = Search(used[:, kept], held, low[kept], high[kept], unsure[:, kept], *bounds)
    if found is not None:
        lower, factor = rates_as_likely(held, found, significance)
        if lower:
            search.beside(
                [Search(used[:, kept], held, one, 1 - one, unsure[:, kept], *bounds) for one in lower], factor
            )
            read += ". The data do not rule out that fewer labels are flipped: only what holds then too is a relation"
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
    evidence = [_inclusion(search, names, kept, *pairs[one.concept, one.parent]) for one in hierarchy.relations()]
    hierarchy = _with_facts(hierarchy, relation, evidence)
    open_pairs = [_inclusion(search, names, kept, p, c) for p, c in search.open.nonzero().tolist()]
    above = {name: set(hierarchy.ancestors(name, relation)) for name in {one.concept for one in open_pairs}}
    open_pairs = [one for one in open_pairs if one.parent not in above[one.concept]]
    related = {name: set(hierarchy.ancestors(name, relation)) for name in names}
    refuted = [(names[kept[c]], names[kept[p]]) for p, c in search.refuted.nonzero().tolist()]
    return DiscoveredHierarchy(
        hierarchy=hierarchy,
        ruled_out=sum(parent not in related[child] for child, parent in refuted),
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


def _inclusion(search: Search, names: Sequence[str], kept: Sequence[int], parent: int, child: int) -> Inclusion:
    """Return what is known about a pair."""
    value = float(search.coefficient[parent, child])
    share = float(search.share[parent])
    return Inclusion(
        concept=names[kept[child]],
        parent=names[kept[parent]],
        coefficient=value,
        low=float(search.low[parent, child]),
        high=float(search.high[parent, child]),
        chance=float(search.chance[parent, child]),
        z=float(search.z[parent, child]),
        together=min(1.0, max(0.0, share + value * (1 - share))),
        share=float(search.share[child]),
        parent_share=share,
        samples_needed=search.samples_needed(parent, child) if search.open[parent, child] else None,
    )


def _controls(
    values: Tensor, low: Tensor, high: Tensor, unsure: Tensor, estimate: bool, search: Search, count: int, seed: int
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
        found.append(int(Search(shuffled, held, *levels, search.bound, search.significance).accepted.sum()))
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
        table = torch.as_tensor(values).detach().to_dense().cpu()
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
    least, most = float(table.min()), float(table.max())
    if bool(((table == least) | (table == most)).all()):
        return table == most, f"the values are labels: {most:g} where a concept is there, {least:g} where it is not"
    if bool((table >= 0).all()) and bool(((table == 0).double().mean(0) >= SPARSE).all()):
        return (
            table > 0,
            f"the values are never negative and at least {SPARSE:.0%} of each concept's are 0: above 0 it is there",
        )
    return None, "the values are activations"


def _names(names: Any, count: int) -> list[str]:
    """Return the names of the columns, checked."""
    if names is None:
        return [f"concept {number}" for number in range(count)]
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise HierarchyError(
            f"The names are a {type(names).__name__}.",
            f"A list of {count} names was expected.",
            "Give one name for each column, or None to number them.",
        )
    names = list(names)
    for name in names:
        check_name(name, "concept")
    if len(names) != count or len(set(names)) != len(names):
        raise HierarchyError(
            f"There are {len(names)} names, {len(set(names))} of them different, for {count} columns.",
            "Every concept needs a name of its own.",
            "Give as many different names as there are columns.",
        )
    return names


def _check(relation: Any, inclusion: Any, significance: Any, controls: Any, seed: Any) -> None:
    """Check the settings of the search."""
    if not isinstance(relation, str) or relation not in RELATIONS:
        raise HierarchyError(
            f"There is no relation {shown(relation)}.",
            f"There are {' and '.join(map(repr, RELATIONS))}.",
            f"Leave relation out for {IS_A!r}.",
        )
    for name, value, kind, fits, range_, usual in (
        ("inclusion", inclusion, Real, lambda one: 0 < one < 1, "number above 0 and below 1", "0.8"),
        ("significance", significance, Real, lambda one: 0 < one < math.inf, "finite number above 0", "6"),
        ("controls", controls, Integral, lambda one: 0 <= one <= MOST_CONTROLS,
         f"whole number from 0 to {MOST_CONTROLS:,}", "20"),
        ("seed", seed, Integral, lambda one: True, "whole number", "0"),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
            raise HierarchyError(
                f"{name} is {shown(value)}.", f"A {range_} was expected.", f"Leave {name} out for {usual}."
            )


def _given(
    noise: Noise, count: int, names: Sequence[str], held: Moments, kept: Sequence[int]
) -> tuple[Tensor, Tensor] | None:
    """Return false alarms and misses of the concepts that are tested, checked; None if they are to be estimated."""
    if noise is None:
        return None
    if isinstance(noise, (bool, str)):
        raise _no_noise(noise, count)
    both = noise if isinstance(noise, tuple) and len(noise) == 2 else (noise, noise)
    rates = []
    for one in both:
        try:
            given = torch.as_tensor(one, dtype=torch.float64).cpu()
            rates.append(given.expand(count)[list(kept)])
        except (TypeError, ValueError, RuntimeError):
            raise _no_noise(noise, count) from None
    alarms, misses = rates
    for name, alarm, miss, mean in zip(names, alarms.tolist(), misses.tolist(), held.mean.tolist(), strict=True):
        if not (0 <= alarm < mean < 1 - miss <= 1):
            raise HierarchyError(
                f"{name!r} is labelled in {mean:.2%} of the samples; false alarms are {alarm:.2%}, misses {miss:.2%}.",
                "With such noise the share lies between the false alarms and one less the misses.",
                "Give a smaller noise, or noise=None to estimate it.",
            )
    return alarms, misses


def _no_noise(noise: Any, count: int) -> HierarchyError:
    """Return the error for something that is no noise."""
    return HierarchyError(
        f"The noise is {shown(noise)}.",
        f"Expected a share, {count} of them, or a pair (false alarms, misses) of these.",
        "Give for example noise=0.05, or noise=None to estimate it.",
    )
