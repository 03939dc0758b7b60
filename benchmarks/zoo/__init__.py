"""Broken and sound models with their known answers, for `benchmarks/validation_quality.py`.

The faults were written from the description of each code, without a look at the checks that look for them.
"""

from benchmarks.zoo.entry import Entry
from benchmarks.zoo.registry import entries

__all__ = ["Entry", "entries"]
