"""What an episodic buffer holds at a time, which can be exchanged as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.memory.counter_stream import CounterStream
from utils.memory.ledger import BYTES, COLUMNS, Ledger
from utils.memory.replacement import Replacement
from utils.memory.sample_storage import Layout, allocated

NOT_KEPT = -1
"""Slot of a sample that is not, or no longer, in the buffer."""


@dataclass(frozen=True)
class Content:
    """Samples, what is known about them, and the rule that decides what stays."""

    capacity: int
    """Most samples; 0 before the first one."""
    fields: dict[str, Tensor]
    """By name, each [capacity, ...]."""
    ledger: Ledger
    """What is known about each slot."""
    rule: Replacement
    """With what it remembers."""

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Shape and type of the fields of one sample, by name."""
        return {name: Layout.of(field) for name, field in self.fields.items()}

    def bytes_for(self, layouts: Mapping[str, Layout]) -> int:
        """Return the bytes of a slot with such fields."""
        return self.rule.bytes + BYTES + sum(layout.bytes for layout in layouts.values())

    def refitted(
        self, rows: Mapping[str, Tensor], capacity: int, directory: Path | None, stream: CounterStream, key: int
    ) -> tuple["Content", np.ndarray]:
        """Return the content with new or wider fields, or fewer slots; what is here stays as it is.

        Args:
            rows: Fields by name, a row for each sample in the order of its slot.
            capacity: At most the present one; the rule says what is given up.
            directory: Where fields lie; None for main memory.
            stream: Gives random numbers.
            key: Which of them.

        Returns:
            The other content, and the new slot by old slot, -1 for those that hold nothing any more.

        Raises:
            DataError: More groups than slots, or no room in the directory.
        """
        places = self.ledger.occupied
        kept, targets, ledger, rule = np.arange(len(places)), places, self.ledger, self.rule
        if capacity < self.capacity:
            rule = rule.copy()
            rule.check(np.empty(0, dtype=np.int64), capacity)
            if len(places) > capacity:
                lost = rule.give_up(ledger, len(places) - capacity, stream, key)
                kept = np.flatnonzero(~np.isin(places, lost))
            targets = np.arange(len(kept))
            ledger = ledger.fitted(capacity, places[kept])
        fields = dict(self.fields)
        index, source, present = (torch.from_numpy(part) for part in (targets, kept, places))
        for name in self.fields.keys() | rows.keys():
            if name in rows or capacity < self.capacity:
                values = rows[name] if name in rows else self.fields[name].index_select(0, present)
                fields[name] = allocated(Layout.of(values), capacity, directory)
                fields[name].index_copy_(0, index, values.index_select(0, source))
        moved = np.full(self.capacity, NOT_KEPT, dtype=np.int64)
        moved[places[kept]] = targets
        return Content(capacity, fields, ledger, rule), moved

    def state(self) -> dict[str, Any]:
        """Return copies of all samples and of what is known about them."""
        index = torch.from_numpy(self.ledger.occupied.copy())
        return {
            "capacity": self.capacity,
            "slots": index,
            "fields": {name: field.index_select(0, index) for name, field in self.fields.items()},
            "about": self.ledger.state(),
            "rule": self.rule.state(),
        }


def restored(state: Mapping[str, Any], rule: Replacement, directory: Path | None) -> Content:
    """Build the content that a state describes.

    Args:
        state: What `Content.state` returned.
        rule: A new one.
        directory: Where fields lie; None for main memory.

    Raises:
        DataError: There is no room in the directory.
        Exception: Of any kind that a state which does not hold together gives rise to.
    """
    capacity, places, samples = int(state["capacity"]), state["slots"].numpy().copy(), state["fields"]
    if not isinstance(samples, Mapping):
        raise TypeError("the fields are no dict")
    if not samples:
        return Content(0, {}, Ledger(0), rule)
    if any(len(field) != len(places) for field in samples.values()):
        raise ValueError("there are more or fewer samples than slots")
    if len(places) and (places.min() < 0 or places.max() >= capacity or len(np.unique(places)) != len(places)):
        raise ValueError("there are slots that do not exist or are taken twice")
    ledger = Ledger(capacity)
    ledger.write(places, {name: _column(state["about"][name], len(places)) for name in COLUMNS})
    if len(ledger.occupied) != len(places):
        raise ValueError("there are samples without a number in the stream")
    rule.load(state["rule"], ledger)
    fields = {name: allocated(Layout.of(values), capacity, directory) for name, values in samples.items()}
    for name, field in fields.items():
        field.index_copy_(0, torch.from_numpy(places), samples[name])
    return Content(capacity, fields, ledger, rule)


def _column(values: Tensor, rows: int) -> np.ndarray:
    """Return the entries of one column of a ledger."""
    if values.shape != (rows,):
        raise ValueError("there is a column of another length")
    column: np.ndarray = values.numpy()
    return column
