"""Long-term memory: vectors with ids, domains and metadata, found again by nearness, kept on disk.

Searches by FAISS where it is installed, otherwise by an exact search in torch; every answer says which. What would make
an index answer wrongly (NaN, a zero vector, an id twice, another embedding) is refused before anything is changed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from utils.memory.embedding import Embedder, as_embedder
from utils.memory.exact_search import nearest
from utils.memory.memory_files import SavedMemory, read_memory, write_memory
from utils.memory.memory_view import memory_facts, memory_table
from utils.memory.metadata_store import MetadataStore, Where
from utils.memory.recall import NEIGHBOURS, Recall, measured
from utils.memory.search_result import MemoryRecords, SearchResult
from utils.memory.vector_checks import BLOCK, METRICS, as_ids, as_metadata, as_vectors, checked, compared, lengths
from utils.memory.vector_index import IndexConfig, VectorIndex, make_index, restored_index
from utils.runtime.arguments import flag, is_whole, one_of, whole
from utils.runtime.errors import CheckpointError, ConfigError, DataError
from utils.runtime.files import checked_path
from utils.runtime.settings import settings_of

PART = 100_000
"""Vectors that are normalised at a time, so that there is no second copy of a million."""
WIDEST = 2**31 - 1
"""Of vectors: FAISS counts in 32 bits."""
UNIT = 1e-3
"""By how much the norm of a saved vector may miss 1 under cosine."""


class LongTermMemory:
    """Memories, each a vector with an id, a domain and metadata.

    Under cosine vectors are kept with norm 1. Calls from several threads wait for each other.

    Examples:
        >>> memory = LongTermMemory()
        >>> memory.add([[1.0, 0.0], [0.0, 1.0]], [{"name": "east"}, {"name": "north"}]).tolist()
        [0, 1]
        >>> memory.search([0.9, 0.1], k=1)[0][0].metadata
        {'name': 'east'}
    """

    def __init__(
        self,
        dimension: int | None = None,
        metric: str = "cosine",
        embedder: Any = None,
        config: IndexConfig | Mapping[str, Any] | None = None,
    ) -> None:
        """Start empty.

        Args:
            dimension: Width of the vectors; None for that of the first ones.
            metric: ``"cosine"`` similarity, or ``"l2"`` for squared Euclidean distance.
            embedder: Makes vectors of items: an `Embedder`, a run, a model of any kind, or a method of one such as
                ``encode``; None where vectors are given.
            config: How it searches, as settings or as their names and values.

        Raises:
            ConfigError: A dimension below 1, an unknown metric, an embedder that cannot be told from others, or no
                settings.
            MissingPackageError: The settings ask for FAISS, and it cannot be imported.
        """
        if dimension is not None:
            action = "Leave it out to have it taken from the first vectors."
            dimension = whole(dimension, "The dimension of the memory", 1, action, most=WIDEST)
        one_of(metric, "The metric of the memory", METRICS, 'Leave it out for "cosine".')
        self.metric, self.config = metric, settings_of(IndexConfig, config)
        self.embedder: Embedder | None = None if embedder is None else as_embedder(embedder)
        self.embedded_by: dict[str, str] | None = None if self.embedder is None else self.embedder.to_dict()
        """What the vectors were made with; None where they were given."""
        self._store = MetadataStore()
        self._lock = threading.RLock()
        self._known: dict[Path, str] = {}
        # Made at once, so that a package that is missing is missed here.
        self._index: VectorIndex = make_index(dimension or 1, metric, self.config)
        self.dimension = dimension

    def __len__(self) -> int:
        """Return how many memories there are."""
        return len(self._store)

    def __contains__(self, key: object) -> bool:
        """Return whether an id is there."""
        number = int(key) if isinstance(key, np.integer) else key
        return is_whole(number, 0) and bool(self._store.present(np.array([number], dtype=np.int64))[0])

    @property
    def domains(self) -> dict[str, int]:
        """How many memories each domain has."""
        return self._store.counts

    @property
    def method(self) -> str:
        """What answers searches at present: FAISS or torch, and how."""
        return self._index.answered(NEIGHBOURS, filtered=False)[2]

    @property
    def recall(self) -> Recall | None:
        """What the inverted lists find of held-out queries; None where searches are exact."""
        return self._index.recall

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors and their ids."""
        return self._index.nbytes

    def ids(self, domain: str | Iterable[str] | None = None, where: Where | None = None) -> np.ndarray:
        """Return the ids that fit, int64, ascending.

        Args:
            domain: Only of this domain, or of these.
            where: Keys of the metadata with the values that they must have, or a function of the metadata, which it
                must not change, that says whether a memory fits.

        Raises:
            DataError: A domain that has no memories, or a condition that cannot be asked.
        """
        with self._lock:
            found = self._store.selected(domain, where)
            return (self._store.ids if found is None else found).copy()

    def add(
        self,
        items: Any = None,
        metadata: Any = None,
        ids: Any = None,
        domain: str = "default",
        *,
        vectors: Any = None,
    ) -> np.ndarray:
        """Remember.

        Args:
            items: What the embedder makes vectors of; without an embedder the vectors ``[n, width]`` themselves, as a
                tensor, an array or lists.
            metadata: A mapping of JSON values for each, None for those that have none, or one mapping for all.
            ids: Whole numbers for them, none taken; chosen, and never chosen again, where they are left out.
            domain: Where they belong.
            vectors: Instead of items, where the vectors were made by the embedder before.

        Returns:
            Their ids, int64 ``[n]``.

        Raises:
            DataError: What cannot be remembered, with the reason; nothing was added.
        """
        with self._lock:
            table = self._given(items, vectors)
            norms = lengths(table, self.metric)
            entries = None if metadata is None else as_metadata(metadata, len(table))
            keys = self._store.chosen_ids(len(table)) if ids is None else as_ids(ids, len(table))
            if ids is not None and (taken := keys[self._store.present(keys)]).size:
                raise DataError(
                    f"{len(taken)} of {len(keys)} ids are in the memory already: {taken[:5].tolist()}.",
                    "Expected new ones.",
                    "Change what is there with `update`, or leave the ids out.",
                )
            code = self._store.code(domain)
            if not len(keys):
                return keys
            if not len(self._index) and self.dimension is None:
                self._index = make_index(table.shape[1], self.metric, self.config)
                self.dimension = table.shape[1]
            try:
                for start in range(0, len(keys), PART):
                    part = slice(start, start + PART)
                    self._index.add(keys[part], compared(table[part], norms[part], self.metric))
                self._store.add(keys, code, entries)
            except BaseException:
                # Interrupted, or out of memory: what is in the index and has no entry is taken out again.
                half = keys[~self._store.present(keys)]
                self._index.remove(half[np.isin(half, self._index.order())])
                raise
        return keys.copy()

    def search(
        self,
        queries: Any = None,
        k: int = 5,
        domain: str | Iterable[str] | None = None,
        where: Where | None = None,
        *,
        vectors: Any = None,
        with_metadata: bool = True,
    ) -> SearchResult:
        """Find the memories nearest to each query.

        Conditions are asked before the search and not after it: there are `k` answers wherever `k` memories fit, and
        they are exact. Without conditions the answer is exact up to `IndexConfig.exact_up_to` memories. Above, the
        first search for many more neighbours than before takes seconds: what inverted lists find of them is measured.

        Args:
            queries: As the items of `add`.
            k: How many for each query; there are fewer where fewer fit, which `SearchResult.note` says.
            domain: Only in this domain, or in these.
            where: As for `ids`.
            vectors: Instead of queries, where the vectors were made by the embedder before.
            with_metadata: Leave it out for searches by the million, whose answers need ids only.

        Raises:
            DataError: Queries that are no vectors of this memory, or conditions that cannot be asked.
            ConfigError: `k` is no whole number from 1 on.
        """
        k = whole(k, "The number k of memories to find", 1, "Ask for one or more.")
        flag(with_metadata, "with_metadata", "False leaves the metadata out.")
        with self._lock:
            self._check_step()
            table = self._vectors(queries, vectors, "queries")
            allowed = self._store.selected(domain, where)
            candidates = len(self._store) if allowed is None else len(allowed)
            found = min(k, candidates)
            if found and len(table):
                scores, ids = self._index.search(table, found, allowed)
            else:
                scores = np.empty((len(table), found), dtype=np.float32)
                ids = np.empty((len(table), found), dtype=np.int64)
            exact, recall, method = self._index.answered(k, allowed is not None)
            entries = None
            if with_metadata:
                held = self._store.entries
                entries = [[held.get(key, {}) for key in row] for row in ids.tolist()]
            names = np.array(self._store.names or [""], dtype=object)
            places = self._store.positions(ids)
            domains = names[self._store.codes[places]]
        for array in (ids, scores):
            array.setflags(write=False)
        return SearchResult(
            ids, scores, k, candidates, self.metric, method, exact, recall, domains, entries,
        )  # fmt: skip

    def get(self, ids: Any) -> MemoryRecords:
        """Return vectors, domains and metadata of some ids, in their order.

        Raises:
            DataError: Some are not there.
        """
        keys = as_ids(ids)
        with self._lock:
            codes = self._store.codes[self._store.positions(keys)].tolist()
            names = tuple(self._store.names[code] for code in codes)
            return MemoryRecords(keys, self._index.vectors(keys), names, tuple(self.metadata(keys)))

    def metadata(self, ids: Any) -> list[dict[str, Any]]:
        """Return the metadata of some ids alone, in their order, copies.

        Raises:
            DataError: Some are not there.
        """
        keys = as_ids(ids)
        with self._lock:
            self._store.positions(keys)
            return [copy.deepcopy(self._store.entries.get(key, {})) for key in keys.tolist()]

    def update(
        self, ids: Any, items: Any = None, metadata: Any = None, domain: str | None = None, *, vectors: Any = None
    ) -> None:
        """Give memories other vectors, other metadata or another domain; what is left out stays.

        Args:
            ids: Which.
            items: As for `add`, one for each id.
            metadata: As for `add`; replaces all that a memory had.
            domain: Where they belong from now on.
            vectors: As for `add`.

        Raises:
            DataError: Ids that are not there, or what does not fit; nothing was changed.
        """
        keys = as_ids(ids)
        with self._lock:
            self._store.positions(keys)
            table = None if items is None and vectors is None else self._vectors(items, vectors)
            entries = None if metadata is None else as_metadata(metadata, len(keys))
            if table is not None and len(table) != len(keys):
                raise DataError(
                    f"There are {len(table)} vectors for {len(keys)} ids.",
                    "Expected one for each.",
                    "Give as many, in the order of the ids.",
                )
            code = None if domain is None else self._store.code(domain)
            if table is not None and len(keys):
                self._index.replace(keys, table)
            self._store.describe(keys, code, entries)

    def delete(self, ids: Any) -> None:
        """Forget memories; their ids are not chosen again.

        Raises:
            DataError: Some are not there; nothing was changed.
        """
        keys = as_ids(ids)
        with self._lock:
            self._store.positions(keys)
            if len(keys):
                self._index.remove(keys)
                self._store.remove(keys)

    def measured_recall(self, queries: Any = None, k: int = 10, *, vectors: Any = None) -> Recall:
        """Measure which share of the true nearest memories a search finds for queries of one's own.

        Args:
            queries: As for `search`.
            k: Neighbours of each.
            vectors: As for `search`.

        Raises:
            DataError: No queries, or none that fit, or an empty memory.
        """
        table = self._vectors(queries, vectors, "queries")
        found = self.search(k=k, vectors=table, with_metadata=False).ids
        if not found.size:
            raise DataError(
                f"There are {len(found)} queries and {len(self)} memories.",
                "Expected one of each at least.",
                "Add memories, and give queries as they will be asked.",
            )
        with self._lock:
            true = nearest(table, self._index.chunks(), found.shape[1], self.metric)
        return measured(found, true[1])

    def save(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Write all there is; what was saved there before stays until the new files are whole.

        Args:
            directory: Empty or new, or the one that this memory was loaded from or saved to.
            overwrite: Replace what is there even when another writer has saved it.

        Raises:
            ConfigError: `overwrite` is neither True nor False.
            CheckpointError: Another writer has saved or is saving there, something else is there, or the files cannot
                be written.
            DataError: The memory is empty and has no dimension yet, or index and metadata are out of step.
        """
        place = checked_path(directory, "the long-term memory")
        flag(overwrite, "overwrite", "True replaces another memory that was saved there.")
        with self._lock:
            self._check_step()
            if self.dimension is None:
                raise DataError(
                    "The memory is empty, and the width of its vectors is not known.",
                    "Expected something to save.",
                    "Add vectors first, or make it with LongTermMemory(dimension=...).",
                )
            learned, facts = self._index.state()
            order = self._index.order()
            arrays = {"ids": order, "domains": self._store.codes[self._store.positions(order)], **learned}
            about = {
                "dimension": self.dimension,
                "metric": self.metric,
                "count": len(self),
                "next_id": self._store.next_id,
                "described": len(self._store.entries),
                "domains": self._store.names,
                "embedder": self.embedded_by,
                "index": facts,
                "config": asdict(self.config),
            }
            known = self._known.get(place.resolve())
            token = write_memory(
                place, about, arrays, lambda: (part for _, part in self._index.chunks()), self._store.entries, known,
                overwrite,
            )  # fmt: skip
            self._known[place.resolve()] = token
        return place

    @classmethod
    def load(
        cls, directory: str | Path, embedder: Any = None, config: IndexConfig | Mapping[str, Any] | None = None
    ) -> LongTermMemory:
        """Read a memory that `save` wrote, after checking every file against its hash.

        Args:
            directory: Where it was saved.
            embedder: The one that its vectors were made with; without it the memory takes vectors only.
            config: How it searches; as it was saved by default.

        Raises:
            ConfigError: The embedder or the settings are none.
            CheckpointError: A file is missing, torn, changed or does not fit the others, or the embedder is another.
            MissingPackageError: The settings ask for FAISS, and it cannot be imported.
        """
        place = checked_path(directory, "the long-term memory")
        own = None if config is None else settings_of(IndexConfig, config)
        saved = read_memory(place)
        manifest = saved.manifest
        try:
            memory = cls(manifest["dimension"], manifest["metric"], None, own or IndexConfig(**manifest["config"]))
        except (TypeError, ConfigError) as error:
            raise _unfit(directory, f"its settings make no memory ({error})") from error
        made_by, memory.embedder = manifest["embedder"], None if embedder is None else as_embedder(embedder)
        if memory.embedder is not None and (made_by or {}).get("fingerprint") != memory.embedder.fingerprint:
            said = "vectors that were given" if made_by is None else f"those of {made_by.get('description')}"
            raise CheckpointError(
                f"The vectors of the memory in {directory} are {said}, and the embedder is "
                f"{memory.embedder.description}, with another fingerprint.",
                "Expected the embedder that they were made with: vectors of two cannot be compared.",
                "Give that one, or none to search with vectors.",
            )
        memory.embedded_by = made_by
        memory._fill(saved, directory)
        memory._known[place.resolve()] = manifest["sha256"]
        return memory

    def to_dict(self) -> dict[str, Any]:
        """Return what it is and how much it holds, as plain values."""
        return memory_facts(self)

    def __repr__(self) -> str:
        width = "of any width" if self.dimension is None else f"of width {self.dimension}"
        return f"LongTermMemory({len(self):,} memories {width}, {self.metric}; {self.method})"

    def _repr_html_(self) -> str:
        """Show size, domains and how it searches in a notebook."""
        return memory_table(self)

    def _vectors(self, items: Any, vectors: Any, what: str = "vectors") -> np.ndarray:
        """Return vectors as they are compared, float32 ``[n, width]``."""
        return checked(self._given(items, vectors, what), self.metric, what)

    def _given(self, items: Any, vectors: Any, what: str = "vectors") -> np.ndarray:
        """Return vectors as they were given or made, float32 ``[n, width]``."""
        if (items is None) == (vectors is None):
            raise DataError(
                "Nothing is given." if items is None else "Both items and vectors are given.",
                "Expected one of them.",
                "Give items, or vectors=... where they are vectors already.",
            )
        given = vectors
        if items is not None:
            if self.embedder is None and self.embedded_by is not None:
                raise DataError(
                    f"Items are given, and the embedder of this memory is not: {self.embedded_by['description']}.",
                    "Expected what its vectors were made with.",
                    "Load the memory with its embedder, or give vectors=...",
                )
            given = items if self.embedder is None else self.embedder(items)
        return as_vectors(given, self.dimension, what)

    def _check_step(self) -> None:
        """Refuse to answer when vectors and metadata are not about the same memories."""
        if len(self._index) != len(self._store):
            raise DataError(
                f"The index holds {len(self._index)} vectors, and there are ids for {len(self._store)}.",
                "Expected as many: a change of the memory was broken off.",
                "Load the memory from where it was saved.",
            )

    def _fill(self, saved: SavedMemory, directory: str | Path) -> None:
        """Take over what was saved, piece by piece."""
        manifest, tensors = saved.manifest, saved.tensors
        ids, codes = tensors["ids"].rows(), tensors["domains"].rows()
        names, count = manifest["domains"], manifest["count"]
        learned = {name: stored.rows() for name, stored in tensors.items() if name not in ("ids", "domains", "vectors")}
        try:
            as_ids(ids)
            if codes.size and (int(codes.min()) < 0 or int(codes.max()) >= len(names)):
                raise _unfit(directory, "memories belong to domains that it does not name")
            index = restored_index(manifest["dimension"], self.metric, self.config, count, learned, manifest["index"])
            for start in range(0, count, BLOCK):
                part = tensors["vectors"].rows(start, start + BLOCK)
                unit = checked(part, self.metric)
                if self.metric == "cosine" and np.abs(np.einsum("ij,ij->i", part, unit) - 1).max() > UNIT:
                    raise _unfit(directory, "its vectors are not of norm 1, as under cosine")
                # As saved, not normalised once more: what is loaded is bit for bit what was saved.
                index.add(ids[start : start + BLOCK], part)
            for name in names:
                self._store.code(name)
        except DataError as error:
            raise _unfit(directory, str(error)) from error
        self._store.add(ids, codes, None)
        self._store.entries = saved.metadata
        self._store.next_id = max(self._store.next_id, manifest["next_id"])
        self._index = index


def _unfit(directory: str | Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"The memory in {directory} does not hold together: {why}.",
        "Expected what `LongTermMemory.save` wrote.",
        "Load another copy.",
    )
