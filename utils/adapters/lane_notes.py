"""What is known about one tensor while lanes are followed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from utils.adapters.lane_labels import Operand, Slots, varying
from utils.adapters.lane_norms import Node


@dataclass(frozen=True, eq=False)
class Statistic:
    """A mean or the like that was taken across lanes."""

    labels: Tensor
    """The lanes."""
    order: int
    """When."""
    name: str
    """The operation."""
    partial: bool
    """It covers some of the lanes at a time."""


@dataclass(eq=False)
class Note:
    """What is known about one tensor."""

    live: bool
    """It depends on the model's input."""
    labels: tuple[Tensor, ...] = ()
    """Its lanes; see `utils.adapters.lane_labels`."""
    statistics: tuple[Statistic, ...] = ()
    """What was taken across lanes to make it, and is not yet part of a norm."""
    node: Node = field(default_factory=lambda: Node(0, None))
    """How it was made."""


def operand(tensor: Tensor, note: Note, shape: Sequence[int] | None = None, uniform: bool = False) -> Operand:
    """Return a tensor as an operand.

    Args:
        tensor: The tensor.
        note: What is known about it.
        shape: Its shape with axes of size one put in, if it is a vector that lies along another axis than the last.
        uniform: It holds one number everywhere.
    """
    if shape is None:
        return Operand(tuple(tensor.shape), note.labels, note.live, uniform)
    return Operand(tuple(shape), tuple(one.reshape(tuple(shape)) for one in note.labels), note.live, uniform)


def without(slots: Slots, labels: Sequence[Tensor], axes: frozenset[int], name: str) -> tuple[Tensor, ...]:
    """Fix and drop labels that vary along axes which an operation treats as space.

    Args:
        slots: Where it is noted.
        labels: Labels of its input.
        axes: The axes.
        name: The operation.
    """
    for one in labels:
        if varying(one) & axes:
            slots.fix(one, f"`{name}` runs over its lanes")
    return tuple(one for one in labels if not varying(one) & axes)
