"""What a growth event does to a model, as plain values: they are applied, undone, written to the lineage and replayed.

A plan names tensors, axes and numbers and nothing else. A resumed run rebuilds its model from its source and the plans
of the lineage without looking at the model again; the weights then come from the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from utils.growth.config import OPERATORS
from utils.runtime.errors import SeedbedError

FILLS = ("zero", "one", "like", "mean", "value", "copy")
PROMISES = ("exact", "bounded", "gated", "approximate", "anew")


class GrowthError(SeedbedError):
    """A model cannot be grown as asked; it is as it was."""


class GrowthRefusedError(GrowthError):
    """An operator does not fit the model; the message says why."""


class LineageError(GrowthError):
    """A recorded growth event cannot be repeated."""


@dataclass(frozen=True)
class Widen:
    """New entries along one axis of a parameter or buffer."""

    kind: ClassVar[str] = "widen"
    name: str
    """One name of the tensor; tied names follow."""
    axis: int
    """Which axis."""
    places: tuple[tuple[int, int], ...]
    """Pairs (place, count): so many new entries before the old entry of that number, ascending."""
    fill: str = "zero"
    """What they hold: zero, one, like (normal with the deviation of the old values), mean (of the old entries along the
    axis), value, or copy (of one old entry along the axis)."""
    value: float = 0.0
    """The number, where fill is value; the place of the old entry, where it is copy."""


@dataclass(frozen=True)
class Scale:
    """A parameter times a number."""

    kind: ClassVar[str] = "scale"
    name: str
    """One name of the tensor."""
    factor: float
    """The number."""
    around: float = 0.0
    """What stays where it is: -1 for a gain that the code adds to one."""


@dataclass(frozen=True)
class Overwrite:
    """A parameter that begins anew with one number everywhere."""

    kind: ClassVar[str] = "overwrite"
    name: str
    """One name of the tensor."""
    value: float
    """The number."""


@dataclass(frozen=True)
class Number:
    """A number that a module or its config keeps, such as a size."""

    kind: ClassVar[str] = "number"
    owner: str
    """Name of the module; empty for the model."""
    path: tuple[str, ...]
    """Names of attributes and keys from there."""
    before: Any
    """What it must be."""
    after: Any
    """What it becomes."""


@dataclass(frozen=True)
class InsertBlock:
    """A copy of a block behind another one of its container."""

    kind: ClassVar[str] = "insert"
    container: str
    """Name of the module that holds the blocks in order."""
    index: int
    """Place of the new block in its container."""
    source: int
    """Place of the block that it is modelled on, before the insertion."""
    zeroed: tuple[str, ...]
    """Its tensors, by their names in the block, that begin at zero."""
    drawn: bool = False
    """Draw all other matrices anew, with the deviation of the source's, instead of copying their values."""


@dataclass(frozen=True)
class Gate:
    """A block whose contribution is multiplied by one number that begins at zero."""

    kind: ClassVar[str] = "gate"
    container: str
    """Name of the module that holds the block."""
    index: int
    """Place of the block."""


@dataclass(frozen=True)
class KeepBlocks:
    """The first blocks of a container, without the others; only a model that has not been trained begins so."""

    kind: ClassVar[str] = "keep"
    container: str
    """Name of the module that holds the blocks."""
    first: int
    """Place of the first block that goes."""
    last: int
    """Place behind the last one that goes."""


@dataclass(frozen=True)
class InsertLayer:
    """A layer that begins as the identity, with a copy of the activation in front of it behind it."""

    kind: ClassVar[str] = "layer"
    container: str
    """Name of the module that holds the chain."""
    index: int
    """Place of the new layer."""
    activation: int
    """Place of the activation that is copied, before the insertion."""
    width: int
    """Features or channels."""
    axes: int
    """Axes of space of a convolution; 0 for a linear layer."""
    kernel: int
    """Extent of a convolution."""


Edit = Widen | Scale | Overwrite | Number | InsertBlock | Gate | KeepBlocks | InsertLayer
KINDS: Mapping[str, type[Any]] = {
    edit.kind: edit for edit in (Widen, Scale, Overwrite, Number, InsertBlock, Gate, KeepBlocks, InsertLayer)
}


@dataclass(frozen=True)
class Plan:
    """One growth event, before it is made."""

    operator: str
    """What grows: depth, feed_forward, heads, residual, vocabulary, classes, expert or channels."""
    where: tuple[str, ...]
    """Names of the modules that it changes."""
    edits: tuple[Edit, ...]
    """In order."""
    before: int
    """Size before: blocks, hidden units, heads, lanes, rows, experts or channels."""
    after: int
    """Size after."""
    promise: str = "bounded"
    """How the function is preserved: exact (only zeros are added in whole products), bounded (the sums of matrix
    products are cut otherwise), gated, approximate, or anew: nothing is kept."""
    outputs: int | None = None
    """How many of the old outputs there were, when the model has more of them afterwards; else None."""
    reasons: tuple[str, ...] = field(default=())
    """How the parts were found, and what was decided."""
    double_bound: float = 1e-9
    """Largest change of an answer in float64, as a share of the answers' size; more where a norm's epsilon shows."""

    def describe(self) -> str:
        """Say in one line what grows."""
        places = ", ".join(self.where[:3]) + (f" and {len(self.where) - 3} more" if len(self.where) > 3 else "")
        return f"{self.operator} from {self.before} to {self.after} in {places or 'the model'}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON and a checkpoint can hold."""
        values = {name: _plain(getattr(self, name)) for name in (f.name for f in fields(self)) if name != "edits"}
        return {**values, "edits": [{"kind": edit.kind, **_plain(asdict(edit))} for edit in self.edits]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Read what `to_dict` returned.

        Raises:
            LineageError: An operator, a promise, a step or a field of one is unknown.
        """
        try:
            for what, given, known in (
                ("operator", values["operator"], OPERATORS),
                ("promise", values.get("promise", "bounded"), PROMISES),
            ):
                if given not in known:
                    raise LineageError(
                        f"The lineage holds a growth event with the {what} {given!r}.",
                        f"This version of Seedbed knows {', '.join(known)}.",
                        "Resume with the version that wrote it, or a newer one.",
                    )
            edits = []
            for entry in values["edits"]:
                named = dict(entry)
                kind = named.pop("kind")
                if kind not in KINDS:
                    raise LineageError(
                        f"The lineage holds a growth step of the kind {kind!r}.",
                        f"This version of Seedbed knows {', '.join(KINDS)}.",
                        "Resume with the version that wrote it, or a newer one.",
                    )
                edits.append(KINDS[kind](**{name: _frozen(value) for name, value in named.items()}))
            rest = {name: _frozen(value) for name, value in values.items() if name != "edits"}
            return cls(edits=tuple(edits), **rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise LineageError(
                f"A growth event of the lineage cannot be read ({type(error).__name__}: {error}).",
                "Expected what this version of Seedbed writes.",
                "Restore the run from a copy, or resume with the version that wrote it.",
            ) from error


def _plain(value: Any) -> Any:
    """Return lists for tuples."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _frozen(value: Any) -> Any:
    """Return tuples for lists."""
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
