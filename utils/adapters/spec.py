"""What the user knows about a model; everything left at None is detected."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from utils.runtime.errors import ConfigError

TASKS = (
    "causal_lm",
    "masked_lm",
    "seq2seq",
    "text_classification",
    "image_classification",
    "audio_classification",
    "tabular_classification",
    "regression",
    "embedding",
)


@runtime_checkable
class ModelSource(Protocol):
    """Anything that carries a module with its config, as a loaded model and an adapter do."""

    module: nn.Module
    config: dict[str, Any]
    factory: Any


@dataclass(frozen=True)
class ModelSpec:
    """Facts about a model that override detection."""

    task: str | None = None
    """What the model is for, one of `TASKS`."""
    vocab_size: int | None = None
    """Number of legal token ids."""
    max_length: int | None = None
    """Longest legal sequence, in tokens."""
    num_labels: int | None = None
    """Number of classes or regression targets."""
    pad_token_id: int | None = None
    """The token id that fills up short sequences."""
    example_inputs: Mapping[str, Any] | None = None
    """Keyword arguments with which ``model(**example_inputs)`` is a valid call, batch first."""
    frozen: tuple[str, ...] = ()
    """Prefixes of the names of parameters that are frozen on purpose."""
    linear_memory: bool | None = None
    """The author promises memory linear in the sequence length."""
    factory: Callable[[], nn.Module] | None = None
    """Builds another instance with the same settings."""

    def __post_init__(self) -> None:
        """Check the values that can be checked without a model."""
        if self.task is not None and self.task not in TASKS:
            raise ConfigError(
                f"ModelSpec.task is {self.task!r}.", f"Expected one of {', '.join(TASKS)}.", "Or leave it out."
            )
        for name in ("vocab_size", "max_length", "num_labels"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"ModelSpec.{name} is {value!r}.", "Expected a whole number of at least 1.")
        if self.pad_token_id is not None and (not isinstance(self.pad_token_id, int) or self.pad_token_id < 0):
            raise ConfigError(f"ModelSpec.pad_token_id is {self.pad_token_id!r}.", "Expected a token id, 0 or more.")
        if self.example_inputs is not None and not isinstance(self.example_inputs, Mapping):
            raise ConfigError(
                f"ModelSpec.example_inputs is a {type(self.example_inputs).__name__}.",
                "Expected a dict of keyword arguments, batch first.",
                "Write example_inputs={'input_ids': ...} with the names that forward() uses.",
            )
        if isinstance(self.frozen, str):
            raise ConfigError(
                f"ModelSpec.frozen is the string {self.frozen!r}.",
                "Expected a tuple of prefixes.",
                f"Write frozen=({self.frozen!r},).",
            )
