"""Character level for vocabularies too small for bytes: the commonest characters, and one id for all others.

Unusual: not lossless. A character outside the vocabulary becomes `UNKNOWN`; how often that happens is part of the
reason and of the data report.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.runtime.errors import DataError
from utils.runtime.optional import require
from utils.tokenization.bpe_trainer import UNKNOWN, assign_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FEWEST = 2
"""Fewest ordinary characters that a vocabulary must have room for."""


@dataclass(frozen=True)
class TrainedCharacters:
    """A character-level tokenizer and what its vocabulary is made of."""

    tokenizer: "Tokenizer"
    """The tokenizer, with exactly the entries asked for."""
    kept: int
    """Characters with an id of their own."""
    unknown_share: float
    """Share of the training text's characters that become `UNKNOWN`."""
    special: tuple[str, ...]
    """Special entries in use, `UNKNOWN` included."""
    reserved: int
    """Entries that exist only to fill the vocabulary."""

    @property
    def reason(self) -> str:
        """One sentence on what the vocabulary is made of."""
        size = self.tokenizer.get_vocab_size()
        share = f"{self.unknown_share:.2%}" if self.unknown_share else "none"
        reserved = f", {self.reserved} reserved and unused" if self.reserved else ""
        return (
            f"character level, because {size} entries are too few for the 256 bytes: the {self.kept} commonest "
            f"characters of the training text, {len(self.special)} special ({' '.join(self.special)}){reserved}; "
            f"{share} of the training text's characters become {UNKNOWN}"
        )


def train_characters(
    texts: Iterable[str], vocab_size: int, special: Sequence[str], fixed_ids: dict[str, int] | None = None
) -> TrainedCharacters:
    """Give ids to the commonest characters of some texts; the result has exactly `vocab_size` entries.

    Args:
        texts: The corpus.
        vocab_size: Number of entries, special ones included.
        special: Names of special entries; `UNKNOWN` is added.
        fixed_ids: Ids that some of the special entries must have.

    Raises:
        DataError: The vocabulary has no room for two characters beside the special entries.
    """
    tokenizers = require("tokenizers", "make a tokenizer")
    special = [*special, UNKNOWN]
    room = vocab_size - len(special)
    if room < FEWEST:
        raise DataError(
            f"The model's vocabulary has {vocab_size} entries.",
            f"Even character level needs at least {len(special) + FEWEST}: {len(special)} special "
            f"({' '.join(special)}) and {FEWEST} characters.",
            "Build the model with a larger vocab_size; 257 and more give byte-level BPE.",
        )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:room]
    reserved = [f"<|reserved_{number}|>" for number in range(room - len(kept))]
    vocabulary = assign_ids([*special, *kept, *reserved], fixed_ids or {})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    # Serialised once, so that this tokenizer and one read from the run's copy are built the same way.
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str())))
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in (*special, *reserved)])
    total = counts.total()
    unknown = (total - sum(counts[character] for character in kept)) / total if total else 0.0
    return TrainedCharacters(tokenizer, len(kept), unknown, tuple(special), len(reserved))
