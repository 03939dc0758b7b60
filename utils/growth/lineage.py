"""What a model grew through: enough to rebuild it from its source, and to look at."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from utils.growth.certificate import Certificate
from utils.growth.edits import GrowthError, LineageError, Plan
from utils.growth.surgery import Surgery
from utils.runtime.files import tag_nonfinite, untag_nonfinite, write_json
from utils.training.growth_rows import LINEAGE

_GROWN: "WeakKeyDictionary[nn.Module, tuple[GrowthEvent, ...]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class GrowthEvent:
    """One time that a model grew."""

    step: int
    """Optimizer steps done when it happened."""
    seed: int
    """Seed of what was drawn."""
    plan: Plan
    """What was done."""
    certificate: Certificate | None
    """What it did to the function; None for a beginning with fewer blocks, before anything was trained."""
    why: str
    """What asked for it."""
    parameters_before: int
    """Parameters before."""
    parameters_after: int
    """And after."""
    seconds: float
    """How long it took, the certificate included."""
    signals: tuple[dict[str, Any], ...] = field(default=())
    """What the triggers said."""

    def describe(self) -> str:
        """Say it in one line."""
        said = "nothing was trained yet" if self.certificate is None else self.certificate.describe()
        return (
            f"step {self.step}: {self.plan.describe()} ({self.plan.promise}; {self.parameters_before:,} -> "
            f"{self.parameters_after:,} parameters): {said}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON and a checkpoint can hold."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "plan": self.plan.to_dict(),
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
            "signals": list(self.signals),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GrowthEvent":
        """Read what `to_dict` returned.

        Raises:
            LineageError: It is not that.
        """
        try:
            rest = {**values, "plan": Plan.from_dict(values["plan"])}
            rest["certificate"] = None if (said := values["certificate"]) is None else Certificate.from_dict(said)
            rest["signals"] = tuple(values["signals"])
            return cls(**rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise LineageError(
                f"A growth event of the lineage cannot be read ({type(error).__name__}: {error}).",
                "Expected what this version of Seedbed writes.",
                "Restore the run from a copy, or resume with the version that wrote it.",
            ) from error


def lineage_of(module: nn.Module) -> tuple[GrowthEvent, ...]:
    """Return the events through which a model has come since it was built; copies of it know nothing of them."""
    return _GROWN.get(module, ())


def remember(module: nn.Module, events: Sequence[GrowthEvent]) -> None:
    """Keep the lineage of a model for as long as the model lives."""
    _GROWN[module] = tuple(events)


def rebuild(module: nn.Module, events: Sequence[GrowthEvent]) -> None:
    """Let a model grow through the part of a lineage that it has not been through; its weights are loaded afterwards.

    Args:
        module: As it was built from its source, or as an event of the lineage left it in this process.
        events: The lineage.

    Raises:
        LineageError: The model belongs to no point of the lineage, or an event does not fit; it is then not to be used.
    """
    done = lineage_of(module)
    count = sum(parameter.numel() for parameter in module.parameters())
    sizes = [event.parameters_before for event in events[:1]] + [event.parameters_after for event in events]
    alike = [(event.step, event.plan) for event in done] == [(event.step, event.plan) for event in events[: len(done)]]
    if not alike or (events and sizes[len(done)] != count):
        raise LineageError(
            f"The model has {count:,} parameters and {len(done)} growth events behind it; the lineage has "
            f"{len(events)} and begins with {sizes[0] if sizes else count:,} parameters.",
            "Expected the model with which the run was started.",
            "Use the source and the config of the run.",
        )
    for number in range(len(done), len(events)):
        event = events[number]
        try:
            Surgery(module, event.plan, event.seed, event.step)
        except GrowthError as error:
            raise LineageError(
                f"Event {number + 1} of the lineage (step {event.step}) cannot be repeated: {error.found}",
                "Expected the source and the lineage of the same run.",
                "Restore the run's folder from a copy.",
            ) from error
        count = sum(parameter.numel() for parameter in module.parameters())
        if count != event.parameters_after:
            raise LineageError(
                f"Event {number + 1} of the lineage (step {event.step}) made {count:,} parameters.",
                f"Expected {event.parameters_after:,}, as it did the first time.",
                "Use the source with which the run was started.",
            )
    remember(module, events)


def save_lineage(directory: Path, events: Iterable[GrowthEvent]) -> None:
    """Write a lineage into a run directory, for people and pictures."""
    write_json(Path(directory) / LINEAGE, tag_nonfinite({"events": [event.to_dict() for event in events]}))


def read_lineage(directory: Path) -> list[GrowthEvent]:
    """Read the lineage of a run; empty when it never grew.

    Raises:
        LineageError: The file is damaged.
    """
    path = Path(directory) / LINEAGE
    if not path.is_file():
        return []
    try:
        saved = untag_nonfinite(json.loads(path.read_text(encoding="utf-8")))
        return [GrowthEvent.from_dict(values) for values in saved["events"]]
    except (ValueError, KeyError, TypeError) as error:
        raise LineageError(
            f"{path} cannot be read ({type(error).__name__}).",
            "Expected the lineage that Seedbed wrote; the checkpoints hold it too.",
            "Delete the file; the next growth event or the next session writes it anew.",
        ) from error
