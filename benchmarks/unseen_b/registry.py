"""All entries of the unseen set in one list."""

from __future__ import annotations

from benchmarks.unseen_b import (
    broken_batch,
    broken_modes,
    broken_numbers,
    broken_outputs,
    broken_start,
    broken_time,
    broken_training,
    sound_plain_other,
    sound_plain_text,
    sound_traps_other,
    sound_traps_text,
)
from benchmarks.zoo.entry import Entry

BROKEN = (
    broken_time,
    broken_batch,
    broken_outputs,
    broken_training,
    broken_start,
    broken_numbers,
    broken_modes,
)
SOUND = (sound_traps_text, sound_traps_other, sound_plain_text, sound_plain_other)


def entries(sound: bool = True, public: bool = True, broken: bool = True) -> list[Entry]:
    """Return the broken and the sound models in a fixed order; none of them is of a public tracker."""
    files = (BROKEN if broken else ()) + (SOUND if sound else ())
    return [entry for file in files for entry in file.ENTRIES]
