"""Which memories there are: their ids, domains and metadata, and which of them fit a filter."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import numpy as np

from utils.memory.vector_checks import LAST_ID
from utils.runtime.arguments import described
from utils.runtime.errors import DataError
from utils.runtime.settings import shown

Where = Mapping[str, Any] | Callable[[Mapping[str, Any]], Any]
"""Keys and the values that they must have, or a function of a memory's metadata that says whether it fits."""
NAMED = 10
"""Domains named in a message."""


class MetadataStore:
    """Ids in ascending order with the number of the domain of each, and metadata of those that have any.

    Arrays grow by doubling. An entry of `entries` is replaced and never changed, so that results may refer to it.
    """

    def __init__(self) -> None:
        self._ids = np.empty(0, dtype=np.int64)
        self._codes = np.empty(0, dtype=np.int32)
        self._count = 0
        self.names: list[str] = []
        """Domains by number, those without memories included."""
        self.entries: dict[int, dict[str, Any]] = {}
        """Metadata by id; nothing for those that have none."""
        self.next_id = 0
        """The next id that is chosen; none is ever chosen twice."""

    def __len__(self) -> int:
        return self._count

    @property
    def ids(self) -> np.ndarray:
        """All ids, int64 ``[n]``, ascending; a view."""
        return self._ids[: self._count]

    @property
    def codes(self) -> np.ndarray:
        """Number of the domain of each, int32 ``[n]``; a view."""
        return self._codes[: self._count]

    @property
    def counts(self) -> dict[str, int]:
        """How many memories of each domain there are, for those that have any, in the order of their first one."""
        counts = np.bincount(self.codes, minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if count}

    def chosen_ids(self, count: int) -> np.ndarray:
        """Return ids for new memories, int64 ``[count]``.

        Raises:
            DataError: The last id was given away.
        """
        if self.next_id + count - 1 > LAST_ID:
            raise DataError(
                f"No {count} ids are left after {self.next_id - 1}.",
                "Expected room below 2^63 - 1.",
                "Give the ids of new memories yourself.",
            )
        return np.arange(self.next_id, self.next_id + count, dtype=np.int64)

    def code(self, domain: str) -> int:
        """Return the number of a domain, which becomes one if it is none yet.

        Raises:
            DataError: No text, or an empty one.
        """
        if not isinstance(domain, str) or not domain.strip():
            raise DataError(
                f"The domain is {described(domain)}.", "Expected a name.", 'Give a text, or leave it out for "default".'
            )
        if domain not in self.names:
            self.names.append(domain)
        return self.names.index(domain)

    def add(self, ids: np.ndarray, codes: np.ndarray | int, entries: Sequence[dict[str, Any]] | None) -> None:
        """Put in memories whose ids are new and unlike each other."""
        if not len(ids):
            return
        count = self._count + len(ids)
        rising = len(ids) == 1 or bool((ids[1:] > ids[:-1]).all())
        if rising and (not self._count or ids[0] > self._ids[self._count - 1]):
            if count > len(self._ids):
                room = max(count, 2 * self._count)
                # What stands in the new room is never read.
                self._ids, self._codes = np.resize(self._ids, room), np.resize(self._codes, room)
            self._ids[self._count : count] = ids
            self._codes[self._count : count] = codes
        else:
            merged = np.concatenate([self.ids, ids])
            numbers = np.concatenate([self.codes, np.broadcast_to(np.asarray(codes, dtype=np.int32), ids.shape)])
            order = np.argsort(merged, kind="stable")
            self._ids, self._codes = merged[order], numbers[order]
        self._count = count
        self.next_id = max(self.next_id, int(ids.max()) + 1)
        if entries is not None:
            pairs = zip(ids.tolist(), entries, strict=True)
            self.entries.update(pairs if all(entries) else ((key, entry) for key, entry in pairs if entry))

    def remove(self, ids: np.ndarray) -> None:
        """Take out memories that are there."""
        keep = np.ones(self._count, dtype=bool)
        keep[self.positions(ids)] = False
        self._ids, self._codes = self.ids[keep], self.codes[keep]
        self._count = len(self._ids)
        if self.entries:
            for key in ids.tolist():
                self.entries.pop(key, None)

    def describe(self, ids: np.ndarray, code: int | None, entries: Sequence[dict[str, Any]] | None) -> None:
        """Give memories that are there another domain, other metadata, or both."""
        if code is not None:
            self.codes[self.positions(ids)] = code
        if entries is not None:
            for key, entry in zip(ids.tolist(), entries, strict=True):
                if entry:
                    self.entries[key] = entry
                else:
                    self.entries.pop(key, None)

    def present(self, ids: np.ndarray) -> np.ndarray:
        """Return which ids are there, bool of their shape."""
        if not self._count:
            return np.zeros(ids.shape, dtype=bool)
        there: np.ndarray = self.ids[self._places(ids)] == ids
        return there

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Return where ids that are there stand in `ids`.

        Raises:
            DataError: Some are not there.
        """
        absent = ids[~self.present(ids)]
        if len(absent):
            raise DataError(
                f"{len(absent)} of {ids.size} ids are not in the memory: {absent[:5].tolist()}.",
                f"Expected ids of its {self._count} memories.",
                "Take ids that `add` returned, or those of `memory.ids()`.",
            )
        return self._places(ids) if self._count else np.zeros(ids.shape, dtype=np.int64)

    def selected(self, domain: str | Iterable[str] | None, where: Where | None) -> np.ndarray | None:
        """Return the ids that fit, ascending; None when all do.

        Args:
            domain: A domain or several; None for all.
            where: Further conditions on the metadata.

        Raises:
            DataError: A domain that does not exist, or conditions that cannot be asked.
        """
        fits: np.ndarray | None = None
        if domain is not None and self._count:
            several = isinstance(domain, (list, tuple, set, frozenset))
            wanted: list[Any] = list(domain) if several else [domain]
            counts = self.counts
            unknown = [str(name) for name in wanted if not isinstance(name, str) or name not in counts]
            if unknown or not wanted:
                raise self._no_domain(unknown)
            fits = np.isin(self.codes, [self.names.index(name) for name in wanted])
        ids = self.ids if fits is None else self.ids[fits]
        if where is None:
            return None if fits is None or bool(fits.all()) else ids
        if callable(where):
            found = np.array([key for key in ids.tolist() if self._asked(where, key)], dtype=np.int64)
            return None if len(found) == self._count else found
        if not isinstance(where, Mapping) or not all(isinstance(key, str) for key in where):
            raise DataError(
                f"The condition is {shown(where)}.",
                "Expected a mapping from keys of the metadata to the values that they must have, or a function.",
                'Give, for example, {"label": 3}, or lambda metadata: metadata.get("year", 0) > 2020.',
            )
        if not where:
            return self.selected(domain, None)
        # Memories without metadata fit no condition.
        fitting = [key for key, entry in self.entries.items() if _matches(entry, where)]
        found = np.sort(np.array(fitting, dtype=np.int64))
        return found if fits is None else found[np.isin(found, ids, assume_unique=True)]

    def _places(self, ids: np.ndarray) -> np.ndarray:
        first, last = int(self._ids[0]), int(self._ids[self._count - 1])
        if last - first + 1 == self._count:
            # Without gaps, as where nothing was deleted, nothing has to be searched.
            return (np.clip(ids, first, last) - first).astype(np.int64)
        return np.minimum(np.searchsorted(self.ids, ids), self._count - 1)

    def _asked(self, where: Callable[[Mapping[str, Any]], Any], key: int) -> bool:
        try:
            return bool(where(MappingProxyType(self.entries.get(key, {}))))
        except Exception as error:
            raise DataError(
                f"The condition failed for the metadata of {key}: {type(error).__name__}: {error}.",
                "Expected a function that says of every memory whether it fits, of those without metadata too.",
                'Ask with metadata.get("key").',
            ) from error

    def _no_domain(self, unknown: list[str]) -> DataError:
        names = sorted(self.counts)
        near = get_close_matches(unknown[0], names, n=3, cutoff=0.4) if unknown else []
        return DataError(
            f"The memory has no domain {', '.join(map(repr, unknown)) or 'of no name'}.",
            f"Expected one of its {len(names)}: {', '.join(near or names[:NAMED])}.",
            "Leave the domain out to search in all.",
        )


def _matches(entry: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Return whether an entry has all the values; true and 1 are two things, as in JSON."""
    for key, wanted in where.items():
        if key not in entry:
            return False
        value = entry[key]
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            return False
    return True
