"""What a buffer knows about each of its places, beside the sample itself."""

import numpy as np
import torch
from torch import Tensor

COLUMNS: dict[str, type[np.generic]] = {
    "groups": np.int64,
    "times": np.int64,
    "rehearsals": np.int64,
    "priorities": np.float64,
    "arrivals": np.int64,
}
"""Group of the sample, time-stamp, how often it was drawn, priority, and its number in the stream, from 0."""
BYTES = sum(np.dtype(kind).itemsize for kind in COLUMNS.values()) + 8
"""For each place, the list of those that hold a sample included."""
FREE = -1
"""Number in the stream of a place that holds nothing."""


class Ledger:
    """The columns of `COLUMNS`, one entry for each place."""

    def __init__(self, capacity: int) -> None:
        self.columns = {name: np.zeros(capacity, dtype=kind) for name, kind in COLUMNS.items()}
        self.columns["arrivals"][:] = FREE
        self._occupied: np.ndarray | None = None

    @property
    def capacity(self) -> int:
        """How many places there are."""
        return len(self.columns["arrivals"])

    @property
    def groups(self) -> np.ndarray:
        """The column of that name."""
        return self.columns["groups"]

    @property
    def occupied(self) -> np.ndarray:
        """Places that hold a sample, int64, ascending."""
        if self._occupied is None:
            self._occupied = np.flatnonzero(self.columns["arrivals"] != FREE)
        return self._occupied

    def free(self, most: int) -> np.ndarray:
        """Return the first free places, ascending, at most so many."""
        if len(self.occupied) == self.capacity:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.columns["arrivals"] == FREE)[:most]

    def write(self, places: np.ndarray, entries: dict[str, np.ndarray | int]) -> None:
        """Write the entries of samples that are put into places."""
        for name, values in entries.items():
            self.columns[name][places] = values
        if self._occupied is not None and len(self._occupied) < self.capacity:
            self._occupied = None

    def clear(self, places: np.ndarray) -> None:
        """Free places."""
        for name, column in self.columns.items():
            column[places] = FREE if name == "arrivals" else 0
        self._occupied = None

    def fitted(self, capacity: int, places: np.ndarray) -> "Ledger":
        """Return a ledger of another capacity with the entries of some places, from its first place on."""
        ledger = Ledger(capacity)
        for name, column in self.columns.items():
            ledger.columns[name][: len(places)] = column[places]
        return ledger

    def copy(self) -> "Ledger":
        """Return one that changes by itself."""
        ledger = Ledger(0)
        ledger.columns = {name: column.copy() for name, column in self.columns.items()}
        return ledger

    def state(self) -> dict[str, Tensor]:
        """Return the entries of the places that hold a sample, by column."""
        return {name: torch.from_numpy(column[self.occupied]) for name, column in self.columns.items()}
