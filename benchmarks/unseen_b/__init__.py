"""A last set of broken and sound models, written apart and run once, when the checks were done."""

from benchmarks.unseen_b.registry import entries
from benchmarks.zoo.entry import Entry

__all__ = ["Entry", "entries"]
