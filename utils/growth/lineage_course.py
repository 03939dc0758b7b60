"""What a lineage says about the architecture over time: which blocks there were, and how wide their parts.

A lineage names what grew and nothing else, so parts that never grew are not in here. Blocks are followed through
insertions: what was ``blocks.1`` may be ``blocks.2`` later, and a new block is as wide as the one that it is modelled
on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.growth.edits import Edit, InsertBlock, KeepBlocks
from utils.growth.lineage import GrowthEvent

MOST_BLOCKS = 24
"""With more blocks than these, neighbours of one age share a row."""


@dataclass(frozen=True)
class Bar:
    """A stretch of time in which a part was as it was."""

    begin: float
    """Its first step."""
    end: float
    """Its last step."""
    event: int | None
    """Number of the event that began it, from 1; None for what was there at the beginning of the run."""
    size: int | None = None
    """How wide the part was; None for a block."""


@dataclass(frozen=True)
class Row:
    """One part of the model over time."""

    label: str
    """Where it is, by the names that the parts have at the end."""
    operator: str
    """What grows there: depth for a block."""
    bars: tuple[Bar, ...]
    """In order, without gaps."""


class _Block:
    """One block, whatever its number."""

    def __init__(self, event: int | None) -> None:
        """Note the number of the event that made it."""
        self.event = event


_Part = tuple[str, "_Block | None", str]
"""An operator, the block it grew in, and the rest of the name."""
_Width = tuple[int | None, int]
"""The number of the event that brought a width, None for the first, and the width."""


class _Replay:
    """Blocks and widths, event by event."""

    def __init__(self, events: Sequence[GrowthEvent]) -> None:
        """Begin with the blocks that the first event of each container met."""
        self.offsets: dict[str, int] = {}
        self.stacks: dict[str, list[_Block]] = {}
        self.widths: dict[_Part, list[_Width]] = {}
        depths = [event.plan for event in events if event.plan.operator == "depth"]
        for plan in depths:
            for made, edit in enumerate(_block_edits(plan.edits)):
                self.stacks.setdefault(edit.container, [_Block(None) for _ in range(plan.before)])
                # A sequence may hold other modules in front of its blocks; the places of the events tell how many.
                known = edit.first - plan.after if isinstance(edit, KeepBlocks) else edit.index - plan.before - made
                self.offsets[edit.container] = max(self.offsets.get(edit.container, 0), known)
        for number, event in enumerate(events, 1):
            if event.plan.operator == "depth":
                for edit in _block_edits(event.plan.edits):
                    self._change(edit, number)
            else:
                self._widen(event, number)

    def _change(self, edit: InsertBlock | KeepBlocks, number: int) -> None:
        """Insert a block, or take some away."""
        stack, offset = self.stacks[edit.container], self.offsets[edit.container]
        if isinstance(edit, KeepBlocks):
            del stack[max(edit.first - offset, 0) : max(edit.last - offset, 0)]
            return
        new, place = _Block(number), edit.source - offset
        if 0 <= place < len(stack):
            source = stack[place]
            for (operator, block, rest), history in list(self.widths.items()):
                if block is source:
                    self.widths[operator, new, rest] = list(history)
        stack.insert(max(edit.index - offset, 0), new)

    def _widen(self, event: GrowthEvent, number: int) -> None:
        """Note the new size of each part that an event changed."""
        for name in event.plan.where:
            part = self._part(event.plan.operator, name)
            history = self.widths.setdefault(part, [(None, event.plan.before)])
            history.append((number, event.plan.after))

    def _part(self, operator: str, name: str) -> _Part:
        """Find the block that a name lies in now."""
        for container, stack in self.stacks.items():
            prefix = f"{container}." if container else ""
            place, _, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and place.isdigit():
                number = int(place) - self.offsets[container]
                if 0 <= number < len(stack):
                    return operator, stack[number], rest
        return operator, None, name

    def names(self) -> dict[_Block, tuple[str, int]]:
        """Return container and place of each block at the end."""
        return {
            block: (container, place)
            for container, stack in self.stacks.items()
            for place, block in enumerate(stack, self.offsets[container])
        }


def course(events: Sequence[GrowthEvent], older: int, end: float) -> list[Row]:
    """Return the blocks of a model, the first at first, and then the parts that became wider.

    Args:
        events: The lineage.
        older: How many of its events came before the first step of the run, see
            `utils.training.growth_rows.events_before`.
        end: The last step that is shown.
    """
    replay = _Replay(events)
    names = replay.names()

    def began(event: int | None) -> float:
        return 0.0 if event is None or event <= older else float(events[event - 1].step)

    def shown(event: int | None) -> int | None:
        return None if event is None or event <= older else event

    rows = []
    for container, stack in replay.stacks.items():
        groups: list[list[_Block]] = []
        for block in stack:
            alike = groups and shown(groups[-1][-1].event) == shown(block.event)
            if alike and len(names) > MOST_BLOCKS:
                groups[-1].append(block)
            else:
                groups.append([block])
        for group in groups:
            bar = Bar(began(group[0].event), end, shown(group[0].event))
            label = f"{container}.{_ranges(names[block][1] for block in group)}".lstrip(".")
            rows.append(Row(label, "depth", (bar,)))
    together: dict[tuple[str, str, tuple[_Width, ...]], list[_Part]] = {}
    for part, widths in replay.widths.items():
        operator, held_in, rest = part
        if held_in is None or held_in in names:
            together.setdefault((operator, rest if held_in is not None else "", tuple(widths)), []).append(part)
    operators = list(dict.fromkeys(operator for operator, _, _ in together))
    for (operator, _, history), parts in sorted(together.items(), key=lambda item: operators.index(item[0][0])):
        born = min(began(block.event) if block is not None else 0.0 for _, block, _ in parts)
        starts = [max(began(event), born) for event, _ in history]
        stretches = zip(history, starts, [*starts[1:], end], strict=True)
        # What was over before the part, or the run, began is not shown.
        bars = [
            Bar(start, until, shown(event), size)
            for number, ((event, size), start, until) in enumerate(stretches, 1)
            if until > start or number == len(history)
        ]
        rows.append(Row(_place(parts, names), operator, tuple(bars)))
    return rows


def _block_edits(edits: Iterable[Edit]) -> list[InsertBlock | KeepBlocks]:
    """Return what inserts blocks or takes them away."""
    return [edit for edit in edits if isinstance(edit, (InsertBlock, KeepBlocks))]


def _place(parts: Sequence[_Part], names: dict[_Block, tuple[str, int]]) -> str:
    """Name parts that grew alike."""
    inside = sorted({names[block] for _, block, _ in parts if block is not None})
    places = [
        f"{container}.{_ranges(place for held, place in inside if held == container)}".lstrip(".")
        for container in dict.fromkeys(container for container, _ in inside)
    ]
    outside = [rest or "the model" for _, block, rest in parts if block is None]
    if len(outside) > 1:
        outside = [f"{outside[0]} +{len(outside) - 1}"]
    return ", ".join([*places, *outside])


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers in short.

    Example:
        >>> _ranges([3, 0, 1, 2, 7])
        '0-3, 7'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
