"""A set of broken and sound models, written apart from the checks and after `unseen_b`."""

from benchmarks.unseen_c.registry import entries
from benchmarks.zoo.entry import Entry

__all__ = ["Entry", "entries"]
