"""How many of the true neighbours a search finds, measured against comparing with everything."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from utils.memory.exact_search import nearest

QUERIES = 100
"""Queries that choose how many lists are read, and as many others that measure what they find."""
NEIGHBOURS = 10
"""Of each query up to which one measurement serves; beyond, another serves up to each doubling."""
ONE_SIDED, TWO_SIDED = 1.645, 1.96
"""Normal quantiles for 95 %."""


@dataclass(frozen=True)
class Recall:
    """Share of the true nearest neighbours that were found."""

    value: float
    """Mean over queries."""
    low: float
    """Lower bound at 95 % (Wilson 1927, each query counted as one trial, which is wider than counting neighbours)."""
    high: float
    """Upper bound."""
    k: int
    """Neighbours of each query."""
    queries: int
    """How many queries."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"recall at {self.k} {self.value:.3f} [{self.low:.3f}, {self.high:.3f}] on {self.queries} queries"


def wilson(share: float, trials: int, quantile: float) -> tuple[float, float]:
    """Return the Wilson score interval of a share."""
    square = quantile**2 / trials
    centre = (share + square / 2) / (1 + square)
    half = quantile / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def measured(found: np.ndarray, true: np.ndarray) -> Recall:
    """Return the recall of ids that were found, ``[q, k]``, beside the true ones ``[q, k]``; q and k at least 1."""
    share = float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), true.tolist(), strict=True)]))
    return Recall(share, *wilson(share, len(true), TWO_SIDED), true.shape[1], len(true))


def chosen_probes(
    candidates: np.ndarray,
    vectors: Callable[[np.ndarray], np.ndarray],
    chunks: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]],
    search: Callable[[np.ndarray, int, int], np.ndarray],
    lists: int,
    metric: str,
    target: float,
    neighbours: int,
    seed: int,
) -> tuple[int, Recall]:
    """Return how many lists to read for a recall, and the recall on other queries.

    The queries are vectors of the index that its lists were not learned from, each without itself. Half of them choose
    the smallest power of two whose recall is at least the target with 95 % confidence, the others measure it.

    Args:
        candidates: Ids that may be queries, int64 ``[n]``, at least 2.
        vectors: Returns those of ids.
        chunks: Yields everything there is, for the reference.
        search: Of queries, neighbours and lists to read; returns ids ``[q, k]``, -1 where there are no more.
        lists: How many there are.
        metric: ``"cosine"`` or ``"l2"``.
        target: Recall to reach.
        neighbours: Of each query; fewer where there are fewer.
        seed: Which queries.
    """
    generator = np.random.default_rng(seed)
    ids = generator.permutation(candidates)[: 2 * QUERIES]
    queries = vectors(ids)
    k = min(neighbours, len(candidates) - 1)
    true = _without(nearest(queries, chunks(), k + 1, metric)[1], ids)
    half = len(ids) // 2

    def recall(rows: slice, probes: int) -> Recall:
        return measured(_without(search(queries[rows], k + 1, probes), ids[rows]), true[rows])

    choosing = slice(0, half)
    probes = 1
    while probes < lists and wilson((share := recall(choosing, probes)).value, share.queries, ONE_SIDED)[0] < target:
        probes = min(2 * probes, lists)
    return probes, recall(slice(half, None), probes)


def _without(found: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return ids ``[q, k + 1]`` as ``[q, k]``: without the query's own, or without the last where that is not there."""
    keep = found != own[:, None]
    keep[keep.all(axis=1), -1] = False
    return found[keep].reshape(len(found), found.shape[1] - 1)
