"""What a model needs from data, gathered in one value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.runtime.errors import DataError
from utils.tokenization import Candidate, TextTokenizer, choose_tokenizer

if TYPE_CHECKING:
    from utils.training.prepared_data import PreparedData

LANGUAGE_TASKS = ("causal_lm", "masked_lm")
DEFAULT_LENGTH = 256
"""Longest window unless the user says otherwise; the whole length of models that read less."""
SHORTEST_LENGTH = 8
COLUMNS = {
    "causal_lm": ("text",),
    "masked_lm": ("text",),
    "seq2seq": ("source", "target"),
    "text_classification": ("text", "label"),
    "image_classification": ("image", "label"),
    "tabular_classification": ("label",),
    "regression": ("text", "label", "target"),
}
"""By task, which columns of a table can be named for it."""
TEXT_SHARE, SAMPLE_SHARE = 0.05, 0.2
"""Shares that are held out unless the user says otherwise: of a text, and of samples with labels."""


@dataclass(frozen=True)
class Needs:
    """What a model needs from data."""

    task: str
    """What the model is for."""
    vocab_size: int | None = None
    """Number of token ids it knows."""
    max_length: int | None = None
    """Tokens that it reads at most."""
    num_labels: int | None = None
    """Number of classes or targets."""
    image_shape: Sequence[int] | None = None
    """Channels, height and width of its images."""
    features: int | None = None
    """Numbers in a row, for models of tables; None for models that read something else."""
    pad_token_id: int | None = None
    """The id it keeps for padding."""
    decoder_start: int | None = None
    """The id that starts a decoder, where the model says one."""
    tokenizers: tuple[Candidate | None, ...] = ()
    """Tokenizers that exist already, the best first."""
    seed: int = 0
    """Chooses what is held out."""
    share: float | None = None
    """Share that is held out."""
    like: "PreparedData | None" = None
    """The first of several parts, whose tokenizer, scales and columns the others take over."""
    in_memory: bool = False
    """It must fit into memory, because it is one of several parts that are joined."""

    def tokenizer_for(self, texts: Sequence[str]) -> TextTokenizer:
        """Return the tokenizer of the first part, or choose one by some training text.

        Raises:
            DataError: The vocabulary is unknown, or too small.
        """
        if self.like is not None and self.like.tokenizer is not None:
            return self.like.tokenizer
        return choose_tokenizer(texts, self.vocabulary, self.task, self.pad_token_id, self.tokenizers)

    @property
    def columns(self) -> tuple[str, ...]:
        """Which columns of a table can be named; none for a task without data."""
        names = COLUMNS.get(self.task, ())
        return names if self.features is None else tuple(name for name in names if name != "text")

    @property
    def share_of_text(self) -> float:
        """Share of a text that is held out."""
        return self.share or TEXT_SHARE

    @property
    def share_of_samples(self) -> float:
        """Share of labelled samples that is held out."""
        return self.share or SAMPLE_SHARE

    @property
    def length(self) -> int:
        """Tokens in a sample.

        Raises:
            DataError: The model reads too few.
        """
        length = DEFAULT_LENGTH if self.max_length is None else self.max_length
        if length < SHORTEST_LENGTH:
            raise DataError(
                f"The model's context is {length} tokens.",
                f"Text needs windows of at least {SHORTEST_LENGTH}.",
                "Build the model with a longer context.",
            )
        return length

    @property
    def vocabulary(self) -> int:
        """Number of token ids.

        Raises:
            DataError: It is unknown.
        """
        if self.vocab_size is None:
            raise DataError(
                "The model's vocabulary size is unknown.",
                "A tokenizer of exactly that size is trained on the text.",
                "Say it with ModelSpec(vocab_size=...).",
            )
        return self.vocab_size
