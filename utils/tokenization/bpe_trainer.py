"""Byte-level BPE of exactly the size a model's embedding has.

Unusual: ids are assigned after training. A model that reserves a padding row (whose embedding gets no gradient) keeps
that row for padding, and a corpus too small for the vocabulary is topped up with reserved entries, so that every id the
model knows exists in the tokenizer and the other way round.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.runtime.errors import DataError
from utils.runtime.optional import require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END, PAD, MASK, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|mask|>", "<|unk|>"
BYTES = 256
"""Single-byte entries that every byte-level vocabulary holds, so that any text can be written."""


@dataclass(frozen=True)
class TrainedBPE:
    """A trained tokenizer and what its vocabulary is made of."""

    tokenizer: "Tokenizer"
    """The tokenizer, with ``vocab_size`` entries."""
    merges: int
    """Entries learned from the corpus."""
    special: tuple[str, ...]
    """Special entries in use."""
    reserved: int
    """Entries that exist only to fill the vocabulary and never occur."""

    @property
    def reason(self) -> str:
        """One sentence on what the vocabulary is made of."""
        size = self.tokenizer.get_vocab_size()
        parts = [f"{BYTES} bytes", f"{self.merges} merges learned from the training text"]
        if self.special:
            parts.append(f"{len(self.special)} special ({' '.join(self.special)})")
        if self.reserved:
            parts.append(f"{self.reserved} reserved and unused because the text offers no more merges")
        return f"byte-level BPE of exactly {size} entries: " + ", ".join(parts)


def train_bpe(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = (END,), fixed_ids: dict[str, int] | None = None
) -> TrainedBPE:
    """Train byte-level BPE on texts; the result has exactly `vocab_size` entries and is the same every time.

    Args:
        texts: The corpus.
        vocab_size: Number of entries, special ones included.
        special: Names of special entries; they take the lowest free ids.
        fixed_ids: Ids that some of the special entries must have.

    Raises:
        DataError: The vocabulary cannot hold the 256 bytes and the special entries.
    """
    tokenizers = require("tokenizers", "train a tokenizer")
    smallest = BYTES + len(special)
    if vocab_size < smallest:
        raise DataError(
            f"The model's vocabulary has {vocab_size} entries.",
            f"A byte-level tokenizer needs at least {smallest}: {BYTES} bytes and {len(special)} special "
            f"({' '.join(special)}).",
            f"Build the model with vocab_size={smallest} or more.",
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    # No normaliser, and no space put in front: both would lose information.
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    description = json.loads(tokenizer.to_str())
    learned = sorted(description["model"]["vocab"], key=description["model"]["vocab"].__getitem__)
    reserved = [f"<|reserved_{number}|>" for number in range(vocab_size - len(special) - len(learned))]
    description["model"]["vocab"] = assign_ids([*special, *learned, *reserved], fixed_ids or {})
    # The pre-tokenizer splits letters from punctuation, so that no merge can ever spell a name such as <|endoftext|>.
    result = tokenizers.Tokenizer.from_str(json.dumps(description))
    result.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in (*special, *reserved)])
    return TrainedBPE(result, len(learned) - BYTES, tuple(special), len(reserved))


def assign_ids(names: list[str], fixed_ids: dict[str, int]) -> dict[str, int]:
    """Number the entries in order, except those whose id is fixed."""
    taken = set(fixed_ids.values())
    free = (number for number in range(len(names)) if number not in taken)
    return {name: fixed_ids[name] if name in fixed_ids else next(free) for name in names}
