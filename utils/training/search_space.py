"""What a search may change: ranges and choices for fields of `TrainingConfig`, checked before the first trial."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Protocol

from utils.runtime.errors import ConfigError
from utils.training.config import TrainingConfig

FIXED = {
    **dict.fromkeys(("max_steps", "max_epochs"), "a longer run nearly always ends lower"),
    **dict.fromkeys(("validation_share", "val_every_steps"), "the held-out losses of the trials could not be compared"),
    "seed": "the search would choose luck",
    **dict.fromkeys(
        ("devices", "strategy", "workers", "tracking", "time_budget_minutes", "session_limit_minutes",
         "checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints", "keep_best", "keep_every_steps",
         "log_every_steps", "gradient_checkpointing", "compile"),
        "it does not change what is learned",
    ),
}  # fmt: skip
"""Fields that no search may change, and why."""


class Dimension(Protocol):
    """The values that one field may take."""

    def suggest(self, trial: Any, name: str) -> Any:
        """Let an Optuna trial choose."""

    def examples(self) -> tuple[Any, ...]:
        """Return the values at the ends, or all choices."""

    def to_dict(self) -> dict[str, list[Any]]:
        """Return ``{kind: arguments}``, as in a YAML file."""


@dataclass(frozen=True)
class Uniform:
    """A number between two, all equally likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the order of the ends."""
        _check_ends(self, self.low, self.high)

    def suggest(self, trial: Any, name: str) -> float:
        """Let an Optuna trial choose."""
        return float(trial.suggest_float(name, self.low, self.high))

    def examples(self) -> tuple[Any, ...]:
        """Return the ends."""
        return self.low, self.high

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the YAML form."""
        return {"uniform": [self.low, self.high]}


@dataclass(frozen=True)
class LogUniform:
    """A number between two, each power of ten equally likely: for learning rates and decays."""

    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the ends."""
        _check_ends(self, self.low, self.high)
        if self.low <= 0:
            raise ConfigError(f"{self} begins at {self.low!r}.", "Expected a number above 0: it has no logarithm.")

    def suggest(self, trial: Any, name: str) -> float:
        """Let an Optuna trial choose."""
        return float(trial.suggest_float(name, self.low, self.high, log=True))

    def examples(self) -> tuple[Any, ...]:
        """Return the ends."""
        return self.low, self.high

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the YAML form."""
        return {"log_uniform": [self.low, self.high]}


@dataclass(frozen=True)
class Integers:
    """A whole number between two, both included."""

    low: int
    high: int
    step: int = 1

    def __post_init__(self) -> None:
        """Check the ends."""
        _check_ends(self, self.low, self.high)
        if any(not isinstance(n, int) for n in (self.low, self.high, self.step)) or self.step < 1:
            raise ConfigError(f"{self} is not made of whole numbers.", "Expected low, high and a step of at least 1.")

    def suggest(self, trial: Any, name: str) -> int:
        """Let an Optuna trial choose."""
        return int(trial.suggest_int(name, self.low, self.high, step=self.step))

    def examples(self) -> tuple[Any, ...]:
        """Return the ends."""
        return self.low, self.high

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the YAML form."""
        return {"integers": [self.low, self.high, self.step]}


@dataclass(frozen=True, init=False)
class Choice:
    """One of some values."""

    options: tuple[Any, ...]

    def __init__(self, *options: Any) -> None:
        """Choose among `options`: numbers, texts, true, false or None."""
        object.__setattr__(self, "options", options)
        if len(options) < 2 or len(set(map(repr, options))) < len(options):
            raise ConfigError(f"{self} leaves no choice.", "Expected at least two different values.")
        odd = [option for option in options if not isinstance(option, str | int | float | bool | None)]
        if odd:
            raise ConfigError(f"{self} offers {odd[0]!r}.", "Expected numbers, texts, true, false or None.")

    def suggest(self, trial: Any, name: str) -> Any:
        """Let an Optuna trial choose."""
        return trial.suggest_categorical(name, self.options)

    def examples(self) -> tuple[Any, ...]:
        """Return all choices."""
        return self.options

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the YAML form."""
        return {"choice": list(self.options)}


KINDS: dict[str, Any] = {"uniform": Uniform, "log_uniform": LogUniform, "integers": Integers, "choice": Choice}


class SearchSpace:
    """Ranges and choices by field of `TrainingConfig`, as in ``SearchSpace(learning_rate=LogUniform(1e-4, 1e-2))``.

    Attributes:
        dimensions: What each field may be, by name, in the order given.
    """

    def __init__(self, **dimensions: Dimension) -> None:
        """Search over these fields.

        Raises:
            ConfigError: There is none, a name is no field, its value is no range, or no search should change it.
        """
        known = [field.name for field in fields(TrainingConfig) if field.name not in FIXED]
        if not dimensions:
            raise ConfigError(
                "SearchSpace() has nothing to search over.",
                f"Expected ranges for some of {', '.join(known)}.",
                "For example SearchSpace(learning_rate=LogUniform(1e-4, 1e-2)).",
            )
        for name, dimension in dimensions.items():
            if name in FIXED:
                raise ConfigError(
                    f"SearchSpace searches over {name}, and {FIXED[name]}.",
                    f"Expected some of {', '.join(known)}.",
                    f"Set {name} in the TrainingConfig of the search.",
                )
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"SearchSpace has {name!r}, which is no field of TrainingConfig.",
                    f"Expected some of {', '.join(known)}.",
                    f"Did you mean {near[0]!r}?" if near else "",
                )
            if not isinstance(dimension, tuple(KINDS.values())):
                raise ConfigError(
                    f"SearchSpace.{name} is {dimension!r}.",
                    "Expected Uniform(low, high), LogUniform(low, high), Integers(low, high) or Choice(...).",
                    f"A single value belongs into the config: TrainingConfig({name}=...).",
                )
        self.dimensions = dict(dimensions)

    def __repr__(self) -> str:
        """Return the call that makes it."""
        return f"SearchSpace({', '.join(f'{name}={dimension!r}' for name, dimension in self.dimensions.items())})"

    def __eq__(self, other: object) -> bool:
        """Tell whether another space is the same."""
        return isinstance(other, SearchSpace) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def check(self, config: TrainingConfig) -> None:
        """Make sure that the ends of every range are settings that the rest of a config allows.

        Raises:
            ConfigError: One is not; the message names the range and the field.
        """
        for name, dimension in self.dimensions.items():
            for value in dimension.examples():
                try:
                    config.with_changes(**{name: value})
                except ConfigError as error:
                    raise ConfigError(
                        f"SearchSpace.{name} is {dimension}, and {value!r} is not possible: {error}",
                    ) from error

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Let an Optuna trial choose a value for every field."""
        return {name: dimension.suggest(trial, name) for name, dimension in self.dimensions.items()}

    def to_dict(self) -> dict[str, dict[str, list[Any]]]:
        """Return the space as plain data, the form of a YAML file."""
        return {name: dimension.to_dict() for name, dimension in self.dimensions.items()}

    @classmethod
    def from_dict(cls, space: Mapping[str, Any]) -> "SearchSpace":
        """Make a space from ``{field: {kind: [arguments]}}``; a bare list is a choice.

        Raises:
            ConfigError: A kind is unknown or its arguments do not fit.
        """
        dimensions: dict[str, Dimension] = {}
        for name, value in space.items():
            if isinstance(value, list):
                value = {"choice": value}
            if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
                raise ConfigError(
                    f"The search space has {name}: {value!r}.",
                    f"Expected one of {', '.join(f'{{{kind}: [...]}}' for kind in KINDS)}, or a list of choices.",
                )
            kind, arguments = next(iter(value.items()))
            try:
                dimensions[name] = KINDS[kind](*arguments)
            except TypeError as error:
                raise ConfigError(
                    f"The search space has {name}: {{{kind}: {arguments!r}}}.",
                    "Expected two numbers, or the options of a choice.",
                ) from error
        return cls(**dimensions)


def _check_ends(dimension: Any, low: Any, high: Any) -> None:
    """Make sure that a range is one."""
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in (low, high))
    if not numbers or not low < high:
        raise ConfigError(f"{dimension} is no range.", "Expected two numbers, the lower one first.")
