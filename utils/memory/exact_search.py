"""Exact nearest neighbours in torch: the index where FAISS is absent, and the reference that others are measured by."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from utils.memory.vector_checks import BLOCK

PAIRS = 1 << 24
"""Most pairs of a query and a vector that are scored at a time: 64 MiB."""


def nearest(
    queries: np.ndarray, chunks: Iterable[tuple[np.ndarray, np.ndarray]], k: int, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of all vectors for each query, by comparing with every one.

    Args:
        queries: float32 ``[q, width]``, as `utils.memory.vector_checks.checked` returns them.
        chunks: Ids, int64 ``[n]``, and their vectors, float32 ``[n, width]``, piece by piece.
        k: How many; at most as many as there are vectors.
        metric: ``"cosine"`` or ``"l2"``.

    Returns:
        Scores float32 ``[q, k]``, the best first (cosine, or squared distance), and ids int64 ``[q, k]``.
    """
    count = len(queries)
    best_scores = torch.empty(count, 0)
    best_ids = torch.empty(count, 0, dtype=torch.int64)
    # Read only, but torch asks for arrays that it could write to.
    asked = torch.from_numpy(np.require(queries, requirements="W"))
    # |x|² - 2xy + |y|² loses what distinguishes vectors that are all far from zero; distances do not depend on where
    # zero is, so it is put among the queries.
    centre = asked.mean(0) if metric == "l2" and count else None
    asked = asked if centre is None else asked - centre
    own = asked.square().sum(1, keepdim=True)
    with torch.no_grad():
        for ids, vectors in chunks:
            if not len(ids):
                continue
            table, numbers = torch.from_numpy(vectors), torch.from_numpy(ids)
            table = table if centre is None else table - centre
            parts = []
            for rows in torch.arange(count).split(max(1, PAIRS // len(ids))):
                parts.append(_best(asked[rows], own[rows], table, numbers, k, metric))
            if not parts:
                break
            scores = torch.cat([best_scores, torch.cat([part[0] for part in parts])], 1)
            together = torch.cat([best_ids, torch.cat([part[1] for part in parts])], 1)
            best_scores, order = scores.topk(min(k, scores.shape[1]), 1, largest=metric == "cosine")
            best_ids = together.gather(1, order)
    return best_scores.numpy(), best_ids.numpy()


def _best(queries: Tensor, own: Tensor, table: Tensor, numbers: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Return the best of one piece."""
    scores = queries @ table.T
    if metric == "l2":
        scores = torch.add(table.square().sum(1), scores, alpha=-2).add_(own).clamp_min_(0)
    best, order = scores.topk(min(k, len(table)), 1, largest=metric == "cosine")
    return best, numbers[order]


class TorchIndex:
    """Vectors in blocks on the CPU, each search a comparison with all of them.

    Blocks are allocated as they are needed: growing never copies what is there.
    """

    exact = True
    recall: None = None

    def __init__(self, dimension: int, metric: str) -> None:
        self._dimension, self._metric = dimension, metric
        self._blocks: list[np.ndarray] = []
        self._ids = np.empty(0, dtype=np.int64)
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def answered(self, k: int, filtered: bool) -> tuple[bool, None, str]:
        """Return that a search is exact, that there is no recall to tell, and who answers it."""
        return True, None, "torch, exact: every candidate is compared"

    @property
    def nbytes(self) -> int:
        """Bytes allocated for vectors and ids."""
        return sum(block.nbytes for block in self._blocks) + self._ids.nbytes

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Put in vectors, float32 ``[n, width]``, under ids that are new."""
        start = len(self._ids)
        while len(self._blocks) * BLOCK < start + len(ids):
            self._blocks.append(np.empty((BLOCK, self._dimension), dtype=np.float32))
        self._write(np.arange(start, start + len(ids)), vectors)
        self._ids = np.concatenate([self._ids, ids])
        self._sorted = None

    def replace(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Write the vectors of ids that are there anew."""
        self._write(self._rows(ids), vectors)

    def remove(self, ids: np.ndarray) -> None:
        """Take out vectors; the last ones move to where they lay."""
        rows = np.sort(self._rows(ids))
        left = len(self._ids) - len(rows)
        holes = rows[rows < left]
        movers = np.setdiff1d(np.arange(left, len(self._ids)), rows, assume_unique=True)
        self._write(holes, self._read(movers))
        kept = self._ids[:left].copy()
        kept[holes] = self._ids[movers]
        self._ids, self._sorted = kept, None
        del self._blocks[-(-left // BLOCK) :]

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of ids that are there, float32 ``[n, width]``."""
        return self._read(self._rows(ids))

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and ids ``[q, k]``, as `nearest`, of the ids that are allowed, ascending; None for all."""
        chunks = self.chunks()
        if allowed is not None:
            rows = np.sort(self._rows(allowed))
            pieces = (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
            chunks = ((self._ids[piece], self._read(piece)) for piece in pieces)
        return nearest(queries, chunks, k, self._metric)

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all ids and vectors piece by piece, in the order of `order`; views for reading."""
        for number, block in enumerate(self._blocks):
            ids = self._ids[number * BLOCK : (number + 1) * BLOCK]
            yield ids, block[: len(ids)]

    def order(self) -> np.ndarray:
        """Return all ids in the order of `chunks`."""
        return self._ids

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, object]]:
        """Return what else is to be kept: nothing."""
        return {}, {"kind": "exact"}

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        if self._sorted is None:
            order = np.argsort(self._ids)
            self._sorted = self._ids[order], order
        ordered, order = self._sorted
        rows: np.ndarray = order[np.searchsorted(ordered, ids)]
        return rows

    def _read(self, rows: np.ndarray) -> np.ndarray:
        values = np.empty((len(rows), self._dimension), dtype=np.float32)
        for number, inside, picked in self._by_block(rows):
            values[picked] = self._blocks[number][inside]
        return values

    def _write(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        for number, inside, picked in self._by_block(rows):
            self._blocks[number][inside] = vectors[picked]

    @staticmethod
    def _by_block(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield for each block its number, the rows inside it, and which of `rows` they are."""
        blocks = rows // BLOCK
        for number in np.unique(blocks).tolist():
            picked = np.flatnonzero(blocks == number)
            yield number, rows[picked] - number * BLOCK, picked
