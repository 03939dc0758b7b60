"""Nearest neighbours by FAISS: exact up to a number of vectors, inverted lists with a measured recall above it.

Flat under ids of one's own (`IndexIDMap2`) compares with every vector. `IndexIVFFlat` compares with those of the lists
whose centres are nearest (Jégou, Douze & Schmid 2011, "Product quantization for nearest neighbor search", IEEE TPAMI
33(1), section IV); how many lists are read is chosen by measuring, never assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.memory.exact_search import TorchIndex
from utils.memory.recall import NEIGHBOURS, Recall, chosen_probes
from utils.memory.vector_checks import BLOCK
from utils.runtime.arguments import described, is_finite, is_whole
from utils.runtime.errors import CheckpointError, ConfigError
from utils.runtime.optional import require
from utils.runtime.seeding import derive_seed

BACKENDS = ("auto", "faiss", "torch")
POINTS = 50
"""Vectors for each list that its centre is learned from; FAISS asks for at least 39."""
DENSE = 64
"""Ids whose range is at most so many times their number are looked up in a bitmap."""


@dataclass(frozen=True)
class IndexConfig:
    """How a long-term memory searches."""

    backend: str = "auto"
    """faiss, torch (exact, compares with everything), or auto: faiss where it can be imported, otherwise torch."""
    exact_up_to: int = 100_000
    """Vectors up to which FAISS compares with every one; above, it learns inverted lists."""
    target_recall: float = 0.95
    """Share of the true neighbours that inverted lists must find at least, measured on held-out queries."""
    seed: int = 0
    """Of the vectors that lists are learned from and of the queries that measure them."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: One of them is out of its range.
        """
        ranges = {
            "backend": (
                isinstance(self.backend, str) and self.backend in BACKENDS,
                f"one of {', '.join(BACKENDS)}",
                '"auto" takes FAISS where it is installed.',
            ),
            "exact_up_to": (
                is_whole(self.exact_up_to, 1), "a whole number, at least 1", "100_000 is exact where that is fast.",
            ),
            "target_recall": (
                is_finite(self.target_recall) and 0 < self.target_recall <= 1, "a number above 0, at most 1",
                "0.95 is usual.",
            ),
            "seed": (is_whole(self.seed), "a whole number", "0 is usual."),
        }  # fmt: skip
        for name, (fits, expected, action) in ranges.items():
            if not fits:
                raise ConfigError(
                    f"The {name} of the index is {described(getattr(self, name))}.", f"Expected {expected}.", action
                )


def make_index(dimension: int, metric: str, config: IndexConfig) -> VectorIndex:
    """Return an empty index.

    Raises:
        MissingPackageError: FAISS was asked for and cannot be imported.
    """
    if config.backend == "torch":
        return TorchIndex(dimension, metric)
    try:
        faiss = require("faiss", "search a long-term memory with it", "faiss-cpu")
    except ImportError:
        if config.backend == "faiss":
            raise
        return TorchIndex(dimension, metric)
    return FaissIndex(faiss, dimension, metric, config)


def restored_index(
    dimension: int,
    metric: str,
    config: IndexConfig,
    count: int,
    arrays: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> VectorIndex:
    """Return an empty index that will hold `count` vectors and knows what another one had learned.

    Args:
        dimension: Width of the vectors.
        metric: ``"cosine"`` or ``"l2"``.
        config: How it searches.
        count: Vectors that will be added, in the order in which they were saved.
        arrays: The arrays of `VectorIndex.state`.
        facts: Its plain values.

    Raises:
        CheckpointError: The state does not hold together.
    """
    index = make_index(dimension, metric, config)
    if isinstance(index, FaissIndex) and facts.get("kind") == "lists" and count > config.exact_up_to:
        try:
            index.restore(arrays, facts, count)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The lists of the saved memory do not hold together: {type(error).__name__}: {error}.",
                "Expected what `LongTermMemory.save` wrote.",
                "Load another copy.",
            ) from error
    return index


class FaissIndex:
    """A FAISS index that turns from Flat into inverted lists when it outgrows `IndexConfig.exact_up_to`.

    Global settings of FAISS, such as its threads, are left alone.
    """

    def __init__(self, faiss: Any, dimension: int, metric: str, config: IndexConfig) -> None:
        self._faiss, self._dimension, self._metric, self._config = faiss, dimension, metric, config
        self._kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
        self.exact = True
        self._lists = 0
        self._tuned: dict[int, tuple[int, Recall]] = {}
        self._measured_at = 0
        self._trained_on = np.empty(0, dtype=np.int64)
        self._assigned: np.ndarray | None = None
        self._index = faiss.IndexIDMap2(faiss.IndexFlat(dimension, self._kind))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def recall(self) -> Recall | None:
        """What the lists find of a few neighbours; None where searches are exact."""
        return self.answered(NEIGHBOURS, filtered=False)[1]

    def answered(self, k: int, filtered: bool) -> tuple[bool, Recall | None, str]:
        """Return whether a search is exact, otherwise its recall, and who answers it.

        A filter may leave out just those vectors that the recall rests on: filtered searches compare all that pass.
        """
        if not self._all(k, filtered):
            probes, recall = self._tuned_for(k)
            return False, recall, f"FAISS, {probes} of {self._lists} inverted lists; {recall}"
        return True, None, "FAISS, exact: every candidate is compared"

    @property
    def nbytes(self) -> int:
        """Bytes of vectors and ids."""
        return len(self) * (4 * self._dimension + 8)

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Put in vectors, float32 ``[n, width]``, under ids that are new."""
        if self.exact and len(self) + len(ids) > self._config.exact_up_to:
            self._learn(ids, vectors)
        if self._assigned is not None:
            # Vectors of a saved memory come in the order in which they were saved: their lists are known.
            lists, self._assigned = self._assigned[: len(ids)], self._assigned[len(ids) :]
            pointer = self._faiss.swig_ptr
            self._index.add_core(len(ids), pointer(vectors), pointer(ids), pointer(np.ascontiguousarray(lists)))
            self._assigned = self._assigned if len(self._assigned) else None
            return
        self._index.add_with_ids(vectors, ids)
        if len(self) > self._config.exact_up_to and len(self) >= 2 * self._measured_at:
            self._tuned, self._measured_at = {}, len(self)
            self._tuned_for(NEIGHBOURS)

    def replace(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Write the vectors of ids that are there anew."""
        self.remove(ids)
        self._index.add_with_ids(vectors, ids)

    def remove(self, ids: np.ndarray) -> None:
        """Take out vectors."""
        if not len(ids):
            return
        selector = self._faiss.IDSelectorBatch(ids) if self.exact else self._faiss.IDSelectorArray(ids)
        self._index.remove_ids(selector)

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of ids that are there, float32 ``[n, width]``."""
        if not len(ids):
            return np.empty((0, self._dimension), dtype=np.float32)
        found: np.ndarray = self._index.reconstruct_batch(ids)
        return found

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores of the best, float32 ``[q, k]``, and their ids.

        Args:
            queries: float32 ``[q, width]``.
            k: How many, at most as many as are allowed.
            allowed: Ids among which to search, ascending, all of which are compared; None for all there are.
        """
        selector = None if allowed is None else self._selector(allowed)
        if self.exact:
            given = None if selector is None else self._faiss.SearchParameters(sel=selector)
            scores, ids = self._index.search(queries, k, params=given)
            return scores, ids
        probes = self._lists if self._all(k, allowed is not None) else self._tuned_for(k)[0]
        scores, ids = self._in_lists(queries, k, probes, selector)
        short = np.flatnonzero((ids < 0).any(axis=1))
        if len(short):
            # The lists read held less than was asked for, and there is more: read all of them.
            scores[short], ids[short] = self._in_lists(queries[short], k, self._lists, selector)
        return scores, ids

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all ids and vectors piece by piece, in the order of `order`; views that the next step may end."""
        if self.exact:
            ids = self.order()
            for start in range(0, len(ids), BLOCK):
                size = min(BLOCK, len(ids) - start)
                yield ids[start : start + size], self._index.index.reconstruct_n(start, size)
            return
        for number, size in enumerate(self._sizes()):
            if size:
                yield self._list_ids(number, size), self._list_vectors(number, size)

    def order(self) -> np.ndarray:
        """Return all ids in the order of `chunks`."""
        if self.exact:
            ids: np.ndarray = self._faiss.vector_to_array(self._index.id_map)
            return ids
        parts = [self._list_ids(number, size) for number, size in enumerate(self._sizes()) if size]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what was learned beside the vectors: arrays, and plain values."""
        if self.exact:
            return {}, {"kind": "exact"}
        centroids = self._index.quantizer.reconstruct_n(0, self._lists)
        arrays = {
            "centroids": centroids,
            "list_sizes": np.array(self._sizes(), dtype=np.int64),
            "trained_on": self._trained_on,
        }
        return arrays, {
            "kind": "lists",
            "measured_at": self._measured_at,
            "tuned": {
                str(k): {"probes": probes, "recall": found.to_dict()} for k, (probes, found) in self._tuned.items()
            },
        }

    def restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], count: int) -> None:
        """Take over what `state` returned, before any vector.

        Raises:
            ValueError: It does not hold together; so do KeyError and TypeError.
        """
        centroids, sizes = arrays["centroids"], arrays["list_sizes"]
        tuned = {int(k): (int(entry["probes"]), Recall(**entry["recall"])) for k, entry in facts["tuned"].items()}
        if centroids.ndim != 2 or centroids.shape[1] != self._dimension or not np.isfinite(centroids).all():
            raise ValueError("the centres are no vectors of this memory")
        if len(sizes) != len(centroids) or sizes.min() < 0 or sizes.sum() != count:
            raise ValueError("the lists hold more or fewer vectors than there are")
        if not all(1 <= probes <= len(centroids) for probes, _ in tuned.values()):
            raise ValueError("more lists are to be read than there are")
        index = self._empty_lists(len(centroids))
        index.quantizer.add(np.ascontiguousarray(centroids))
        index.is_trained = True
        self._index, self.exact, self._tuned = index, False, tuned
        self._lists, self._measured_at = len(centroids), int(facts["measured_at"])
        self._trained_on = arrays["trained_on"]
        self._assigned = np.repeat(np.arange(len(sizes)), sizes)

    def _empty_lists(self, lists: int) -> Any:
        faiss = self._faiss
        quantizer = faiss.IndexFlat(self._dimension, self._kind)
        index = faiss.IndexIVFFlat(quantizer, self._dimension, lists, self._kind)
        index.set_direct_map_type(faiss.DirectMap.Hashtable)
        # Fewer vectors than FAISS would like are no reason to print a warning: recall is measured.
        index.cp.min_points_per_centroid = 1
        return index

    def _learn(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Turn into inverted lists, before vectors are added for which Flat is too small."""
        stored = self.order()
        total = len(stored) + len(ids)
        lists = max(1, min(round(2 * total**0.5), total // 4))
        generator = np.random.default_rng(derive_seed(self._config.seed, "lists", total))
        rows = np.sort(generator.choice(total, min(POINTS * lists, max(lists, total // 2)), replace=False))
        present, new = rows[rows < len(stored)], rows[rows >= len(stored)] - len(stored)
        sample = np.concatenate([self.vectors(stored[present]), vectors[new]])
        index = self._empty_lists(lists)
        index.train(np.ascontiguousarray(sample))
        for part, table in self.chunks():
            index.add_with_ids(table, part)
        self._index, self.exact, self._lists, self._tuned = index, False, lists, {}
        self._trained_on = np.sort(np.concatenate([stored[present], ids[new]]))
        self._measured_at = 0

    def _all(self, k: int, filtered: bool) -> bool:
        """Return whether a search compares with every candidate."""
        few = len(self) <= self._config.exact_up_to
        return self.exact or filtered or few or self._tuned_for(k)[0] == self._lists

    def _tuned_for(self, k: int) -> tuple[int, Recall]:
        """Return how many lists are read for so many neighbours, and what they find of them.

        That is measured, once for each doubling of neighbours and of vectors: where vectors lie in clusters, no rule
        tells how many lists hold a hundred neighbours from how many hold ten.
        """
        level = NEIGHBOURS
        while level < k:
            level *= 2
        if level not in self._tuned:
            ids = self.order()
            unseen = ids[~np.isin(ids, self._trained_on)]
            self._tuned[level] = chosen_probes(
                unseen if len(unseen) > 1 else ids, self.vectors, self.chunks, self._found, self._lists, self._metric,
                self._config.target_recall, level, derive_seed(self._config.seed, "recall", len(ids)),
            )  # fmt: skip
        return self._tuned[level]

    def _found(self, queries: np.ndarray, k: int, probes: int) -> np.ndarray:
        return self._in_lists(queries, k, probes, None)[1]

    def _in_lists(self, queries: np.ndarray, k: int, probes: int, selector: Any) -> tuple[np.ndarray, np.ndarray]:
        given = self._faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        scores, ids = self._index.search(queries, k, params=given)
        return scores, ids

    def _selector(self, allowed: np.ndarray) -> Any:
        """Return what FAISS asks of each vector: a bitmap where ids lie close together, otherwise a hash table."""
        last = int(allowed[-1]) if len(allowed) else 0
        if last > DENSE * max(len(allowed), 1024):
            return self._faiss.IDSelectorBatch(allowed)
        bits = np.zeros(last + 1, dtype=bool)
        bits[allowed] = True
        return self._faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))

    def _sizes(self) -> list[int]:
        return [int(self._index.invlists.list_size(number)) for number in range(self._lists)]

    def _list_ids(self, number: int, size: int) -> np.ndarray:
        ids: np.ndarray = self._faiss.rev_swig_ptr(self._index.invlists.get_ids(number), size)
        return ids

    def _list_vectors(self, number: int, size: int) -> np.ndarray:
        codes = self._faiss.rev_swig_ptr(self._index.invlists.get_codes(number), size * 4 * self._dimension)
        vectors: np.ndarray = codes.view(np.float32).reshape(size, self._dimension)
        return vectors


VectorIndex = TorchIndex | FaissIndex
"""Vectors by id. Ids that are given exist, or are new where they are added; `k` is at most what there is."""
