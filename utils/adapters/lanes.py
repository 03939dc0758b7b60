"""Which axes of which parameters carry the same lanes (channels, features), so that a width changes everywhere at once.

This is the dependency graph of structured pruning (DepGraph, Fang et al., arXiv:2301.12900), found by following one
forward pass instead of a table of layer classes, and proven by permutation: lanes that are understood can be put in
another order, in every axis at once, and the output stays. Whatever is not understood comes back as fixed, with the
reason.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from utils.adapters.detection import Detection
from utils.adapters.lane_labels import Entry
from utils.adapters.lane_tracing import LaneTracer, lanes_followed
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.seeding import isolated_streams

BATCH = 2
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative change of the output up to which a permutation of lanes counts as without effect."""
COPY_BYTES = 4e9
"""Largest copy in float64 that is made; larger models are permuted themselves."""
SPREAD = 0.05
"""Size of what is added to the values of the copy on which lanes are permuted, so that no two are alike by accident."""


@dataclass(frozen=True)
class Member:
    """Lanes in one axis of a parameter or buffer: lane `i` is the entries from ``offset + i * repeat`` on.

    A tied table that makes lanes as an embedding and reads them as a head appears once per role; see
    `LaneGroup.places` for each part of an axis once.
    """

    name: str
    """The parameter or buffer; of a tied one, its first name."""
    axis: int
    """Its axis."""
    role: str
    """``"writer"`` (makes the lanes), ``"reader"`` (consumes them) or ``"pointwise"`` (acts on each lane alone)."""
    repeat: int = 1
    """How many consecutive entries belong to one lane: the positions of a channel that is flattened, for example."""
    offset: int = 0
    """First entry of the first lane."""


@dataclass(frozen=True)
class LaneNorm:
    """A norm that takes statistics across lanes."""

    name: str
    """The module whose own code it is; empty for code of a module that has parts."""
    kind: str
    """``"rms"`` (scaling all lanes changes nothing), ``"layer"`` (shifting them neither) or ``"group"`` (its statistics
    cover some of the lanes at a time)."""
    lanes: int
    """How many lanes its statistics cover: more than the group's size where other widths are joined to it first."""


@dataclass(frozen=True)
class LaneGroup:
    """One width of the model: all axes that carry the same lanes.

    Where `fixed` states a reason, members are where lanes were seen, and their repeat and offset may not tell all.
    """

    size: int
    """Number of lanes."""
    members: tuple[Member, ...]
    """Where they are, in the order of execution."""
    norms: tuple[LaneNorm, ...]
    """What takes statistics across them."""
    reason: str
    """How the group was found."""
    fixed: str | None
    """Why the width cannot change; None if it can."""

    @property
    def places(self) -> tuple[tuple[str, int, int, int], ...]:
        """Each part of an axis once: ``(name, axis, repeat, offset)``, whatever its roles."""
        return tuple(dict.fromkeys((m.name, m.axis, m.repeat, m.offset) for m in self.members))

    def role(self, name: str) -> tuple[Member, ...]:
        """Return the members of one role."""
        return tuple(member for member in self.members if member.role == name)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)


def lane_groups(adapter: ModelAdapter) -> Detection[list[LaneGroup]]:
    """Find the widths of a model by following one forward pass; the model comes back as it was.

    Followed is what leads to the logits in eval mode. Sizes that forward states as plain numbers look like any others:
    a widened model must be run before it is trusted.

    Args:
        adapter: The model.

    Returns:
        The groups that a product, convolution or table makes or reads, in the order of execution. Those whose width
        can change passed `permutes`. Axes of length one are not listed.

    Raises:
        AdapterError: No forward pass succeeds.
    """
    inputs = adapter.example_inputs(BATCH)
    with adapter.isolated(), lanes_followed(adapter.module) as tracer:
        tracer.finish(adapter.logits(inputs))
    idle = {n: p for n, p in adapter.module.named_parameters() if n not in tracer.used}
    groups = [_beside(group, idle) for group in _grouped(tracer)]
    if any(group.fixed is None for group in groups):
        with _stage(adapter) as stage:
            groups = [group if group.fixed else _proven(stage, group) for group in groups]
    free = sum(group.fixed is None for group in groups)
    return Detection(groups, f"{len(groups)} widths found by following one forward pass, {free} of which can change")


def permutes(adapter: ModelAdapter, group: LaneGroup, seed: int = 0) -> float:
    """Permute the lanes of a group in all of its members at once and measure what that does to the output.

    Values are changed a little at random first, so that ones and zeros of a fresh model hide nothing. This happens on a
    copy in float64 where the model can be copied and runs in it; else on the model itself, which gets every value back.

    Args:
        adapter: The model.
        group: The lanes; every place is permuted the same way.
        seed: Of the permutation.

    Returns:
        Largest change of the logits, relative to the largest logit: about 1e-12 for lanes that are one width.

    Raises:
        AdapterError: No forward pass succeeds, or the group does not fit the model.
    """
    with _stage(adapter) as stage:
        return stage.change(group, seed)


class _Doubled(TorchFunctionMode):
    """Has a model in float64 stay there where its code asks for float32, as norms do, lest rounding hide something."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation in float64."""

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


class _Stage:
    """A model whose values may be changed."""

    def __init__(self, adapter: ModelAdapter, doubled: bool) -> None:
        self.adapter, self.doubled = adapter, doubled
        module = adapter.module
        tensors = dict(module.named_buffers())
        parameters = dict(module.named_parameters())
        generator = torch.Generator().manual_seed(0)
        for name, tensor in {**tensors, **parameters}.items():
            if not tensor.is_floating_point():
                continue
            noise = SPREAD * torch.randn(tensor.shape, generator=generator).to(tensor)
            # Zeros of masks mean something; those of running statistics and biases are only where they start.
            added = noise if name in parameters else noise.abs() if tensor.dim() == 1 else torch.zeros_like(noise)
            tensor.mul_(noise.exp()).add_(added)
        self.tensors = {**tensors, **parameters}
        self.before = self._logits()

    @property
    def tolerance(self) -> float:
        return TOLERANCE.get(self.before.dtype, 0.05)

    def change(self, group: LaneGroup, seed: int, places: Sequence[tuple[str, int, int, int]] | None = None) -> float:
        """Permute (all places of the group, if none are stated), measure, permute back."""
        order = _order(group.size, seed)
        saved: dict[str, Tensor] = {}
        try:
            for name, axis, repeat, offset in places or group.places:
                tensor = self.tensors.get(name)
                end = offset + repeat * group.size
                if tensor is None or axis >= tensor.dim() or end > tensor.shape[axis]:
                    raise AdapterError(
                        f"The model has no {name} with {end} entries along axis {axis}.",
                        "Expected a group of lanes of this very model.",
                        "Call lane_groups on the model as it is now.",
                    )
                saved.setdefault(name, tensor.clone())
                moved = offset + (order[:, None] * repeat + torch.arange(repeat)).flatten().to(tensor.device)
                tensor.narrow(axis, offset, end - offset).copy_(tensor.index_select(axis, moved))
            after = self._logits()
        finally:
            for name, value in saved.items():
                self.tensors[name].copy_(value)
        gap = (after.double() - self.before.double()).abs().max() if after.shape == self.before.shape else torch.inf
        change = float(gap) / max(float(self.before.double().abs().max()), 1e-30)
        return change if change == change else float("inf")

    def _logits(self) -> Tensor:
        """Run the model on the same inputs with the same random numbers; buffers that it changes are put back."""
        kept = {name: buffer.clone() for name, buffer in self.adapter.module.named_buffers()}
        casts = _Doubled() if self.doubled else nullcontext()
        with isolated_streams("lanes"), casts:
            logits = self.adapter.logits(self.adapter.example_inputs(BATCH)).detach().clone()
        for name, buffer in self.adapter.module.named_buffers():
            if name in kept and buffer.shape == kept[name].shape:
                buffer.copy_(kept[name])
        return logits


@contextmanager
def _stage(adapter: ModelAdapter) -> Iterator[_Stage]:
    """Set up a copy in float64, or else the model itself, which comes back with every value it had."""
    with ExitStack() as stack:
        twin, stage = copy.copy(adapter), None
        try:
            if 8 * adapter.num_parameters > COPY_BYTES:
                raise MemoryError
            with adapter.isolated():
                twin.module = copy.deepcopy(adapter.module).double()
            stack.enter_context(twin.isolated())
            stage = _Stage(twin, True)
        except Exception:
            # Not every model can be copied, and some state a dtype.
            stack.close()
        if stage is not None:
            yield stage
            return
    changed = adapter.changed
    with adapter.isolated():
        saved = {name: tensor.clone() for name, tensor in _state(adapter).items()}
        try:
            yield _Stage(adapter, False)
        finally:
            for name, tensor in _state(adapter).items():
                tensor.copy_(saved[name])
    # Whoever watches the model may have seen that it was written to; every value is back.
    adapter.changed = changed


def _state(adapter: ModelAdapter) -> dict[str, Tensor]:
    return {**dict(adapter.module.named_parameters()), **dict(adapter.module.named_buffers())}


def _order(size: int, seed: int) -> Tensor:
    """Draw a permutation that is not the identity."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order.roll(1) if torch.equal(order, torch.arange(size)) else order


def _proven(stage: _Stage, group: LaneGroup) -> LaneGroup:
    """Fix a group whose lanes cannot be put in another order."""
    change, alone = stage.change(group, 0), stage.change(group, 0, group.places[:1])
    if change > stage.tolerance:
        return replace(group, fixed=f"lanes are not interchangeable: permuting them changes the output by {change:.2g}")
    if alone <= stage.tolerance:
        name, axis = group.places[0][:2]
        return replace(group, fixed=f"cannot be proven: the order in axis {axis} of {name} does not reach the output")
    return replace(group, reason=f"{group.reason}; permuting them changes the output by {change:.1g}, relatively")


def _grouped(tracer: LaneTracer) -> list[LaneGroup]:
    """Put lanes that are in the same axes into groups."""
    slots = tracer.slots
    lanes: dict[int, dict[int, list[int]]] = {}
    for place, entry in enumerate(slots.entries):
        for index, root in enumerate(slots.roots(np.arange(entry.base, entry.base + entry.size)).tolist()):
            lanes.setdefault(root, {}).setdefault(place, []).append(index)
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root, places in lanes.items():
        groups.setdefault(tuple((place, len(indices)) for place, indices in places.items()), []).append(root)
    reasons = _reasons(tracer)
    norms: dict[int, list[LaneNorm]] = {}
    for labels, name, kind in tracer.norms:
        covered = np.unique(slots.roots(labels)).tolist()
        for root in covered:
            norms.setdefault(root, []).append(LaneNorm(name, kind, len(covered)))
    found = []
    for signature, roots in groups.items():
        roles = [slots.roles.get(place, []) for place, _ in signature]
        if not any(role in ("writer", "reader") for one in roles for role in one):
            continue
        fixed = next((reasons[root] for root in roots if root in reasons), None)
        members: list[Member] = []
        # The order of the lanes is the one that they have in the axis that was used first.
        for place, _ in signature:
            entry = slots.entries[place]
            laid = _layout([lanes[root][place] for root in roots])
            if laid is None:
                fixed = fixed or f"lanes are not in one order in axis {entry.axis} of {entry.name}"
                laid = [(1, min(index for root in roots for index in lanes[root][place]))]
            members += _members(entry, laid, slots.roles.get(place) or ["pointwise"])
        if fixed is None and len(roots) == 1:
            fixed = "all entries are entangled in one lane"
        kinds = {role for one in roles for role in one}
        if fixed is None and not {"writer", "reader"} <= kinds:
            fixed = "nothing was seen that reads its lanes" if "writer" in kinds else "no parameter makes its lanes"
        statistics = dict.fromkeys(norm for root in roots for norm in norms.get(root, []))
        reason = f"{len(roots)} lanes in {len(signature)} axes, united by the operations of one forward pass"
        found.append(LaneGroup(len(roots), tuple(members), tuple(statistics), reason, fixed))
    return found


def _beside(group: LaneGroup, idle: Mapping[str, Tensor]) -> LaneGroup:
    """Fix a group of a width that parameters which did not run have too: a part for training, an expert not chosen."""
    sizes = {repeat * group.size for _, _, repeat, _ in group.places}
    name = next((name for name, tensor in idle.items() if sizes & set(tensor.shape)), None)
    if group.fixed or name is None:
        return group
    return replace(group, fixed=f"{name}, which took no part in the pass, may have the same lanes")


def _reasons(tracer: LaneTracer) -> dict[int, str]:
    """Return the first reason against changing each lane that has one."""
    slots = tracer.slots
    found: dict[int, str] = {}
    for labels, reason in slots.reasons:
        for root in np.unique(slots.roots(labels)).tolist():
            found.setdefault(root, reason)
    for parts in tracer.parts:
        if all(slots.same(part, parts[0]) for part in parts):
            continue
        for part in parts:
            for root in np.unique(slots.roots(part)).tolist():
                found.setdefault(root, f"`chunk` cuts it into {len(parts)} equal parts that are not the same lanes")
    return found


def _members(entry: Entry, laid: Sequence[tuple[int, int]], roles: Sequence[str]) -> list[Member]:
    return [Member(entry.name, entry.axis, role, repeat, offset) for repeat, offset in laid for role in roles]


def _layout(lanes: Sequence[list[int]]) -> list[tuple[int, int]] | None:
    """Return repeat and offset of each run of entries, the same for every lane; None if the lanes are not in order."""
    table = np.array([sorted(lane) for lane in lanes])
    breaks = np.flatnonzero(np.diff(table[0]) != 1) + 1
    laid = []
    for columns in np.split(np.arange(table.shape[1]), breaks):
        run, repeat = table[:, columns], len(columns)
        offset = int(run[0, 0])
        if not np.array_equal(run, offset + np.arange(len(run))[:, None] * repeat + np.arange(repeat)):
            return None
        laid.append((repeat, offset))
    return laid
