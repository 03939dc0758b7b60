"""The tokenizer that fits a model, as one value that a run can keep.

Text that merely looks like a special token (a document that contains ``<|endoftext|>``) is encoded as the text it is:
only `packing` places special ids, never the data.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.runtime.errors import DataError
from utils.runtime.files import write_atomic
from utils.runtime.optional import require
from utils.tokenization.bpe_trainer import BYTES, END, MASK, PAD, UNKNOWN, train_bpe
from utils.tokenization.characters import train_characters
from utils.tokenization.pretrained import Candidate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDED_TASKS = ("seq2seq", "text_classification", "regression")
"""Tasks whose texts are not packed but padded to one length per batch."""
ROLES = {
    END: ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "[SEP]"),
    PAD: ("<|pad|>", "[PAD]", "<pad>", "<|padding|>"),
    MASK: ("<|mask|>", "[MASK]", "<mask>"),
    UNKNOWN: ("<|unk|>", "[UNK]", "<unk>"),
}
"""Names under which tokenizers keep the tokens that training needs, our own first."""
_SAMPLES, _SAMPLE_LENGTH = 64, 2000
_PIECE = 1 << 18
"""Longest text, in characters, handed over at once: the encoder keeps some hundred bytes for each token of a text."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer; make one with `choose_tokenizer` or `load`."""

    tokenizer: "Tokenizer"
    """The underlying ``tokenizers.Tokenizer``."""
    reason: str
    """Why this tokenizer, and what its vocabulary is made of."""
    lossless: bool = True
    """Whether decoding gives back every text; character level and some public tokenizers do not."""

    def __post_init__(self) -> None:
        """Make the tokenizer read the names of special tokens in a text as ordinary text."""
        self.tokenizer.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """Number of entries."""
        return int(self.tokenizer.get_vocab_size())

    @property
    def eos_id(self) -> int | None:
        """Id that separates documents."""
        return self._id(END)

    @property
    def pad_id(self) -> int | None:
        """Id that fills up short sequences."""
        return self._id(PAD)

    @property
    def mask_id(self) -> int | None:
        """Id that hides a token in masked language modelling."""
        return self._id(MASK)

    @property
    def unknown_id(self) -> int | None:
        """Id of what has no id of its own; None where everything has."""
        return self._id(UNKNOWN)

    @property
    def fill_id(self) -> int:
        """Id behind the end of short sequences: the padding, or the end of a text where there is none."""
        filling = self.pad_id if self.pad_id is not None else self.eos_id
        return 0 if filling is None else filling

    @property
    def special_ids(self) -> tuple[int, ...]:
        """All ids that are no part of a text, reserved ones and that of the unknown included, ascending."""
        added = self.tokenizer.get_added_tokens_decoder()
        return tuple(sorted(number for number, token in added.items() if token.special))

    def _id(self, role: str) -> int | None:
        numbers = (self.tokenizer.token_to_id(name) for name in ROLES[role])
        return next((int(number) for number in numbers if number is not None), None)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts, each on its own and without adding anything.

        Returns:
            One int32 array of shape (tokens,) for each text.

        Raises:
            DataError: A text holds lone surrogates, which no encoding can store.
        """
        result: list[np.ndarray] = []
        for group in _groups(texts):
            pieces = [piece for text in group for piece in _pieces(text)]
            try:
                encodings = self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            except (TypeError, UnicodeError) as error:
                raise DataError(
                    f"A text cannot be encoded ({error}).",
                    "Expected text without lone surrogates (half characters).",
                    "Clean it with text.encode('utf-8', 'replace').decode('utf-8').",
                ) from error
            arrays = iter([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])
            for text in group:
                parts = [next(arrays) for _ in _pieces(text)]
                result.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
        return result

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Turn ids back into text.

        Args:
            ids: Token ids.
            skip_special: Leave out special tokens instead of writing their names.
        """
        return str(self.tokenizer.decode([int(number) for number in ids], skip_special_tokens=skip_special))

    def to_json(self) -> str:
        """Return the contents of a tokenizer.json that other tools read."""
        return str(self.tokenizer.to_str(pretty=True))

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json."""
        write_atomic(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path, reason: str = "", lossless: bool = True) -> "TextTokenizer":
        """Read a tokenizer.json.

        Args:
            path: The file.
            reason: Why it is this one.
            lossless: Whether decoding gives back every text.

        Raises:
            DataError: The file is missing or is not a tokenizer.
        """
        path = Path(path)
        tokenizers = require("tokenizers", "read a tokenizer")
        if not path.is_file():
            raise DataError(f"There is no tokenizer at {path}.", "Expected a tokenizer.json.")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"{path} cannot be read as a tokenizer ({error}).", "Expected a tokenizer.json written by Seedbed."
            ) from error
        return cls(tokenizer, reason or f"read from {path.name}", lossless)

    def to_dict(self) -> dict[str, Any]:
        """Return sizes, special ids and the reason."""
        return {
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "mask_id": self.mask_id,
            "unknown_id": self.unknown_id,
            "lossless": self.lossless,
            "reason": self.reason,
        }


def choose_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    task: str = "causal_lm",
    pad_token_id: int | None = None,
    candidates: Iterable[Candidate | None] = (),
) -> TextTokenizer:
    """Choose the tokenizer for a model and a text.

    The first candidate that fits wins. Without one a tokenizer is trained on the text to exactly the model's
    vocabulary: byte-level BPE where 256 bytes and the special tokens have room, character level where they have not.

    Args:
        texts: The training text; held-out text must not be in it.
        vocab_size: Number of token ids the model knows.
        task: The model's task; masked language modelling adds a mask token, tasks with padding a padding token.
        pad_token_id: The id the model keeps for padding; the tokenizer then uses it for nothing else.
        candidates: Tokenizers that exist already, the best first; the reason says why one did not fit.

    Raises:
        DataError: The vocabulary is too small even for single characters.
    """
    texts = texts if isinstance(texts, list) else list(texts)
    refused = []
    for candidate in candidates:
        if candidate is None:
            continue
        chosen, why = _fitting(candidate, texts, vocab_size, task)
        if chosen is not None:
            return chosen
        refused.append(why)
    special = [END] + ([MASK] if task == "masked_lm" else [])
    fixed: dict[str, int] = {}
    if pad_token_id is not None and 0 <= pad_token_id < vocab_size:
        special.append(PAD)
        fixed[PAD] = pad_token_id
    elif task in PADDED_TASKS:
        special.append(PAD)
    after = "".join(f" ({why})" for why in refused)
    if vocab_size < BYTES + len(special):
        characters = train_characters(texts, vocab_size, special, fixed)
        return TextTokenizer(characters.tokenizer, characters.reason + after, lossless=False)
    trained = train_bpe(texts, vocab_size, special, fixed)
    return TextTokenizer(trained.tokenizer, trained.reason + after)


def _fitting(
    candidate: Candidate, texts: Sequence[str], vocab_size: int, task: str
) -> tuple[TextTokenizer | None, str]:
    """Return a candidate as a tokenizer, or why it does not fit."""
    if candidate.content is None:
        return None, candidate.origin
    tokenizers = require("tokenizers", "read a tokenizer")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(candidate.content)
    except Exception as error:  # the library raises plain Exception
        return None, f"{candidate.origin} cannot be read as a tokenizer: {error}"
    tokenizer.no_truncation()
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        return None, f"{candidate.origin} has ids up to {largest}, and the model knows {vocab_size}"
    found = TextTokenizer(tokenizer, "")
    if found.eos_id is None:
        return None, f"{candidate.origin} has no token that ends a text"
    if task == "masked_lm" and found.mask_id is None:
        return None, f"{candidate.origin} has no mask token"
    sample = [text[:_SAMPLE_LENGTH] for text in texts[:_SAMPLES]]
    lossless = all(found.decode(ids) == text for text, ids in zip(sample, found.encode(sample), strict=True))
    if not lossless and task == "causal_lm":
        return None, f"{candidate.origin} does not give the text back that it took apart"
    size = found.vocab_size
    reason = f"{candidate.origin}: {size} entries for a vocabulary of {vocab_size}"
    if not lossless:
        reason += "; it changes the text (case, white space or characters), so that decoding does not give it back"
    return TextTokenizer(tokenizer, reason, lossless), ""


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after line ends into pieces of about `_PIECE` characters."""
    start = 0
    while len(text) - start > _PIECE:
        cut = text.rfind("\n", start, start + _PIECE) + 1
        cut = cut if cut > start else start + _PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Collect texts into batches of bounded size."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size > 8 * _PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group
