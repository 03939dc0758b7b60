"""All entries of this set in one list."""

from __future__ import annotations

from benchmarks.unseen_c import (
    broken_depth,
    broken_init,
    broken_io,
    broken_loss,
    broken_numbers,
    broken_order,
    broken_params,
    broken_save,
    broken_state,
    sound_other,
    sound_text,
    sound_traps,
    sound_traps_more,
    sound_vision,
)
from benchmarks.zoo.entry import Entry

BROKEN = (
    broken_order,
    broken_io,
    broken_params,
    broken_save,
    broken_init,
    broken_depth,
    broken_numbers,
    broken_loss,
    broken_state,
)
SOUND = (sound_traps, sound_traps_more, sound_text, sound_vision, sound_other)


def entries(sound: bool = True, public: bool = True, broken: bool = True) -> list[Entry]:
    """Return the broken and the sound models in a fixed order; none of them is of a public tracker."""
    files = (BROKEN if broken else ()) + (SOUND if sound else ())
    return [entry for file in files for entry in file.ENTRIES]
