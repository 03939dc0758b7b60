"""Which samples of a stream stay: the three rules of `EpisodicBuffer`.

Each decides for a batch at once, with the outcome that it would have for one sample after the other.
"""

import copy
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from utils.memory.counter_stream import CounterStream, drawn
from utils.memory.ledger import Ledger
from utils.runtime.errors import DataError

R = TypeVar("R")


class Replacement(Protocol):
    """A rule by which new samples take the places of old ones."""

    bytes: int
    """Most bytes that the rule itself remembers for each place."""

    def check(self, groups: np.ndarray, capacity: int) -> None:
        """Refuse samples for which there can be no place; changes nothing."""

    def place(
        self, ledger: Ledger, groups: np.ndarray, priorities: np.ndarray, uniforms: np.ndarray, seen: int
    ) -> dict[int, int]:
        """Decide which samples get which places.

        Args:
            ledger: What is known of the places; only the groups may be written.
            groups: int64 [n], of the new samples.
            priorities: float64 [n].
            uniforms: float64 [n], a random number of [0, 1) for each.
            seen: How many samples came before.

        Returns:
            Number of the new sample by place, for those that are there in the end.
        """

    def give_up(self, ledger: Ledger, count: int, stream: CounterStream, key: int) -> np.ndarray:
        """Return places to give up because there will be fewer, int64 [count]; takes it that they are."""

    def forget(self, groups: np.ndarray) -> None:
        """Learn the groups of samples that somebody took out."""

    def state(self) -> dict[str, Tensor]:
        """Return what the rule remembers beside the ledger."""

    def load(self, state: dict[str, Tensor], ledger: Ledger) -> None:
        """Take over what `state` returned."""

    def copy(self) -> "Replacement":
        """Return one that changes by itself."""


class _Forgetful:
    """What rules have in common that remember nothing beside the ledger."""

    bytes = 0

    def check(self, groups: np.ndarray, capacity: int) -> None:
        """Take everything."""

    def forget(self, groups: np.ndarray) -> None:
        """Remember nothing of groups."""

    def state(self) -> dict[str, Tensor]:
        """Remember nothing."""
        return {}

    def load(self, state: dict[str, Tensor], ledger: Ledger) -> None:
        """Remember nothing."""

    def copy(self: R) -> R:
        """Return another."""
        return type(self)()


class Reservoir(_Forgetful):
    """A uniform sample of all that came: each of n samples is kept with probability capacity / n.

    Vitter 1985, "Random sampling with a reservoir", ACM TOMS 11(1), algorithm R: the n-th sample draws a number below
    n and takes the place of that number, if there is one.
    """

    def place(
        self, ledger: Ledger, groups: np.ndarray, priorities: np.ndarray, uniforms: np.ndarray, seen: int
    ) -> dict[int, int]:
        """Decide, see `Replacement`."""
        chosen = _filled(ledger, len(groups))
        first = len(chosen)
        numbers = np.arange(seen + first + 1, seen + len(groups) + 1)
        places = (uniforms[first:] * numbers).astype(np.int64)
        rows = (places < ledger.capacity).nonzero()[0]
        # Of several samples for one place the last one stays.
        chosen.update(zip(places[rows].tolist(), (rows + first).tolist(), strict=True))
        return chosen

    def give_up(self, ledger: Ledger, count: int, stream: CounterStream, key: int) -> np.ndarray:
        """Choose at random: what is left is a uniform sample too."""
        return ledger.occupied[drawn(stream, key, count, len(ledger.occupied))]


class Priority(_Forgetful):
    """The samples of the highest priority; of equal ones those that came first."""

    def place(
        self, ledger: Ledger, groups: np.ndarray, priorities: np.ndarray, uniforms: np.ndarray, seen: int
    ) -> dict[int, int]:
        """Decide, see `Replacement`; which of the given-up places a sample gets depends on the batch."""
        chosen = _filled(ledger, len(groups))
        first = len(chosen)
        present = ledger.columns["priorities"].copy()
        present[list(chosen)] = priorities[:first]
        arrivals = ledger.columns["arrivals"].copy()
        arrivals[list(chosen)] = seen + np.arange(first)
        rows = np.arange(first, len(groups))
        if not len(rows):
            return chosen
        rows = rows[priorities[rows] > present.min()]
        if not len(rows):
            return chosen
        # As many places as new samples can be lost at most: only the lowest ones are candidates.
        most = min(len(rows), ledger.capacity)
        places = np.flatnonzero(present <= np.partition(present, most - 1)[most - 1])
        values = np.concatenate([present[places], priorities[rows]])
        order = np.lexsort((np.concatenate([arrivals[places], seen + rows]), -values))
        kept = order[: len(places)]
        given_up = np.setdiff1d(np.arange(len(places)), kept)
        won = np.sort(kept[kept >= len(places)]) - len(places)
        chosen.update(zip(places[given_up].tolist(), rows[won].tolist(), strict=True))
        return chosen

    def give_up(self, ledger: Ledger, count: int, stream: CounterStream, key: int) -> np.ndarray:
        """Choose the lowest."""
        places = ledger.occupied
        order = np.lexsort((-ledger.columns["arrivals"][places], ledger.columns["priorities"][places]))
        return places[order[:count]]


class Balanced:
    """As many samples of each group as there are places for, and within a group a uniform sample of those that came.

    Chrysakis & Moens 2020, "Online continual learning from imbalanced data", ICML, algorithm 1 (class-balancing
    reservoir sampling): once the places are taken, a sample of a group that is, or ever was, the largest replaces one
    of its own group with probability stored / seen of the group; any other sample replaces one of the largest groups.
    """

    bytes = 4 * 8 + 1

    def __init__(self) -> None:
        self.ids = np.empty(0, dtype=np.int64)
        """Groups met and not forgotten, ascending; the other tables are in the same order."""
        self.seen = np.empty(0, dtype=np.int64)
        self.stored = np.empty(0, dtype=np.int64)
        self.largest = np.empty(0, dtype=bool)
        """Is, or was, the largest group while all places were taken."""
        self._members: np.ndarray | None = None
        """Places ordered by group; stands while samples are replaced by others of their group only."""

    def check(self, groups: np.ndarray, capacity: int) -> None:
        """Refuse more groups than places.

        Raises:
            DataError: A group could not be kept at all.
        """
        known = self._known(groups)
        count = len(self.ids) + (0 if known.all() else len(np.unique(groups[~known])))
        if count > capacity:
            raise DataError(
                f"A balanced buffer of {capacity} samples would have to hold {count} groups.",
                "Expected at least one place for each group.",
                f"Give it a capacity, or bytes, for at least {count} samples, or take the policy 'reservoir'.",
            )

    def place(
        self, ledger: Ledger, groups: np.ndarray, priorities: np.ndarray, uniforms: np.ndarray, seen: int
    ) -> dict[int, int]:
        """Decide, see `Replacement`."""
        self._meet(groups)
        kinds = self.ids.searchsorted(groups)
        chosen = _filled(ledger, len(groups))
        row = len(chosen)
        if row:
            added = np.bincount(kinds[:row], minlength=len(self.ids))
            ledger.groups[list(chosen)] = groups[:row]
            self.seen += added
            self.stored += added
            self._members = None
        while row < len(groups):
            self.largest |= self.stored == self.stored.max()
            # A sample of a group that was never the largest changes the sizes: all before it are decided at once.
            stop = len(groups)
            if not self.largest.all():
                settled = self.largest[kinds[row:]]
                stop = stop if settled.all() else row + int(settled.argmin())
            self._replace_within(ledger, kinds, uniforms, row, stop, chosen)
            if stop < len(groups):
                self._take_from_largest(ledger, int(kinds[stop]), float(uniforms[stop]), stop, chosen)
            row = stop + 1
        return chosen

    def give_up(self, ledger: Ledger, count: int, stream: CounterStream, key: int) -> np.ndarray:
        """Choose from the largest groups, so that those left are as equal as can be."""
        places = ledger.occupied
        shuffled = places[drawn(stream, key, len(places), len(places))]
        # Numbered within its group, a sample's number says at which size of the group its turn comes.
        order = np.argsort(ledger.groups[shuffled], kind="stable")
        ranks = np.empty(len(places), dtype=np.int64)
        ranks[order] = _ranks(np.searchsorted(self.ids, ledger.groups[shuffled][order]))
        places = shuffled[np.argsort(-ranks, kind="stable")[:count]]
        lost = np.bincount(np.searchsorted(self.ids, ledger.groups[places]), minlength=len(self.ids))
        self.stored -= lost
        self.largest |= lost > 0
        self._members = None
        return places

    def forget(self, groups: np.ndarray) -> None:
        """Count samples that are taken out.

        Their group may grow again, even when it was the largest; one that has none left is as if it had never come.
        """
        lost = np.bincount(np.searchsorted(self.ids, groups), minlength=len(self.ids))
        self.stored -= lost
        self.largest &= lost == 0
        left = self.stored > 0
        self.ids, self.seen = self.ids[left], self.seen[left]
        self.stored, self.largest = self.stored[left], self.largest[left]
        self._members = None

    def state(self) -> dict[str, Tensor]:
        """Return the groups, how many of each came, and which were the largest."""
        tables = {"ids": self.ids, "seen": self.seen, "largest": self.largest}
        return {name: torch.from_numpy(table.copy()) for name, table in tables.items()}

    def load(self, state: dict[str, Tensor], ledger: Ledger) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: It does not belong to the ledger.
        """
        ids, stored = np.unique(ledger.groups[ledger.occupied], return_counts=True)
        seen, largest = (state[name].numpy().copy() for name in ("seen", "largest"))
        if not np.array_equal(ids, state["ids"].numpy()) or len(seen) != len(ids) or len(largest) != len(ids):
            raise ValueError("the groups are not those of the samples")
        self.ids, self.seen, self.stored, self.largest = ids, seen, stored, largest
        self._members = None

    def copy(self) -> "Balanced":
        """Return one that changes by itself."""
        return copy.deepcopy(self)

    def _known(self, groups: np.ndarray) -> np.ndarray:
        if not len(self.ids):
            return np.zeros(len(groups), dtype=bool)
        known: np.ndarray = self.ids.take(self.ids.searchsorted(groups), mode="clip") == groups
        return known

    def _meet(self, groups: np.ndarray) -> None:
        known = self._known(groups)
        if known.all():
            return
        new = np.unique(groups[~known])
        places = np.searchsorted(self.ids, new)
        self.ids = np.insert(self.ids, places, new)
        self.seen, self.stored, self.largest = (
            np.insert(table, places, 0) for table in (self.seen, self.stored, self.largest)
        )

    def _replace_within(
        self, ledger: Ledger, kinds: np.ndarray, uniforms: np.ndarray, start: int, stop: int, chosen: dict[int, int]
    ) -> None:
        """Decide about samples of groups that were the largest: algorithm R within each group."""
        if start == stop:
            return
        present = kinds[start:stop]
        order = present.argsort(kind="stable")
        ordered = present[order]
        numbers = self.seen[ordered] + _ranks(ordered) + 1
        places = (uniforms[start:stop][order] * numbers).astype(np.int64)
        self.seen += np.bincount(present, minlength=len(self.ids))
        hits = (places < self.stored[ordered]).nonzero()[0]
        if not len(hits):
            return
        if self._members is None:
            self._members = ledger.groups.argsort(kind="stable")
        starts = self.stored.cumsum() - self.stored
        # In the order of the stream: of several samples for one place the last one stays.
        hits = hits[order[hits].argsort()]
        slots = self._members[starts[ordered[hits]] + places[hits]]
        chosen.update(zip(slots.tolist(), (order[hits] + start).tolist(), strict=True))

    def _take_from_largest(self, ledger: Ledger, kind: int, uniform: float, row: int, chosen: dict[int, int]) -> None:
        """Let a sample of a group that was never the largest replace one of the largest groups."""
        largest = self.ids[self.stored == self.stored.max()]
        # Comparing with a few groups one by one is faster than np.isin.
        candidates = np.flatnonzero(np.logical_or.reduce([ledger.groups == group for group in largest]))
        place = int(candidates[min(int(uniform * len(candidates)), len(candidates) - 1)])
        self.stored[np.searchsorted(self.ids, ledger.groups[place])] -= 1
        self.stored[kind] += 1
        self.seen[kind] += 1
        ledger.groups[place] = self.ids[kind]
        self._members = None
        chosen[place] = row


RULES: dict[str, type[Replacement]] = {"reservoir": Reservoir, "balanced": Balanced, "priority": Priority}
"""By the name of the policy."""


def _filled(ledger: Ledger, count: int) -> dict[int, int]:
    """Give free places to the first samples."""
    free = ledger.free(count).tolist()
    return dict(zip(free, range(len(free)), strict=True))


def _ranks(ordered: np.ndarray) -> np.ndarray:
    """Return of each entry of a sorted array how many equal ones stand before it."""
    ranks: np.ndarray = np.arange(len(ordered)) - ordered.searchsorted(ordered)
    return ranks
