"""All entries of the zoo in one list."""

from benchmarks.zoo import (
    broken_attention,
    broken_inputs,
    broken_losses,
    broken_masks,
    broken_modes,
    broken_modules,
    broken_numbers,
    broken_parameters,
    broken_signals,
    public_bugs,
    sound_pictures,
    sound_texts,
    sound_transformers,
    sound_traps,
)
from benchmarks.zoo.entry import Entry


def entries(sound: bool = True, public: bool = True, broken: bool = True) -> list[Entry]:
    """Return the broken models of the zoo, those of public trackers and the sound ones, in a fixed order."""
    files = [broken_masks, broken_inputs, broken_parameters, broken_signals, broken_attention, broken_numbers]
    files += [broken_losses, broken_modes, broken_modules]
    result = [entry for file in files for entry in file.ENTRIES] if broken else []
    if public:
        result += public_bugs.ENTRIES
    if sound:
        for file in (sound_texts, sound_pictures, sound_traps, sound_transformers):
            result += file.ENTRIES
    return result
