"""Everything that a run must remember, behind one protocol.

A run is a model plus parts that remember: optimizer, schedule, scaler, position in the data, metrics, and whatever
growth and continual learning add. A checkpoint is the states of the parts and nothing else; exact resume is loading
them all before the first batch; a growth event is one transaction that migrates them all or none.

Random streams are no part: they are derived from (seed, purpose, step) at every step (`utils.runtime.seeding`), so
there is nothing to remember and nothing that validation or a checkpoint could disturb.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from utils.runtime.errors import CheckpointError, SeedbedError


class MigrationError(SeedbedError):
    """A part cannot follow a change of the model."""


@dataclass(frozen=True)
class TensorChange:
    """How one parameter became another."""

    shape: tuple[int, ...]
    """Shape of the new parameter."""
    placement: tuple[slice, ...] | None
    """Where the old values lie inside the new ones; None when there was no old parameter."""
    source: str | None = None
    """Name of the old parameter, when it differs from the new name."""


@dataclass(frozen=True)
class ModelChange:
    """One change of a model's architecture during a run, as the parts need to know it."""

    kind: str
    """The operator, for messages and the lineage."""
    step: int
    """Optimizer steps done when it happened."""
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """The parameters after the change, by name."""
    changes: Mapping[str, TensorChange] = field(default_factory=dict)
    """New name of each changed or added parameter; all others are untouched."""


class StatefulPart(Protocol):
    """Something that remembers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: nested dicts and lists of numbers, strings and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned."""

    def migrate(self, change: ModelChange) -> None:
        """Follow a change of the model.

        Raises:
            MigrationError: This part cannot.
        """


class RunState:
    """The named parts of a run."""

    def __init__(self, parts: Mapping[str, StatefulPart] | None = None) -> None:
        """Start with some parts."""
        self._parts: dict[str, StatefulPart] = dict(parts or {})

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._parts)

    def __getitem__(self, name: str) -> StatefulPart:
        """Return one part."""
        return self._parts[name]

    def add(self, name: str, part: StatefulPart) -> None:
        """Add a part under a name that is still free.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._parts:
            raise ValueError(f"The run has a part named {name!r} already.")
        self._parts[name] = part

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all parts by name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Load the states of all parts.

        Raises:
            CheckpointError: A part has no state, or a state has no part: the run would not be the same run.
        """
        missing, unknown = self._parts.keys() - states.keys(), states.keys() - self._parts.keys()
        if missing or unknown:
            raise CheckpointError(
                f"The checkpoint lacks the state of {sorted(missing) or 'nothing'} and has state for "
                f"{sorted(unknown) or 'nothing'} that this run does not know.",
                "Expected exactly the parts that the run has.",
                "Resume with the settings and the version that wrote it.",
            )
        for name, part in self._parts.items():
            part.load_state_dict(states[name])

    def migrate(self, change: ModelChange) -> None:
        """Let all parts follow a change of the model, or none.

        Raises:
            MigrationError: A part refused; those that had followed are back at their old state.
        """
        before: list[tuple[StatefulPart, dict[str, Any]]] = []
        for name, part in self._parts.items():
            before.append((part, copy.deepcopy(part.state_dict())))
            try:
                part.migrate(change)
            except Exception as error:
                for followed, state in reversed(before):
                    followed.load_state_dict(state)
                raise MigrationError(
                    f"The part {name!r} cannot follow {change.kind} at step {change.step}: {error}",
                    action="Nothing was changed.",
                ) from error
