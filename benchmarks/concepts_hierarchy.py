"""Hierarchies of concepts: rules, speed and discovery: `python benchmarks/concepts_hierarchy.py [--seeds 20]`.

Rules: on random graphs with both relations every invariant of a hierarchy is checked against a slow, plain reading of
its definition. Discovery: hierarchies are planted (a concept is there in a share of the samples that have all its
parents), labels are flipped, and the relations found are compared with those planted. The controls have shuffled
columns, or overlaps without any inclusion.

Judged, and the reason for exit status 1: the mean F1 of every row up to 5 % flipped, those with overlaps up to 0.95 at
6,000 samples included; no relation in shuffled columns, nor in overlaps without inclusion. Not judged: more than 5 %,
and overlaps whose outsiders have a concept at one rate where the noise must be estimated: they are distributed just as
inclusions whose labels are flipped at that rate, so nothing but a known noise tells the two apart. Nor
overlaps of 0.99, and those of 0.97 with an estimated noise: the samples do not tell them from inclusions.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools

from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.hierarchy_discovery import discover_hierarchy
from utils.concepts.hierarchy_order import HierarchyError

CONCEPTS, SAMPLES = 40, 6000
RAREST = 0.03
"""Share of the samples that a planted concept has at least."""
SHARES = (0.3, 0.75)
"""Of the samples with all parents, the share that has the concept: lowest and highest."""
NEAR = (0.3, 0.95)
"""The same where siblings all but include one another."""
TARGET = 0.9
"""Mean F1 of every row up to 5 % flipped."""
SIZES = (20_000, 60_000)
"""Other numbers of samples for which near overlaps are shown."""


def ancestry(parents: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return all ancestors, by walking."""
    found: dict[str, set[str]] = {}
    for name in parents:
        waiting, seen = list(parents[name]), set()
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                waiting.extend(parents[one])
        found[name] = seen
    return found


def broken_rules(seed: int) -> list[str]:
    """Build a random hierarchy sentence by sentence; return the rules that it breaks."""
    dice = random.Random(seed)
    names = [f"n{number}" for number in range(dice.randint(1, 30))]
    hierarchy, broken = ConceptHierarchy(), []
    parents: dict[str, dict[str, set[str]]] = {kind: {name: set() for name in names} for kind in ("requires", "is-a")}
    for name in names:
        hierarchy.add(name, difficulty=dice.randint(0, 3), domain=dice.choice(("", "a", "b")))
    for _ in range(dice.randint(0, 90)):
        kind, concept, parent = dice.choice(("requires", "is-a")), dice.choice(names), dice.choice(names)
        closes = concept == parent or concept in ancestry(parents[kind])[parent]
        try:
            hierarchy.relate(concept, kind, parent)
            if closes:
                broken.append("a cycle was accepted")
            parents[kind][concept].add(parent)
        except HierarchyError:
            if not closes:
                broken.append("a relation was refused that closes no cycle")
    reduced = hierarchy.reduced()
    chosen = dice.sample(names, dice.randint(1, len(names)))
    part = hierarchy.restricted(chosen)
    for kind, above in parents.items():
        up, levels = ancestry(above), hierarchy.levels(kind)
        for name in names:
            if set(hierarchy.ancestors(name, kind)) != up[name]:
                broken.append("ancestors")
            if set(hierarchy.descendants(name, kind)) != {one for one in names if name in up[one]}:
                broken.append("descendants")
            if levels[name] != (1 + max(levels[one] for one in above[name]) if above[name] else 0):
                broken.append("levels")
        order = hierarchy.learning_order(kind)
        place = {name: number for number, name in enumerate(order)}
        if sorted(order) != sorted(names) or any(place[one] > place[name] for name in names for one in above[name]):
            broken.append("learning order")
        if order != reduced.learning_order(kind) or levels != reduced.levels(kind):
            broken.append("the reduction changes the order or a level")
        if any(set(reduced.ancestors(name, kind)) != up[name] for name in names):
            broken.append("the reduction changes ancestors")
        if any(set(part.ancestors(name, kind)) != up[name] & set(chosen) for name in chosen):
            broken.append("a part loses or invents ancestors")
    if ConceptHierarchy.from_dict(hierarchy.to_dict()) != hierarchy:
        broken.append("to_dict and from_dict")
    return broken


def planted(
    seed: int, several: float = 0.5, samples: int = SAMPLES, shares: tuple[float, float] = SHARES
) -> tuple[Tensor, set[tuple[int, int]]]:
    """Return labels ``(samples, concepts)`` of a planted hierarchy and its relations (concept, parent).

    Args:
        seed: Of the hierarchy and the samples.
        several: Share of concepts with two or three parents, none of which stands above another.
        samples: How many.
        shares: Of the samples with all parents, the share that has the concept.
    """
    dice = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=dice))

    labels, above = torch.zeros(samples, 0, dtype=torch.bool), []
    edges: set[tuple[int, int]] = set()
    while (count := labels.shape[1]) < CONCEPTS:
        parents: list[int] = []
        if count < 5 or draw(0, 1) < 0.05:
            column = torch.rand(samples, generator=dice) < draw(0.3, 0.7)
        else:
            number = 1 if draw(0, 1) >= several else int(draw(2, 4))
            parents = torch.randperm(count, generator=dice)[:number].tolist()
            parents = [one for one in parents if not any(one in above[other] for other in parents)]
            column = labels[:, parents].all(1) & (torch.rand(samples, generator=dice) < draw(*shares))
            if float(column.double().mean()) < RAREST:
                continue
        above.append(set(parents).union(*(above[one] for one in parents)))
        edges |= {(count, one) for one in parents}
        labels = torch.cat([labels, column[:, None]], 1)
    return labels, edges


def flipped(labels: Tensor, rate: float, seed: int, varied: bool = False) -> Tensor:
    """Flip labels at a rate, or every concept's at its own between half and one and a half times the rate."""
    dice = torch.Generator().manual_seed(seed + 1_000_003)
    rates = rate * (0.5 + torch.rand(labels.shape[1], generator=dice)) if varied else torch.tensor(rate)
    return labels ^ (torch.rand(labels.shape, generator=dice) < rates)


@dataclass(frozen=True)
class Score:
    """What was found in one data set."""

    f1: float
    precision: float
    recall: float
    untrue: int
    """Relations found that are no inclusions at all, not even by way of others."""
    undecided: int
    """Pairs."""


def score(values: Tensor, edges: set[tuple[int, int]], noise: float | None = None) -> Score:
    """Compare the relations found, with the noise estimated or given, with those planted."""
    names = [str(number) for number in range(values.shape[1])]
    result = discover_hierarchy(values, names, noise=noise, controls=0)
    found = {(int(one.concept), int(one.parent)) for one in result.evidence}
    parents: dict[str, set[str]] = {name: set() for name in names}
    for concept, parent in edges:
        parents[str(concept)].add(str(parent))
    above, hits = ancestry(parents), len(found & edges)
    return Score(
        f1=2 * hits / max(1, len(found) + len(edges)),
        precision=hits / max(1, len(found)),
        recall=hits / max(1, len(edges)),
        untrue=sum(str(parent) not in above[str(concept)] for concept, parent in found),
        undecided=len(result.undecided),
    )


def overlapping(
    seed: int, rate: float, most: float = 0.65, outside: float = 0.1, samples: int = SAMPLES, alike: bool = False
) -> Tensor:
    """Return labels of 30 concepts that overlap without including one another.

    Args:
        seed: Of the samples.
        rate: Of flips.
        most: Of the samples of a hidden group, the highest share that has a concept; the lowest is 0.3.
        outside: Share of the other samples that have it.
        samples: How many.
        alike: Give two concepts of each group the highest share.
    """
    dice = torch.Generator().manual_seed(seed)
    groups = (torch.rand(samples, 6, generator=dice) < 0.4)[:, torch.arange(30) % 6]
    shares = 0.3 + (most - 0.3) * torch.rand(30, generator=dice)
    if alike:
        shares[:12] = most
    inside = torch.rand(samples, 30, generator=dice) < shares
    others = torch.rand(samples, 30, generator=dice) < outside
    return flipped(torch.where(groups, inside, others), rate, seed)


def row(name: str, scores: Sequence[Score], missed: list[str] | None = None) -> None:
    """Print a row of the table of discovery; note it in `missed` if it has to reach the target and does not."""
    mean = {part: statistics.mean(getattr(one, part) for one in scores) for part in asdict(scores[0])}
    if missed is not None and mean["f1"] < TARGET:
        missed.append(f"F1 {mean['f1']:.3f} of {TARGET} with {name}")
    shown = [f"{mean['f1']:.3f}", f"{min(one.f1 for one in scores):.3f}", f"{mean['precision']:.3f}"]
    shown += [f"{mean['recall']:.3f}", f"{mean['untrue']:.1f}", f"{mean['undecided']:.1f}", str(len(scores))]
    print(f"| {name} | {' | '.join(shown)} |", flush=True)


def speed() -> None:
    """Time levels and orders of large hierarchies."""
    print("\n| hierarchy | built at once | one by one | levels | learning order |\n|---|---|---|---|---|")
    for count, edges in ((1_000, 5_000), (100_000, 300_000)):
        dice = random.Random(0)
        numbers = list(range(count))
        dice.shuffle(numbers)
        said = []
        for _ in range(edges):
            low, high = sorted(dice.sample(range(count), 2))
            said.append((str(numbers[high]), "requires", str(numbers[low])))
        times = [time.perf_counter()]
        hierarchy = ConceptHierarchy.from_relations(said)
        times.append(time.perf_counter())
        single = ConceptHierarchy()
        for name in hierarchy:
            single.add(name)
        for one in said[:100_000]:
            single.relate(*one)
        times.append(time.perf_counter())
        hierarchy.levels()
        times.append(time.perf_counter())
        hierarchy.learning_order()
        times.append(time.perf_counter())
        first, second, third, fourth = (after - before for before, after in itertools.pairwise(times))
        print(f"| {count:,} concepts, {edges:,} relations | {first:.2f} s | {second:.2f} s ({len(said[:100_000]):,}) "
              f"| {third * 1e3:.0f} ms | {fourth * 1e3:.0f} ms |", flush=True)  # fmt: skip


def main() -> int:
    """Measure and print; return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed of discovery")
    given = parser.parse_args()
    failures = [broken for seed in range(given.graphs) if (broken := broken_rules(seed))]
    print(f"{given.graphs} random hierarchies: {len(failures)} break a rule{f': {failures[:3]}' if failures else ''}")
    missed = [f"{len(failures)} random hierarchies break a rule"] if failures else []
    speed()
    print(f"\n{CONCEPTS} concepts, {SAMPLES:,} samples, every concept in at least {RAREST:.0%} of them\n")
    print("| labels | F1, mean | F1, least | precision | recall | untrue | undecided | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    seeds = range(given.first, given.first + given.seeds)
    for rate in (0.0, 0.01, 0.05, 0.1):
        for name, several in (("one parent", 0.0), ("half with 2 or 3 parents", 0.5)):
            row(f"{name}, {rate:.0%} flipped", [score(flipped(planted(s, several)[0], rate, s), planted(s, several)[1])
                                               for s in seeds], missed if rate <= 0.05 else None)  # fmt: skip
    cases = [(rate, SAMPLES) for rate in (0.0, 0.01, 0.05, 0.1)] + [(0.05, size) for size in SIZES]
    for rate, size in cases:
        name = f"half with 2 or 3 parents, overlaps up to {NEAR[1]}, {rate:.0%} flipped, {size:,} samples"
        judged = missed if rate <= 0.05 else None
        scores: dict[float | None, list[Score]] = {None: [], rate: []}
        for s in seeds:
            labels, edges = planted(s, samples=size, shares=NEAR)
            for noise, some in scores.items():
                some.append(score(flipped(labels, rate, s), edges, noise))
        row(name, scores[None], judged)
        row(f"{name}, noise given", scores[rate], judged)
    row("half with 2 or 3 parents, 2.5 % to 7.5 % flipped",
        [score(flipped(planted(s)[0], 0.05, s, varied=True), planted(s)[1]) for s in seeds], missed)  # fmt: skip
    for apart in (3.0, 4.0):
        noisy = [torch.randn(SAMPLES, CONCEPTS, generator=torch.Generator().manual_seed(s)) for s in seeds]
        scored = [score(planted(s)[0] * apart + one, planted(s)[1]) for s, one in zip(seeds, noisy, strict=True)]
        row(f"the same as activations, {apart:.0f} standard deviations apart", scored, missed)
    shuffled = [sum(discover_hierarchy(flipped(planted(s)[0], 0.05, s), controls=20, seed=s).controls) for s in seeds]
    print(
        f"\nRelations found in shuffled columns: {sum(shuffled)} in {20 * len(shuffled)} copies of {len(shuffled)} data"
    )
    missed += [f"{sum(shuffled)} relations in shuffled columns"] if sum(shuffled) else []
    print("\n| overlaps without inclusion | flipped | noise | relations found | undecided | data |")
    print("|---|---|---|---|---|---|")
    for most, outside, told in ((0.65, 0.1, False), (0.95, 0.0, False), (0.95, 0.0, True), (0.95, 0.1, True),
                                (0.95, 0.1, False)):  # fmt: skip
        for rate in (0.0, 0.05):
            results = [
                discover_hierarchy(overlapping(s, rate, most, outside), noise=rate if told else None, controls=0)
                for s in seeds
            ]
            false, unsure = (sum(len(getattr(one, part)) for one in results) for part in ("evidence", "undecided"))
            counts = told or not (most > 0.65 and outside)
            name = f"up to {most}, {outside:.0%} outside{'' if counts else ' (not judged)'}"
            source = "given" if told else "estimated"
            print(f"| {name} | {rate:.0%} | {source} | {false} | {unsure} | {len(results)} |", flush=True)
            if false and counts:
                missed.append(f"{false} relations in overlaps {name}, {rate:.0%} flipped")
    for size, most, rate, told, counts in (
        (200, 0.9, 0.0, False, True), (500, 0.95, 0.0, False, True), (300, 0.9, 0.05, False, True),
        (500, 0.95, 0.0, True, True), (6000, 0.97, 0.05, True, True), (6000, 0.97, 0.05, False, False),
        (500, 0.99, 0.0, False, False),
        (6000, 0.99, 0.05, True, False), (20_000, 0.99, 0.05, True, False), (6000, 0.99, 0.05, False, False),
    ):  # fmt: skip
        results = [
            discover_hierarchy(overlapping(s, rate, most, 0.0, size, True), noise=rate if told else None, controls=0)
            for s in seeds
        ]
        false, unsure = (sum(len(getattr(one, part)) for one in results) for part in ("evidence", "undecided"))
        name = f"two alike of {most}, {size:,} samples{'' if counts else ' (not judged)'}"
        source = "given" if told else "estimated"
        print(f"| {name} | {rate:.0%} | {source} | {false} | {unsure} | {len(results)} |", flush=True)
        if false and counts:
            missed.append(f"{false} relations in overlaps {name}, {rate:.0%} flipped")
    print(f"\ntargets: {'missed: ' + '; '.join(missed) if missed else 'met'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
