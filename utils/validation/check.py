"""The values of validation: a check, its budget, its findings, its result."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from utils.adapters.model_adapter import ModelAdapter
from utils.validation.pictures import Picture

STATUSES = ("pass", "warn", "fail", "skip")
SEVERITIES = ("fail", "warn")
NOT_RUN = "not run, see above"
"""Why a check has no result where an earlier one has told that the model cannot be run."""


class Skipped(Exception):
    """Raised by a check that does not apply to a model; the message is the reason that the user reads."""


def json_safe(value: Any) -> Any:
    """Turn a value into what JSON can hold: infinities and NaN become strings, tensors lists, unknown objects text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [json_safe(item) for item in value]
    if isinstance(value, torch.Tensor):
        return json_safe(value.tolist())
    return str(value)


@dataclass(frozen=True)
class Finding:
    """One fault, or one thing worth a look."""

    code: str
    """The kind of fault, for example ``"future_leakage"``."""
    severity: str
    """``"fail"`` (will break training or make results wrong) or ``"warn"`` (unusual)."""
    where: str
    """Qualified name of the module or parameter; the model's class name when it is the model as a whole."""
    message: str
    """The evidence, in numbers."""
    hint: str
    """What to do about it."""
    reproduction: str = ""
    """A few lines of Python that show the fault on ``model``; the runner fills in what a check leaves out."""
    location: str = ""
    """File, line and class of the code to look at; the runner fills it in."""

    def __post_init__(self) -> None:
        """Refuse severities that the verdict would not count."""
        if self.severity not in SEVERITIES:
            raise ValueError(f"Finding.severity is {self.severity!r}; expected one of {SEVERITIES}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return {name.name: getattr(self, name.name) for name in fields(self)}


@dataclass(frozen=True)
class CheckResult:
    """What one check found."""

    check: str
    """Id of the check."""
    tier: int
    """The tier it belongs to."""
    status: str
    """``"pass"``, ``"warn"``, ``"fail"`` or ``"skip"``."""
    value: Any
    """What was measured, a number or a short text."""
    threshold: Any
    """What it was held against."""
    why: str
    """One sentence that explains the status."""
    seconds: float
    """How long the check took."""
    details: dict[str, Any] = field(default_factory=dict)
    """The evidence. ``could_not_run`` marks a skip that is no verdict; ``reduced`` lists what the budget cut."""
    findings: tuple[Finding, ...] = ()
    """The faults and oddities, most severe first."""
    pictures: tuple[Picture, ...] = ()
    """What is better looked at than read."""

    def __post_init__(self) -> None:
        """Refuse a status that the verdict would not count."""
        if self.status not in STATUSES:
            raise ValueError(f"CheckResult.status is {self.status!r}; expected one of {STATUSES}.")

    @property
    def could_not_run(self) -> bool:
        """Whether the check applies but gave no answer, so that the verdict cannot be "ready"."""
        return self.status == "skip" and bool(self.details.get("could_not_run"))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values that JSON can hold."""
        kept = [name.name for name in fields(self) if name.name not in ("findings", "pictures")]
        plain = {name: json_safe(getattr(self, name)) for name in kept}
        return {**plain, "findings": [finding.to_dict() for finding in self.findings]}

    def _repr_html_(self) -> str:
        from utils.validation.html import result_html

        return result_html(self)


@dataclass(frozen=True)
class Outcome:
    """What a check function returns; the runner adds the id, the tier and the time."""

    value: Any
    """What was measured."""
    threshold: Any
    """What it was held against."""
    why: str
    """One sentence for the case that nothing was found."""
    findings: tuple[Finding, ...] | list[Finding] = ()
    """Everything found."""
    details: dict[str, Any] = field(default_factory=dict)
    """The evidence."""
    pictures: tuple[Picture, ...] | list[Picture] = ()
    """What is better looked at than read."""


class Budget:
    """The time a check may spend; it samples less rather than overrun, and records what it left out.

    Attributes:
        reduced: What was left out or made smaller, one sentence each.
    """

    def __init__(self, seconds: float) -> None:
        """Start the clock.

        Args:
            seconds: Time to spend; what a check must do at least, it does in any case.
        """
        self.seconds = seconds
        self.started = time.perf_counter()
        self.reduced: list[str] = []

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.started

    def remaining(self) -> float:
        """Return the seconds left, never below 0."""
        return max(0.0, self.seconds - self.spent())

    def afford(self, seconds: float, otherwise: str) -> bool:
        """Tell whether `seconds` of work still fit; if not, record the sentence `otherwise`."""
        if seconds <= self.remaining():
            return True
        if otherwise not in self.reduced:
            self.reduced.append(otherwise)
        return False


CheckFunction = Callable[[ModelAdapter, Budget], Outcome]


@dataclass(frozen=True)
class Check:
    """One entry in a tier's ordered list."""

    id: str
    """Name in reports and in code."""
    tier: int
    """1: about a minute, 2: about three minutes."""
    title: str
    """The question it answers, for people."""
    run: CheckFunction
    """Gets the adapter of a model in eval mode and a budget; may raise `Skipped`."""
    share: float = 1.0
    """Weight of this check when the time budget is divided."""
    codes: tuple[str, ...] = ()
    """The codes of findings it can make."""
