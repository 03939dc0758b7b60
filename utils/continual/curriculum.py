"""The settings of a curriculum: which samples come first, how fast harder ones join them, and when a phase is over.

Bengio et al., Curriculum Learning (ICML 2009), train on easy samples first; Platanios et al., Competence-based
Curriculum Learning (arXiv:1903.09848), let the share c(t) of the easiest samples that may be drawn grow with the steps.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from utils.runtime.errors import ConfigError
from utils.runtime.settings import check_names
from utils.training.config import LARGEST, MOST

PACINGS = ("step", "linear", "root", "exponential")
"""How the share of samples grows in a phase: at once (Bengio et al.), linearly, with the root of the steps (Platanios
et al., p = 2), or by the same factor in each step (Hacohen & Weinshall, arXiv:1904.03626)."""
RISING = ("accuracy", "r2")
GATES = ("loss", "bits_per_byte", "rmse", *RISING)
"""Held-out metrics that a gate can wait for; those of `RISING` are to reach the threshold from below."""
MEASURED = ("length", "loss")
"""Difficulties that need no function of the user's."""
S = TypeVar("S", bound="Phase | CurriculumConfig")


def _made(kind: type[S], settings: Mapping[str, Any]) -> S:
    """Make settings from a dict, with the nearest known name where one is unknown."""
    check_names(kind, settings)
    return kind(**settings)


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}.", f"Expected one of {', '.join(allowed)}.")


def _check_number(name: str, value: Any, least: float, most: float, whole: bool = False, above: bool = False) -> None:
    number = isinstance(value, (int,) if whole else (int, float)) and not isinstance(value, bool)
    if not number or not (least < value if above else least <= value) or not value <= most:
        kind, bound = "a whole number" if whole else "a number", f"above {least:g}" if above else f"from {least:g}"
        raise ConfigError(f"{name} is {value!r}.", f"Expected {kind} {bound} to {most:g}.")


@dataclass(frozen=True)
class Phase:
    """One developmental phase; checked when it is made."""

    name: str = "all"
    """What people call it."""
    share: float = 1.0
    """Share of the samples, the easiest, that it ends with."""
    pacing: str = "step"
    """How that share is reached: step (at once), linear, root or exponential over its steps."""
    steps: int | float | None = None
    """Steps that it takes, at most where it has a gate: a number, or a share of the run; None divides these evenly."""
    metric: str | None = None
    """Held-out metric of its gate: loss, bits_per_byte, rmse, accuracy or r2; None goes on after its steps."""
    threshold: float | None = None
    """What the metric must reach: at most so much, or, of accuracy and r2, at least."""
    patience: int = 1
    """Measurements in a row at which the metric must hold."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: A value is out of range, or a gate is half said.
        """
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError(f"Phase.name is {self.name!r}.", "Expected a text.")
        _check_number("Phase.share", self.share, 0, 1, above=True)
        _check_choice("Phase.pacing", self.pacing, PACINGS)
        _check_number("Phase.patience", self.patience, 1, LARGEST, whole=True)
        if self.steps is not None:
            share = isinstance(self.steps, float) and 0 < self.steps <= 1
            whole = isinstance(self.steps, int) and not isinstance(self.steps, bool) and 1 <= self.steps <= LARGEST
            if not share and not whole:
                raise ConfigError(
                    f"Phase.steps is {self.steps!r}.",
                    "Expected a whole number from 1, a share of the run between 0 and 1, or None.",
                )
        if (self.metric is None) != (self.threshold is None):
            raise ConfigError(
                f"Phase.metric is {self.metric!r} and threshold is {self.threshold!r}.",
                "Expected both, for a gate, or neither.",
                "Say what the metric must reach, such as metric='accuracy', threshold=0.9.",
            )
        if self.metric is not None:
            _check_choice("Phase.metric", self.metric, GATES)
            _check_number("Phase.threshold", self.threshold, -MOST, MOST)

    def holds(self, value: float) -> bool:
        """Tell whether a value of the gate's metric is good enough; what is not a number never is."""
        assert self.threshold is not None
        return value >= self.threshold if self.metric in RISING else value <= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return the phase as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Phase":
        """Make a phase from a dict.

        Raises:
            ConfigError: A name is unknown (the nearest known one is suggested) or a value is invalid.
        """
        return _made(cls, settings)


@dataclass(frozen=True)
class CurriculumConfig:
    """A curriculum; checked when it is made."""

    phases: tuple[Phase, ...] = (Phase(pacing="root", steps=0.5),)
    """The phases in their order; the last one lasts until the end of the run."""
    difficulty: str = "loss"
    """What is hard: length, loss (of the model, when a phase begins), or the name of a function of the user's."""
    begin: float = 0.1
    """Share of the samples, the easiest, with which the first phase begins."""
    hardest_first: bool = False
    """Begin with the hardest samples instead, to see whether the order matters."""

    def __post_init__(self) -> None:
        """Check every field, and the phases among each other.

        Raises:
            ConfigError: A value is out of range, or phases contradict.
        """
        given = self.phases
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(p, (Phase, Mapping)) for p in given):
            raise ConfigError(
                f"CurriculumConfig.phases is {given!r}.",
                "Expected a list of phases, such as [{'name': 'short', 'share': 0.3}, {'name': 'all'}].",
            )
        phases = tuple(one if isinstance(one, Phase) else Phase.from_dict(one) for one in given)
        object.__setattr__(self, "phases", phases)
        if not isinstance(self.difficulty, str) or not self.difficulty:
            raise ConfigError(
                f"CurriculumConfig.difficulty is {self.difficulty!r}.",
                f"Expected {', '.join(MEASURED)}, or the name of a function.",
                "Give a function a name with utils.continual.difficulty.register_difficulty.",
            )
        _check_number("CurriculumConfig.begin", self.begin, 0, 1, above=True)
        if not isinstance(self.hardest_first, bool):
            raise ConfigError(f"CurriculumConfig.hardest_first is {self.hardest_first!r}.", "Expected true or false.")
        names = [phase.name for phase in phases]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"Two phases of CurriculumConfig have the name {twice!r}.", "Expected a name of its own for each."
            )
        before = self.begin
        for phase in phases:
            if phase.share < before:
                raise ConfigError(
                    f"The phase {phase.name!r} of CurriculumConfig ends with a share of {phase.share:g}, and begins "
                    f"with {before:g}.",
                    "Expected shares that never fall: a phase adds harder samples to those before.",
                    "Raise its share, or lower the one before (of the first phase: begin).",
                )
            before = phase.share
        if phases[-1].metric is not None:
            raise ConfigError(
                f"The last phase of CurriculumConfig, {names[-1]!r}, has a gate.",
                "Expected none: nothing comes behind it.",
                "Add a phase, or set its metric and threshold to None.",
            )

    def lengths(self, total_steps: int) -> list[int]:
        """Return how many steps each phase takes at most; of the last one, over how many its share grows.

        Args:
            total_steps: Steps of the run.

        Raises:
            ConfigError: No step is left for the last phase.
        """
        even = max(1, total_steps // len(self.phases))
        found = []
        for phase in self.phases:
            share = isinstance(phase.steps, float)
            found.append(max(1, round(phase.steps * total_steps)) if share else phase.steps or even)  # type: ignore[operator]
        if sum(found[:-1]) >= total_steps:
            raise ConfigError(
                f"The phases of CurriculumConfig before the last take {sum(found[:-1])} steps, and the run has "
                f"{total_steps}.",
                "Expected at least one step for the last phase.",
                "Make phases shorter (Phase.steps), or train for more steps.",
            )
        if self.phases[-1].steps is None:
            found[-1] = total_steps - sum(found[:-1])
        return [int(each) for each in found]

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dict that JSON can hold."""
        return {**asdict(self), "phases": [phase.to_dict() for phase in self.phases]}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "CurriculumConfig":
        """Make a config from a dict.

        Raises:
            ConfigError: A name is unknown (the nearest known one is suggested) or a value is invalid.
        """
        return _made(cls, settings)


def share_at(pacing: str, start: float, end: float, done: float) -> float:
    """Return the share of samples that may be drawn, within a phase.

    Linear: c = c0 + (c1 - c0) t. Root: c = sqrt(c0^2 + (c1^2 - c0^2) t), so that new samples come in ever more slowly,
    in proportion to how many there are already. Exponential: c = c0 (c1 / c0)^t. Step: c = c1.

    Args:
        pacing: One of `PACINGS`.
        start: Share with which the phase begins (c0), above 0.
        end: Share with which it ends (c1).
        done: How much of the phase is over (t); 1 and more give `end`.
    """
    if pacing == "step" or done >= 1:
        return end
    done = max(0.0, done)
    if pacing == "linear":
        return start + (end - start) * done
    if pacing == "root":
        return float((start**2 + (end**2 - start**2) * done) ** 0.5)
    return float(start * (end / start) ** done)
