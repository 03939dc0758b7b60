"""A third set of broken and sound models, written apart from the checks and from the other two sets."""

from benchmarks.unseen_a.registry import entries
from benchmarks.zoo.entry import Entry

__all__ = ["Entry", "entries"]
