"""The settings of growth: what may grow, when, how far, and what is never exceeded."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from utils.runtime.errors import ConfigError
from utils.runtime.settings import check_names
from utils.training.config import LARGEST, MOST

OPERATORS = ("depth", "feed_forward", "heads", "residual", "vocabulary", "classes", "expert", "channels")
"""What can grow: blocks, hidden units, attention heads, features of the residual stream, ids, classes, experts,
channels of convolutions. Amounts and sizes of an event are counted in these."""
FULL = "full"
"""The size that stands for the depth of a model as it was built."""
TRIGGERS = ("plateau", "uncertainty", "saturation", "benefit")
SECOND_MOMENTS = ("zero", "mean")
ON_REFUSAL = ("continue", "stop")
HISTORIC = ("threshold", "strategy")
"""Names of the two settings of growth that an early form of the config had."""


@dataclass(frozen=True)
class ScheduledGrowth:
    """One event that happens at a fixed step; checked when it is made."""

    at: int | float
    """Optimizer steps done when it happens, from 1, or a share of the run between 0 and 1."""
    operator: str
    """What grows: depth, feed_forward, heads, residual, vocabulary, classes, expert or channels."""
    amount: int | None = None
    """How much is added; None when `to` says it."""
    to: int | str | None = None
    """The size to reach, or full, the depth that the model had before `begin_blocks`; None when `amount` says it."""
    where: str | int | None = None
    """Name or index of the block or module; None chooses."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: A value is out of range, or `amount` and `to` are both given or both missing.
        """
        share = isinstance(self.at, float) and 0 < self.at < 1
        step = isinstance(self.at, int) and not isinstance(self.at, bool) and 1 <= self.at <= LARGEST
        if not share and not step:
            raise ConfigError(
                f"ScheduledGrowth.at is {self.at!r}.",
                "Expected a step, a whole number from 1, or a share of the run, a number between 0 and 1.",
            )
        _check_choice(self, "operator", OPERATORS)
        if (self.amount is None) == (self.to is None):
            raise ConfigError(
                f"ScheduledGrowth.amount is {self.amount!r} and to is {self.to!r}.",
                "Expected exactly one of them: how much is added, or the size to reach.",
            )
        _check_number(self, "amount", 1, LARGEST, whole=True, optional=True)
        if self.to != FULL:
            _check_number(self, "to", 1, LARGEST, whole=True, optional=True)
        elif self.operator != "depth":
            raise ConfigError(
                f"ScheduledGrowth.to is {self.to!r} and operator is {self.operator!r}.",
                "Expected a number: only the depth that a model had before is known.",
            )
        if self.where is not None and (isinstance(self.where, bool) or not isinstance(self.where, (str, int))):
            raise ConfigError(f"ScheduledGrowth.where is {self.where!r}.", "Expected a name, an index or None.")

    def step(self, total_steps: int) -> int:
        """Return the optimizer step after which it happens, from 1, in a run of `total_steps`."""
        return self.at if isinstance(self.at, int) else max(1, round(self.at * total_steps))

    def to_dict(self) -> dict[str, Any]:
        """Return the event as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "ScheduledGrowth":
        """Make an event from a dict.

        Raises:
            ConfigError: A name is unknown or missing, or a value is invalid.
        """
        check_names(cls, settings)
        missing = [name for name in ("at", "operator") if name not in settings]
        if missing:
            raise ConfigError(
                f"A scheduled event of growth lacks {' and '.join(missing)}: {dict(settings)!r}.",
                "Expected for example {'at': 0.3, 'operator': 'depth', 'amount': 2}.",
            )
        return cls(**settings)


@dataclass(frozen=True)
class GrowthConfig:
    """When, where and how far a model grows while it trains; checked when it is made.

    The defaults of the thresholds separate small character-level transformers that are too narrow from wide enough
    ones; `docs/growth.md` has the numbers.
    """

    begin_blocks: int | None = None
    """Blocks with which a new run begins, the first ones of the model's; None begins with all of them."""
    schedule: tuple[ScheduledGrowth, ...] = ()
    """Events at fixed steps; they ask no trigger and wait for no cool-down."""
    operators: tuple[str, ...] = ()
    """What may grow when the triggers say so; empty grows nothing by itself."""
    amount_share: float = 0.5
    """How much bigger a part gets in one event that the triggers asked for, as a share of its size."""
    triggers: tuple[str, ...] = ("plateau", "saturation", "benefit")
    """What is watched: some of plateau, uncertainty, saturation and benefit."""
    needed: int = 2
    """How many of the triggers must agree."""
    check_every_steps: int = 50
    """Steps between two looks at the triggers, and the length of a window of the plateau."""
    cooldown_steps: int = 200
    """Steps after the start, an event or a rejected probe in which no trigger leads to growth."""
    hysteresis: float = 0.9
    """A trigger that led to an event or a rejected probe counts again once its pressure (1 fires) was at most this."""
    probe_steps: int = 0
    """Steps that a grown copy and an ungrown one train on the same batches before one is kept; 0 does without."""
    patience: int = 3
    """Windows in a row without improvement that make a plateau."""
    improvement: float = 0.005
    """Least relative fall of the loss in a window, at the peak learning rate, that is no plateau."""
    uncertainty_threshold: float = 0.85
    """Entropy of the predictions over its largest value from which on the model counts as uncertain."""
    saturation_threshold: float = 0.75
    """Effective rank over width from which on a layer counts as full."""
    dead_share: float = 0.05
    """A layer of which more units than this have died since it was first measured does not count as full."""
    benefit_threshold: float = 1.5
    """Largest gradient of new hidden units over that of the present weights from which on new units pay."""
    max_parameters: int | None = None
    """Parameters that the model may have; None sets no limit."""
    max_flops_share: float | None = None
    """FLOPs of a step relative to those of the first step that the model may need; None sets no limit."""
    max_memory_gb: float | None = None
    """Memory of a training step, in 10^9 bytes, that the model may need; None sets no limit."""
    max_events: int | None = None
    """Events in all, scheduled ones included; None sets no limit."""
    new_second_moment: str = "mean"
    """AdamW's second moment of new weights: the mean of the tensor's, or of the one it is modelled on, or zero."""
    approximate: bool = False
    """Allow operators that change the function, followed by distillation from the old model."""
    distill_steps: int = 50
    """Most steps of distillation after an operator that changed the function."""
    on_refusal: str = "continue"
    """When growth is refused: continue the run as it is, or stop it."""
    tolerance: float = 1e-5
    """Largest relative difference of the outputs in float32 that an exact operator may make."""

    def __post_init__(self) -> None:
        """Check every field and every pair that can contradict.

        Raises:
            ConfigError: A value is out of range, or two values contradict.
        """
        if not isinstance(self.schedule, tuple) or not all(isinstance(e, ScheduledGrowth) for e in self.schedule):
            raise ConfigError(
                f"GrowthConfig.schedule is {self.schedule!r}.",
                "Expected a list of events such as {'at': 0.3, 'operator': 'depth', 'amount': 2}.",
            )
        self._check_choices("operators", OPERATORS)
        self._check_choices("triggers", TRIGGERS)
        for name in ("needed", "check_every_steps", "patience"):
            _check_number(self, name, 1, LARGEST, whole=True)
        for name in ("cooldown_steps", "probe_steps", "distill_steps"):
            _check_number(self, name, 0, LARGEST, whole=True)
        for name in ("uncertainty_threshold", "saturation_threshold", "hysteresis"):
            _check_number(self, name, 0, 1, above=True)
        for name in ("dead_share", "improvement"):
            _check_number(self, name, 0, 1)
        for name in ("benefit_threshold", "amount_share", "tolerance"):
            _check_number(self, name, 0, MOST, above=True)
        if self.begin_blocks is not None and not self.schedule and not self.operators:
            raise ConfigError(
                f"GrowthConfig.begin_blocks is {self.begin_blocks!r} and nothing says when the model grows.",
                "Expected a schedule or operators: the other blocks would be gone for good.",
                "Add schedule=[{'at': 0.5, 'operator': 'depth', 'to': 'full'}].",
            )
        if self.begin_blocks is None and any(event.to == FULL for event in self.schedule):
            raise ConfigError(
                "GrowthConfig.schedule has an event with to='full' and begin_blocks is None.",
                "Expected begin_blocks: without it the model has its full depth from the start.",
                "Set begin_blocks, or say `to` as a number.",
            )
        _check_number(self, "begin_blocks", 1, LARGEST, whole=True, optional=True)
        for name in ("max_parameters", "max_events"):
            _check_number(self, name, 1, 2**63 - 1, whole=True, optional=True)
        _check_number(self, "max_memory_gb", 0, MOST, above=True, optional=True)
        _check_number(self, "max_flops_share", 1, MOST, optional=True)
        _check_choice(self, "new_second_moment", SECOND_MOMENTS)
        _check_choice(self, "on_refusal", ON_REFUSAL)
        if not isinstance(self.approximate, bool):
            raise ConfigError(f"GrowthConfig.approximate is {self.approximate!r}.", "Expected true or false.")
        if self.operators and self.needed > len(self.triggers):
            raise ConfigError(
                f"GrowthConfig.needed is {self.needed} and triggers has {len(self.triggers)}.",
                "Expected at most as many as there are triggers: the model would never grow.",
                f"Set needed to {max(1, len(self.triggers))} or name more of {', '.join(TRIGGERS)}.",
            )

    def _check_choices(self, name: str, allowed: tuple[str, ...]) -> None:
        """Check a tuple of names."""
        value = getattr(self, name)
        known = isinstance(value, tuple) and all(isinstance(part, str) and part in allowed for part in value)
        if not known or len(set(value)) < len(value):
            raise ConfigError(
                f"GrowthConfig.{name} is {value!r}.", f"Expected a list of some of {', '.join(allowed)}, each once."
            )

    @property
    def automatic(self) -> bool:
        """Whether triggers are watched at all."""
        return bool(self.operators)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dict that JSON can hold."""
        return {
            **asdict(self),
            "schedule": [event.to_dict() for event in self.schedule],
            "operators": list(self.operators),
            "triggers": list(self.triggers),
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "GrowthConfig":
        """Make a config from a dict; events of the schedule may be dicts, and tuples lists.

        The early form ``{"threshold": 0.85, "strategy": "uncertainty"}`` is read as growth in depth by the uncertainty
        trigger alone, with the threshold as normalised entropy.

        Raises:
            ConfigError: A name is unknown (the nearest known one is suggested) or a value is invalid.

        Warns:
            UserWarning: The early form was given; its threshold is reached only near random guessing.
        """
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f"The settings of growth are {settings!r}.",
                "Expected names and values, such as {'schedule': [{'at': 0.3, 'operator': 'depth', 'amount': 2}]}.",
            )
        given = _from_historic(settings) if any(name in settings for name in HISTORIC) else dict(settings)
        check_names(cls, given)
        for name in ("operators", "triggers", "schedule"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        if isinstance(given.get("schedule"), tuple):
            given["schedule"] = tuple(
                ScheduledGrowth.from_dict(event) if isinstance(event, Mapping) else event for event in given["schedule"]
            )
        return cls(**given)

    @classmethod
    def progressive(cls, blocks: int = 1, at: int | float = 0.5, **settings: Any) -> "GrowthConfig":
        """Return progressive training: begin shallow, grow once to the full depth while the learning rate stays high.

        The rate should not have begun to fall: the ``wsd`` schedule of `TrainingConfig` keeps it at its peak.

        Args:
            blocks: With how many blocks it begins.
            at: The step or the share of the run at which the full depth is reached.
            **settings: Other fields.
        """
        return cls(begin_blocks=blocks, schedule=(ScheduledGrowth(at, "depth", to=FULL),), **settings)


def _from_historic(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the early form, with a warning."""
    rest = {name: value for name, value in settings.items() if name not in HISTORIC}
    strategy = settings.get("strategy", "uncertainty")
    if strategy != "uncertainty":
        raise ConfigError(
            f"GrowthConfig.strategy is {strategy!r}.",
            "Expected 'uncertainty', the only strategy of the early form.",
            f"Name what to watch with triggers, some of {', '.join(TRIGGERS)}.",
        )
    threshold = settings.get("threshold", 0.85)
    warnings.warn(
        f"The growth settings threshold={threshold!r} and strategy='uncertainty' are read as triggers=['uncertainty'], "
        f"uncertainty_threshold={threshold!r}: the entropy of the predictions over its largest value. A model gets "
        "there only near random guessing. The default triggers look at plateau, saturation and benefit.",
        UserWarning,
        stacklevel=3,
    )
    named = {"operators": ("depth",), "triggers": ("uncertainty",), "needed": 1, "uncertainty_threshold": threshold}
    return {**named, **rest}


def _check_choice(settings: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Check one of several texts."""
    value = getattr(settings, name)
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        raise ConfigError(
            f"{type(settings).__name__}.{name} is {value!r}.",
            f"Expected one of {', '.join(allowed)}.",
            f"Did you mean {near[0]!r}?" if near else "",
        )


def _check_number(
    settings: Any,
    name: str,
    least: float,
    most: float,
    whole: bool = False,
    above: bool = False,
    optional: bool = False,
) -> None:
    """Check a number's type and range; `above` excludes the lower end."""
    value = getattr(settings, name)
    if value is None and optional:
        return
    place, kind = f"{type(settings).__name__}.{name}", "a whole number" if whole else "a number"
    suffix = " or None" if optional else ""
    if isinstance(value, bool) or not isinstance(value, (int,) if whole else (int, float)):
        raise ConfigError(f"{place} is {value!r}.", f"Expected {kind}{suffix}.")
    if not least <= value <= most or (above and value == least):
        low = f"above {least}" if above else f"of {least} or more"
        high = "" if most > LARGEST else f", at most {most:,}"
        raise ConfigError(f"{place} is {value!r}.", f"Expected {kind} {low}{high}{suffix}.")
