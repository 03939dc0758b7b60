"""All entries of this unseen set in one list."""

from __future__ import annotations

from benchmarks.unseen_a import (
    broken_habits,
    broken_information,
    broken_numbers,
    broken_shapes,
    broken_signals,
    broken_upkeep,
    sound_habits,
    sound_images,
    sound_language,
    sound_others,
)
from benchmarks.zoo.entry import Entry

BROKEN = (broken_information, broken_shapes, broken_signals, broken_numbers, broken_habits, broken_upkeep)
SOUND = (sound_language, sound_images, sound_others, sound_habits)


def entries(sound: bool = True, public: bool = True, broken: bool = True) -> list[Entry]:
    """Return the broken and the sound models in a fixed order; none of them is of a public tracker."""
    files = (BROKEN if broken else ()) + (SOUND if sound else ())
    return [entry for file in files for entry in file.ENTRIES]
