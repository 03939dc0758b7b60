"""Everything that a run must remember, behind one protocol.

A run is a model plus parts that remember: optimizer, schedule, scaler, position in the data, metrics, and whatever
growth and continual learning add. A checkpoint is the states of the parts and nothing else; exact resume is loading
them all before the first batch; a growth event is one transaction that migrates them all or none.

Random streams are no part: they are derived from (seed, purpose, step) at every step (`utils.runtime.seeding`), so
there is nothing to remember and nothing that validation or a checkpoint could disturb.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.runtime.errors import CheckpointError, SeedbedError


class MigrationError(SeedbedError):
    """A part cannot follow a change of the model."""


Undo = Callable[[], None]
"""Puts back what a migration changed, the very same objects included."""


@dataclass(frozen=True)
class Insertion:
    """New entries along one axis of a tensor."""

    axis: int
    """Which axis."""
    places: tuple[tuple[int, int], ...]
    """Pairs (place, count), the places ascending: so many new entries before the old entry of that number."""
    mean: bool = False
    """The new entries are the mean of the old ones along the axis; other weights of the same tensor keep that too."""

    def applied(self, value: Tensor, new: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Return a tensor with new entries.

        Args:
            value: The old values.
            new: Makes the entries of one place, given their shape.
        """
        pieces, start = [], 0
        for place, count in self.places:
            shape = (*value.shape[: self.axis], count, *value.shape[self.axis + 1 :])
            pieces += [value.narrow(self.axis, start, place - start), new(shape).to(value)]
            start = place
        return torch.cat([*pieces, value.narrow(self.axis, start, value.shape[self.axis] - start)], self.axis)


@dataclass(frozen=True)
class TensorChange:
    """How one tensor of a model became another."""

    source: str | None = None
    """Name of the old tensor; None when there was none, or when its values were given up."""
    like: str | None = None
    """Name of the old tensor on which one without a source was modelled."""
    insertions: tuple[Insertion, ...] = ()
    """New entries, in the order in which they were made."""
    factor: float = 1.0
    """What the old values, less `around`, were multiplied by."""
    around: float = 0.0
    """What stayed where it was."""

    def carried(self, value: Tensor, factor: float = 1.0, mean: bool = False) -> Tensor:
        """Return what belongs to the old tensor entry by entry, such as a moment of its gradient, for the new one.

        Args:
            value: Of the old tensor's shape.
            factor: What the old values are multiplied by.
            mean: New entries are the mean of the old ones; zero otherwise.
        """
        filled = float(value.mean()) if mean and value.numel() else 0.0
        for insertion in self.insertions:
            value = insertion.applied(value, lambda shape: torch.full(shape, filled))
        return value.clone() if factor == 1.0 else value * factor

    def other_values(self, value: Tensor, present: Tensor) -> Tensor:
        """Return what other weights of the old tensor, such as an average of it, become in the new one.

        Args:
            value: Of the old tensor's shape.
            present: The new tensor; new entries that are no mean of the old ones are taken from it.
        """
        value = (value - self.around) * self.factor + self.around if self.factor != 1.0 else value
        old = torch.ones_like(value, dtype=torch.bool)
        for insertion in self.insertions:
            mean = value.mean(insertion.axis, keepdim=True) if insertion.mean else torch.zeros(()).to(value)
            value = insertion.applied(value, mean.expand)
            old = insertion.applied(old, torch.full((), insertion.mean).expand)
        return torch.where(old, value, present.detach()) if self.insertions else value.clone()


@dataclass(frozen=True)
class ModelChange:
    """One change of a model's architecture during a run, as the parts need to know it."""

    kind: str
    """The operator, for messages and the lineage."""
    step: int
    """Optimizer steps done when it happened."""
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """The parameters after the change, by name."""
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """The buffers after the change, by name."""
    changes: Mapping[str, TensorChange] = field(default_factory=dict)
    """New name of each tensor that was changed, added or renamed; all others are untouched."""
    before: Mapping[str, Tensor] = field(default_factory=dict)
    """The parameters before the change, by their old names."""
    mean: bool = False
    """What is new in an optimizer's second moments is the mean of the tensor's, not zero."""

    def of(self, name: str) -> TensorChange:
        """Return how a tensor of the new model came about."""
        return self.changes.get(name, TensorChange(source=name))


class StatefulPart(Protocol):
    """Something that remembers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: nested dicts and lists of numbers, strings and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned."""

    def migrate(self, change: ModelChange) -> Undo | None:
        """Follow a change of the model.

        Returns:
            What puts everything back as it was; None when there was nothing to do.

        Raises:
            MigrationError: This part cannot, and has changed nothing.
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

    def migrate(self, change: ModelChange) -> Undo:
        """Let all parts follow a change of the model, or none.

        Returns:
            What puts all of them back.

        Raises:
            MigrationError: A part refused; those that had followed are back at their old state.
        """
        undos: list[Undo] = []

        def undo() -> None:
            while undos:
                undos.pop()()

        for name, part in self._parts.items():
            try:
                followed = part.migrate(change)
            except Exception as error:
                undo()
                raise MigrationError(
                    f"The part {name!r} cannot follow {change.kind} at step {change.step}: {error}",
                    action="Nothing was changed.",
                ) from error
            if followed is not None:
                undos.append(followed)
        return undo
