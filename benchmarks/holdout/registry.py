"""All entries of the held-out set in one list."""

from __future__ import annotations

from benchmarks.holdout import (
    broken_habits,
    broken_information,
    broken_numbers,
    broken_others,
    broken_shapes,
    broken_signals,
    broken_starts,
    broken_surprises,
    sound_bodies,
    sound_habits,
    sound_starts,
)
from benchmarks.zoo.entry import Entry

BROKEN = (
    broken_information,
    broken_shapes,
    broken_starts,
    broken_signals,
    broken_numbers,
    broken_habits,
    broken_surprises,
    broken_others,
)
SOUND = (sound_bodies, sound_starts, sound_habits)


def entries(sound: bool = True, public: bool = True, broken: bool = True) -> list[Entry]:
    """Return the broken and the sound models in a fixed order; none of them is of a public tracker."""
    files = (BROKEN if broken else ()) + (SOUND if sound else ())
    return [entry for file in files for entry in file.ENTRIES]
