"""Where the concepts of a hierarchy stand in a picture: columns by level, few crossings, straight lines where possible.

The layers of Sugiyama, Tagawa and Toda ("Methods for visual understanding of hierarchical system structures", 1981):
longest-path levels, a point in every column that a line passes, order by barycentres, and then the places that are
nearest to the neighbours' in the least-squares sense.
"""

import unicodedata
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from utils.concepts.hierarchy import ConceptHierarchy
from utils.concepts.hierarchy_order import AcyclicGraph, Cycle, HierarchyError
from utils.concepts.hierarchy_parts import RELATIONS, Relation

MOST_SHOWN = 300
"""Concepts that a picture can hold and still be read."""
HEIGHT, GAP, LINE_GAP, COLUMN_GAP, MARGIN = 28.0, 12.0, 10.0, 70.0, 12.0
"""Pixels: of a box, between boxes, between lines that pass, between columns, around the picture."""
CHARACTER, PADDING, LONGEST_LABEL = 7.2, 20.0, 28
"""Pixels of a character and around a label; characters of a label."""
SWEEPS = 12
Node = str | tuple[int, int]
"""A concept, or the point of relation number i in column j."""


@dataclass(frozen=True)
class Box:
    """A concept in the picture, in pixels from the upper left corner."""

    name: str
    label: str
    left: float
    middle: float
    width: float


@dataclass(frozen=True)
class Line:
    """A relation in the picture: points from the parent's right edge to the concept's left edge, in pixels."""

    relation: Relation
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Layout:
    """A picture's plan."""

    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    width: float
    height: float


def shortened(name: str, longest: int = LONGEST_LABEL) -> str:
    """Return a name of at most so many characters."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def label_width(label: str) -> float:
    """Return about how many pixels a label takes; signs of East Asia are twice as wide."""
    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in label)
    return (len(label) + wide) * CHARACTER + PADDING


def layered_layout(hierarchy: ConceptHierarchy) -> Layout:
    """Place the concepts of a hierarchy, of which only relations that do not follow from others are drawn.

    Concepts without relations stand in rows of their own below the others.

    Raises:
        HierarchyError: It is empty, or has more concepts than can be read.
    """
    if not 0 < len(hierarchy) <= MOST_SHOWN:
        raise HierarchyError(
            f"The hierarchy has {len(hierarchy):,} concepts.",
            f"A picture shows 1 to {MOST_SHOWN}.",
            "Draw a part of it: hierarchy.domain(name) or hierarchy.restricted(names).",
        )
    relations = hierarchy.reduced().relations()
    related = {name for one in relations for name in (one.concept, one.parent)}
    level = _columns(sorted(related), relations)
    columns, chains = _with_points(level, relations)
    _order(columns, chains)
    middles = _middles(columns, chains)
    widths = {name: label_width(shortened(name)) for name in hierarchy}
    edges, left = [], MARGIN
    for column in columns:
        edges.append(left)
        left += max(widths[node] for node in column if isinstance(node, str)) + COLUMN_GAP
    right = max(left - COLUMN_GAP, MARGIN)
    boxes = {
        name: Box(name, shortened(name), edges[level[name]], middles[name], widths[name])
        for column in columns
        for name in column
        if isinstance(name, str)
    }
    ends = [max(boxes[name].left + boxes[name].width for name in c if isinstance(name, str)) for c in columns]
    lines = []
    for number, one in enumerate(relations):
        parent, child = boxes[one.parent], boxes[one.concept]
        points = [(parent.left + parent.width, parent.middle)]
        for node in chains[number][1:-1]:
            # A passing line stays level over the whole column, so that it crosses no box.
            assert isinstance(node, tuple)
            points += [(edges[node[1]], middles[node]), (ends[node[1]], middles[node])]
        lines.append(Line(one, (*points, (child.left, child.middle))))
    bottom = max([MARGIN, *(y + HEIGHT / 2 + GAP for y in middles.values())])
    alone = [name for name in sorted(hierarchy) if name not in related]
    wide = max(right, min(900.0, sum(widths[name] + GAP for name in alone)))
    across, top = MARGIN, bottom + (GAP if related else 0)
    for name in alone:
        if across > MARGIN and across + widths[name] > wide:
            across, top = MARGIN, top + HEIGHT + GAP
        boxes[name] = Box(name, shortened(name), across, top + HEIGHT / 2, widths[name])
        across += widths[name] + GAP
    width = max(box.left + box.width for box in boxes.values()) + MARGIN
    height = max(box.middle for box in boxes.values()) + HEIGHT / 2 + MARGIN
    height = max(height, bottom - GAP + MARGIN)
    return Layout(tuple(boxes[name] for name in hierarchy), tuple(lines), width, height)


def _columns(names: Sequence[str], relations: Sequence[Relation]) -> dict[str, int]:
    """Return the level of every concept over both relations; what would close a cycle between them does not count."""
    graph = AcyclicGraph()
    for name in names:
        graph.add_node(name)
    for one in sorted(relations, key=lambda one: RELATIONS.index(one.relation)):
        try:
            graph.add_edge(one.parent, one.concept, {})
        except Cycle:
            continue
    return graph.levels()


def _with_points(level: Mapping[str, int], relations: Sequence[Relation]) -> tuple[list[list[Node]], list[list[Node]]]:
    """Return the columns, and for every relation its chain of nodes from parent to concept."""
    columns: list[list[Node]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for name in sorted(level):
        columns[level[name]].append(name)
    chains: list[list[Node]] = []
    for number, one in enumerate(relations):
        points: list[Node] = [(number, column) for column in range(level[one.parent] + 1, level[one.concept])]
        for point in points:
            columns[point[1]].append(point)  # type: ignore[index]
        chains.append([one.parent, *points, one.concept])
    return columns, chains


def _neighbours(chains: Sequence[Sequence[Node]]) -> tuple[dict[Node, list[Node]], dict[Node, list[Node]]]:
    """Return the neighbours of every node on its left and on its right."""
    left: dict[Node, list[Node]] = {}
    right: dict[Node, list[Node]] = {}
    for chain in chains:
        for before, after in pairwise(chain):
            right.setdefault(before, []).append(after)
            left.setdefault(after, []).append(before)
    return left, right


def _order(columns: list[list[Node]], chains: Sequence[Sequence[Node]]) -> None:
    """Order each column by the mean place of its neighbours, to and fro; the order with the fewest crossings stays."""
    left, right = _neighbours(chains)
    best, fewest = [list(column) for column in columns], _crossings(columns, right)
    for sweep in range(SWEEPS):
        sides, walk = (left, columns[1:]) if sweep % 2 == 0 else (right, columns[-2::-1])
        place = {node: number for column in columns for number, node in enumerate(column)}
        for column in walk:
            means = {node: _mean([place[one] for one in sides.get(node, [])], place[node]) for node in column}
            column.sort(key=means.__getitem__)
            place.update({node: number for number, node in enumerate(column)})
        crossed = _crossings(columns, right)
        if crossed < fewest:
            best, fewest = [list(column) for column in columns], crossed
        if not fewest:
            break
    for column, kept in zip(columns, best, strict=True):
        column[:] = kept


def _mean(numbers: Sequence[float], otherwise: float) -> float:
    return sum(numbers) / len(numbers) if numbers else otherwise


def _crossings(columns: Sequence[Sequence[Node]], right: Mapping[Node, Sequence[Node]]) -> int:
    """Count pairs of lines between neighbouring columns that cross."""
    crossed = 0
    place = {node: number for column in columns for number, node in enumerate(column)}
    for column in columns:
        seen: list[int] = []
        for node in column:
            ends = sorted(place[one] for one in right.get(node, []))
            crossed += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return crossed


def _middles(columns: Sequence[Sequence[Node]], chains: Sequence[Sequence[Node]]) -> dict[Node, float]:
    """Return the vertical place of every node: near its neighbours, in the order of its column, boxes apart."""
    left, right = _neighbours(chains)
    place: dict[Node, float] = {}
    gaps = []
    for column in columns:
        sizes = [HEIGHT + GAP if isinstance(node, str) else LINE_GAP for node in column]
        between = [(one + two) / 2 for one, two in pairwise(sizes)]
        offsets = [0.0]
        for gap in between:
            offsets.append(offsets[-1] + gap)
        gaps.append(offsets)
        place.update(zip(column, offsets, strict=True))
    for sweep in range(SWEEPS):
        order = range(len(columns)) if sweep % 2 == 0 else range(len(columns) - 1, -1, -1)
        for number in order:
            column, offsets = columns[number], gaps[number]
            wanted = [
                _mean([place[one] for one in (*left.get(node, ()), *right.get(node, ()))], place[node]) - offset
                for node, offset in zip(column, offsets, strict=True)
            ]
            # Points of long lines weigh more: a bent line is harder to follow than a box moved aside.
            weights = [1.0 if isinstance(node, str) else 4.0 for node in column]
            for node, base, offset in zip(column, rising(wanted, weights), offsets, strict=True):
                place[node] = base + offset
    top = min(place.values(), default=0.0)
    return {node: y - top + MARGIN + HEIGHT / 2 for node, y in place.items()}


def rising(wanted: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the non-decreasing numbers nearest to those wanted, by weighted least squares.

    Pool adjacent violators (Ayer and others 1955).
    """
    pools: list[tuple[float, float, int]] = []
    for number, weight in zip(wanted, weights, strict=True):
        mean, total, count = number, weight, 1
        while pools and pools[-1][0] > mean:
            other, heavy, many = pools.pop()
            mean = (mean * total + other * heavy) / (total + heavy)
            total, count = total + heavy, count + many
        pools.append((mean, total, count))
    return [mean for mean, _, count in pools for _ in range(count)]
