"""What the user knows about a model; everything left at None is detected."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

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


WRAPPERS = ("module.", "_orig_mod.")
"""What data parallelism and torch.compile put in front of the names of parameters."""


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
        pad = self.pad_token_id
        if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool) or pad < 0):
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
        if not isinstance(self.frozen, (tuple, list)) or not all(isinstance(p, str) and p for p in self.frozen):
            raise ConfigError(
                f"ModelSpec.frozen is {self.frozen!r}.",
                "Expected a tuple of prefixes of parameters' names.",
                "Write frozen=('encoder.',), or leave it out.",
            )
        if self.factory is not None and not callable(self.factory):
            raise ConfigError(
                f"ModelSpec.factory is a {type(self.factory).__name__}.",
                "Expected a function without arguments that builds the model.",
                "Write factory=lambda: Model(config).",
            )
        if self.linear_memory is not None and not isinstance(self.linear_memory, bool):
            raise ConfigError(
                f"ModelSpec.linear_memory is {self.linear_memory!r}.", "Expected True or False.", "Or leave it out."
            )
        for name, value in (self.example_inputs or {}).items():
            if not isinstance(name, str):
                raise ConfigError(
                    f"ModelSpec.example_inputs has the key {name!r}.",
                    "Expected the names of forward()'s arguments.",
                    "Write example_inputs={'input_ids': ...}.",
                )
            # A single number of numpy's is as good as one of Python's.
            if not isinstance(value, Tensor) and hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0:
                raise ConfigError(
                    f"ModelSpec.example_inputs[{name!r}] is a {type(value).__name__}.",
                    "Expected tensors.",
                    "Convert it with torch.as_tensor(...).",
                )

    def factory_for(self, module: nn.Module) -> Callable[[], nn.Module] | None:
        """Return the factory, made to raise a `ConfigError` where it does not build another such module."""
        factory = self.factory
        if factory is None:
            return None

        def build() -> nn.Module:
            built: Any = factory()
            shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
            if isinstance(built, nn.Module) and shapes == {n: tuple(p.shape) for n, p in built.named_parameters()}:
                return built
            kind = type(built).__name__ + (" with other parameters" if isinstance(built, nn.Module) else "")
            raise ConfigError(
                f"ModelSpec.factory builds a {kind}.",
                f"Expected another {type(module).__name__} with the same settings.",
                "Correct it, or leave it out.",
            )

        return build

    def freezes(self, name: str) -> bool:
        """Tell whether a parameter of this name is frozen on purpose; prefixes may name wrappers or leave them out."""
        return any(_names(prefix, name) for prefix in self.frozen)

    def check_against(self, module: nn.Module, required: Sequence[str], names: Sequence[str] | None) -> None:
        """Check the values that only a model can confirm.

        Args:
            module: The model.
            required: Arguments without which forward cannot be called.
            names: All arguments that forward takes; None where it takes any.

        Raises:
            ConfigError: A prefix that no parameter has, or example inputs under names that forward does not take.
        """
        parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        for prefix in self.frozen:
            if not any(_names(prefix, name) for name in parameters):
                some = ", ".join(parameters[:4]) + (", ..." if len(parameters) > 4 else "")
                raise ConfigError(
                    f"ModelSpec.frozen names {prefix!r}, and no parameter's name starts with it.",
                    f"Expected prefixes of {some or 'names; but the model has no parameters'}.",
                    "Correct the prefix; model.named_parameters() lists all names.",
                )
        if self.example_inputs is None or names is None:
            return
        unknown = [name for name in self.example_inputs if name not in names]
        missing = [name for name in required if name not in self.example_inputs]
        if unknown or missing:
            said = [f"gives {unknown[0]!r}, which forward() does not take"] if unknown else []
            said += [f"lacks {missing[0]!r}, which forward() requires"] if missing else []
            raise ConfigError(
                f"ModelSpec.example_inputs {' and '.join(said)}.",
                f"Expected keyword arguments out of {', '.join(names) or 'none at all'}.",
                "Correct it so that model(**example_inputs) is a valid call.",
            )


def _names(prefix: str, name: str) -> bool:
    """Tell whether a prefix, with the names of wrappers or without, is that of a parameter."""
    return name.startswith(prefix) or _unwrapped(name).startswith(_unwrapped(prefix))


def _unwrapped(name: str) -> str:
    """Return a name without the wrappers in front of it."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
