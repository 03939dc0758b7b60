"""Labels of lanes: every index of every axis of a parameter is a slot, and slots that are one lane are united.

A tensor of a forward pass carries labels: integer tensors of its own number of axes, of size one along every axis on
which nothing depends, that name a slot for each element. An operation that only moves numbers moves the labels with
them, whatever it does, so that no rule about shapes is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

UNKNOWN = 0
"""Label of an element of which no lane is known."""


@dataclass(frozen=True)
class Entry:
    """One axis of a parameter or buffer."""

    name: str
    """First name of the tensor."""
    axis: int
    """The axis."""
    base: int
    """Label of its first index."""
    size: int
    """Its length."""


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor in a sum or product, with what is known about it."""

    shape: tuple[int, ...]
    """Its shape, maybe with axes put in so that it lines up with others."""
    labels: tuple[Tensor, ...] = ()
    """Its labels, with as many axes."""
    live: bool = False
    """It depends on the model's input."""
    uniform: bool = False
    """It holds one number everywhere."""

    def axes(self, index: int) -> frozenset[int]:
        """Return the axes along which one of its labels varies."""
        return varying(self.labels[index])


def varying(labels: Tensor) -> frozenset[int]:
    """Return the axes along which labels vary."""
    return frozenset(axis for axis, size in enumerate(labels.shape) if size > 1)


class Slots:
    """All slots, which of them are one lane, and what speaks against changing their number.

    Attributes:
        entries: The axes seen so far, in the order of their first use.
        roles: What each axis, by its place in `entries`, was used for.
        reasons: Labels that cannot change, each with the reason, in order.
    """

    def __init__(self) -> None:
        """Start without slots."""
        self.entries: list[Entry] = []
        self.roles: dict[int, list[str]] = {}
        self.reasons: list[tuple[np.ndarray, str]] = []
        self._parents = np.zeros(1, dtype=np.int64)

    def add(self, name: str, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Make slots for every axis of a parameter that is longer than one; return its labels."""
        made = []
        for axis, size in enumerate(shape):
            if size < 2:
                continue
            base = len(self._parents)
            self.entries.append(Entry(name, axis, base, size))
            self._parents = np.concatenate([self._parents, np.arange(base, base + size)])
            made.append(torch.arange(base, base + size).view([size if a == axis else 1 for a in range(len(shape))]))
        return tuple(made)

    def roots(self, labels: Any) -> np.ndarray:
        """Return the lane of each label: the same number for all slots that are united."""
        found = self._parents[np.asarray(labels)]
        while True:
            above = self._parents[found]
            if np.array_equal(above, found):
                return found
            found = above

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Note that labels name the same lanes, element by element; where only one is known, its lanes are fixed."""
        first, second = torch.broadcast_tensors(first, second)
        a, b = self.roots(first).ravel(), self.roots(second).ravel()
        for known, other in ((a, b), (b, a)):
            alone = (known != UNKNOWN) & (other == UNKNOWN)
            if alone.any():
                self.fix(known[alone], "only some of its lanes are combined with lanes that are known")
        pairs = np.unique(np.stack([a, b]), axis=1)
        for left, right in pairs[:, (pairs[0] != pairs[1]) & (pairs[0] != UNKNOWN) & (pairs[1] != UNKNOWN)].T:
            low, high = sorted((self._root(int(left)), self._root(int(right))))
            self._parents[high] = low

    def fix(self, labels: Any, reason: str) -> None:
        """Note why the number of these lanes cannot change."""
        kept = np.unique(np.asarray(labels))
        kept = kept[kept != UNKNOWN]
        if kept.size:
            self.reasons.append((kept, reason))

    def play(self, labels: Sequence[Tensor], role: str) -> None:
        """Note what the axes that these labels belong to are used for."""
        bases = np.array([entry.base for entry in self.entries])
        for one in labels:
            slots = np.unique(np.asarray(one))
            for place in np.unique(np.searchsorted(bases, slots[slots != UNKNOWN], side="right") - 1):
                roles = self.roles.setdefault(int(place), [])
                # What makes or reads lanes and is also added to others, such as a table of positions, stays what it is.
                if role not in roles and not (role == "pointwise" and roles):
                    roles[:] = [one for one in roles if one != "pointwise"] + [role]

    def compressed(self, labels: Tensor) -> Tensor:
        """Cut labels to size one along every axis on which they do not vary."""
        lanes = torch.from_numpy(self.roots(labels))
        for axis, size in enumerate(labels.shape):
            if size > 1 and bool((lanes == lanes.narrow(axis, 0, 1)).all()):
                labels, lanes = labels.narrow(axis, 0, 1), lanes.narrow(axis, 0, 1)
        return labels

    def same(self, first: Tensor, second: Tensor) -> bool:
        """Tell whether two sets of labels, flattened, name the same lanes in the same order."""
        return np.array_equal(self.roots(first).ravel(), self.roots(second).ravel())

    def _root(self, slot: int) -> int:
        while self._parents[slot] != slot:
            slot = int(self._parents[slot])
        return slot


def merged(slots: Slots, labels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Keep one of the labels that vary along the same axes, and none that varies along part of another's only."""
    kept: list[Tensor] = []
    for one in sorted(labels, key=lambda one: -len(varying(one))):
        if not varying(one) or bool((one == UNKNOWN).all()):
            continue
        place = next((i for i, other in enumerate(kept) if varying(one) <= varying(other)), None)
        if place is None:
            kept.append(slots.compressed(one))
        else:
            other = kept[place]
            a, b = (slots.roots(part) for part in torch.broadcast_tensors(one, other))
            if ((a != b) & (a != UNKNOWN) & (b != UNKNOWN)).any():
                for part in (one, other):
                    slots.fix(part, "its lanes and others are flattened into one axis")
            kept[place] = torch.where(other == UNKNOWN, one, other)
    return tuple(kept)


def joined(slots: Slots, operands: Sequence[Operand]) -> tuple[Tensor, ...]:
    """Take in an elementwise operation: lanes that meet are one lane.

    Args:
        slots: Where it is noted.
        operands: The tensors, which broadcast.

    Returns:
        Labels of the result.
    """
    dims = max((len(operand.shape) for operand in operands), default=0)
    sides = [aligned(operand, dims) for operand in operands]
    for i, side in enumerate(sides):
        for other in sides[i + 1 :]:
            meet(slots, side, other)
        for other in sides[:i] + sides[i + 1 :]:
            strangers(slots, side, other, "combined with")
    return merged(slots, [one for side in sides for one in side.labels])


def meet(slots: Slots, first: Operand, second: Operand) -> None:
    """Unite the lanes of two operands that vary along a common axis."""
    for i, one in enumerate(first.labels):
        for j, other in enumerate(second.labels):
            if first.axes(i) & second.axes(j):
                slots.unite(one, other)


def strangers(slots: Slots, side: Operand, other: Operand, verb: str) -> None:
    """Fix the lanes of an operand that meet numbers of which no lane is known."""
    if other.uniform:
        return
    known = frozenset[int]().union(*(other.axes(i) for i in range(len(other.labels))))
    for i, one in enumerate(side.labels):
        for axis in side.axes(i) - known:
            if other.shape[axis] > 1:
                what = "the model's raw input, or of what is computed from it" if other.live else "constants"
                slots.fix(one, f"{verb} {other.shape[axis]} numbers of {what}: no parameter makes them")


def aligned(operand: Operand, dims: int) -> Operand:
    """Put leading axes of size one in front."""
    lead = (1,) * (dims - len(operand.shape))
    labels = tuple(one.reshape(lead + tuple(one.shape)) for one in operand.labels)
    return Operand(lead + tuple(operand.shape), labels, operand.live, operand.uniform)


def placed(operand: Operand, letters: str, order: str) -> Operand:
    """Arrange an operand whose axes have these letters in another order; letters that it lacks get size one."""
    mine = [letters.index(letter) for letter in order if letter in letters]

    def arrange(shape: Sequence[int]) -> tuple[int, ...]:
        sizes = iter(mine)
        return tuple(shape[next(sizes)] if letter in letters else 1 for letter in order)

    labels = tuple(
        one.permute(*mine, *(a for a in range(one.dim()) if a not in mine)).reshape(arrange(one.shape))
        for one in operand.labels
    )
    return Operand(arrange(operand.shape), labels, operand.live, operand.uniform)


def contracted(
    slots: Slots, left: Operand, right: Operand, letters: tuple[str, str, str], roles: bool = True
) -> tuple[Tensor, ...]:
    """Take in a product that sums over axes: lanes that are summed over together are one lane.

    Args:
        slots: Where it is noted.
        left: First factor.
        right: Second factor.
        letters: One letter per axis of the first, the second and the result, as in einsum.
        roles: Whether parameters in it make and read lanes; else they only scale them.

    Returns:
        Labels of the result.
    """
    first, second, out = letters
    joint = "".join(dict.fromkeys(first + second))
    sides = (placed(left, first, joint), placed(right, second, joint))
    summed = {axis for axis, letter in enumerate(joint) if letter in first and letter in second and letter not in out}
    meet(slots, *sides)
    for side, other in (sides, sides[::-1]):
        strangers(slots, side, other, "multiplied with")
        for i, one in enumerate(side.labels):
            over = bool(side.axes(i) & summed)
            if left.live and right.live and over:
                slots.fix(one, "two activations are multiplied along it, as queries and keys are")
            elif not left.live and not right.live:
                slots.fix(one, "two parameters are multiplied with each other")
            elif not side.live and other.live and (over or all(joint[axis] in out for axis in side.axes(i))):
                slots.play([one], ("reader" if over else "writer") if roles else "pointwise")
    kept = []
    for side in sides:
        for i, one in enumerate(side.labels):
            if all(joint[axis] in out for axis in side.axes(i)):
                gone = [0 if letter not in out else slice(None) for letter in joint]
                stay = "".join(letter for letter in joint if letter in out)
                kept.append(placed(Operand((1,) * len(stay), (one[tuple(gone)],)), stay, out).labels[0])
    return merged(slots, kept)
