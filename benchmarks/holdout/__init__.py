"""A second set of broken and sound models that no check was tuned on, by other hands than the zoo's."""

from benchmarks.holdout.registry import entries
from benchmarks.zoo.entry import Entry

__all__ = ["Entry", "entries"]
