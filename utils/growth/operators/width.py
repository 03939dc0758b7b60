"""Widen what `utils.adapters.lanes` finds: hidden layers and channels, and the residual stream.

Without a norm across them, new lanes may hold anything as long as nobody reads them yet: writers draw new rows, readers
get zero columns (Net2Wider without replication, Chen et al., arXiv:1511.05641). Batch normalization looks at each lane
alone; its new gains and running statistics are the means of the old ones.

With a norm across them, new lanes must leave its statistics as they were, up to a factor that its gain takes back:
RMSNorm divides by the root of the mean of d squares, so zero lanes make it larger by sqrt(D / d); LayerNorm also
subtracts the mean, so new lanes have to be the mean of the old ones in everything that writes them. Either way the gain
is multiplied by sqrt(d / D) and epsilon by d / D, and what the norm then makes of the new lanes is zero (Gesmundo &
Maile, arXiv:2308.06103, hidden dimension expansion; LEMON, arXiv:2310.07999, for the mean). Readers draw new columns:
they learn as soon as the new lanes hold something.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from utils.adapters.capture import first_tensor, observe
from utils.adapters.lanes import LaneGroup, Member, lane_groups
from utils.adapters.structure import Structure
from utils.growth.certificate import DOUBLE_BOUND, EPSILON_BOUND
from utils.growth.edits import Edit, GrowthRefusedError, Number, Plan, Scale, Widen
from utils.growth.numbers import owned_sizes, settled
from utils.growth.request import Request
from utils.growth.scratch import Scratch
from utils.growth.surgery import tensor_of

EPSILON = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps")
"""What norms call the number that keeps them from dividing by zero."""


def plan_channels(scratch: Scratch, found: Structure, request: Request) -> Plan:
    """Plan more hidden features or channels where no norm takes statistics across them.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        request: How many lanes, and in which module; None takes the lanes on which the most weights depend.

    Raises:
        GrowthRefusedError: There are no such lanes, or the function would change.
    """
    groups = [group for group in lane_groups(scratch.adapter).value if not group.norms]
    return _planned(scratch, request, groups, "channels")


def plan_residual(scratch: Scratch, found: Structure, request: Request) -> Plan:
    """Plan a wider residual stream: what blocks hand on to each other, with the norms that read it.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        request: How many lanes, and through which module.

    Raises:
        GrowthRefusedError: There is no such stream, or no way to widen it keeps the function.
    """
    groups = [group for group in lane_groups(scratch.adapter).value if group.norms]
    return _planned(scratch, request, groups, "residual")


def _planned(scratch: Scratch, request: Request, groups: Sequence[LaneGroup], operator: str) -> Plan:
    """Choose a group and plan its growth."""
    group = _chosen(scratch.module, groups, request, operator)
    added = request.added(group.size, "lanes")
    if group.fixed is not None:
        raise GrowthRefusedError(
            f"The {group.size} lanes of {group.members[0].name} cannot change in number: {group.fixed}.",
            "Expected lanes that nothing splits, counts or hands out.",
            "Grow another part.",
        )
    edits = list(_edits(scratch, group, added))
    where = tuple(dict.fromkeys(member.name.rpartition(".")[0] or member.name for member in group.members))
    # A gain times the root of a share is rounded to the precision of the gain, and not every epsilon shrinks with it.
    bound = EPSILON_BOUND if group.norms else DOUBLE_BOUND
    plan = Plan(operator, where, tuple(edits), group.size, group.size + added, "bounded", None, (group.reason,), bound)
    return settled(scratch, plan, [(group.size, group.size + added)])


def _chosen(module: nn.Module, groups: Sequence[LaneGroup], request: Request, operator: str) -> LaneGroup:
    """Return the group that was asked for, or the free one that the most weights belong to."""
    if isinstance(request.where, int):
        raise GrowthRefusedError(
            f"{operator} was asked for at place {request.where}.",
            "Expected the name of a module or a parameter.",
            "Name one, or leave where at None.",
        )
    if request.where is not None:
        name = request.where
        inside = [
            group
            for group in groups
            if any(f"{member.name}.".startswith(f"{name}.") and member.role == "writer" for member in group.members)
        ]
        if not inside:
            makers = dict.fromkeys(
                member.name.rpartition(".")[0]
                for group in groups
                if group.fixed is None
                for member in group.role("writer")
            )
            raise GrowthRefusedError(
                f"Nothing in {name!r} makes lanes that {operator} could widen.",
                f"Expected one of {', '.join(makers)}." if makers else "Expected such lanes, and the model has none.",
                "Name one of these, or leave where at None." if makers else "Grow another part.",
            )
        return max(inside, key=lambda group: (group.fixed is None, _weights(module, group)))
    free = [group for group in groups if group.fixed is None]
    if not free:
        reasons = (
            "; ".join(dict.fromkeys(group.fixed or "" for group in groups)) or "no layer hands features to another"
        )
        raise GrowthRefusedError(
            f"There are no lanes that {operator} could widen: {reasons}.",
            "Expected features that one layer makes and another reads"
            + (", with norms across them." if operator == "residual" else ", without a norm across them."),
            "Grow another part.",
        )
    return max(free, key=lambda group: _weights(module, group))


def _weights(module: nn.Module, group: LaneGroup) -> int:
    """Return how many numbers depend on a group's size."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return sum(tensors[name].numel() for name in {member.name for member in group.members} if name in tensors)


def _edits(scratch: Scratch, group: LaneGroup, added: int) -> Iterator[Edit]:
    """Yield what widens a group everywhere."""
    module = scratch.module
    kinds = {norm.kind for norm in group.norms}
    if len(kinds) > 1 or kinds & {"group"}:
        raise GrowthRefusedError(
            f"The lanes are normalized in the ways {', '.join(sorted(kinds))}.",
            "Expected RMSNorm only or LayerNorm only: new lanes cannot be neutral for both, or for groups of lanes.",
            "Grow another part.",
        )
    after = group.size + added
    for norm in group.norms:
        if norm.lanes != group.size or not norm.name:
            raise GrowthRefusedError(
                f"A norm in {norm.name or 'code of a module that has parts'} covers {norm.lanes} lanes, not "
                f"{group.size}.",
                "Expected norms in modules of their own, of these lanes alone.",
                "Grow another part.",
            )
        yield from _rescaled(scratch, norm.name, group, after)
    places: dict[tuple[str, int], list[Member]] = {}
    for member in group.members:
        known = places.setdefault((member.name, member.axis), [])
        if all((member.repeat, member.offset) != (other.repeat, other.offset) for other in known):
            known.append(member)
    roles: dict[tuple[str, int], set[str]] = {}
    for member in group.members:
        roles.setdefault((member.name, member.axis), set()).add(member.role)
    said: set[Number] = set()
    norms = {norm.name for norm in group.norms}
    for (name, axis), members in places.items():
        tensor = tensor_of(module, name)
        where = sorted((m.offset + group.size * m.repeat, added * m.repeat) for m in members)
        owner, _, leaf = name.rpartition(".")
        if owner in norms:
            # What a norm makes of the new lanes is zero, whatever its gain.
            fill = "zero" if leaf == "bias" else "mean"
        else:
            fill = _fill(roles[name, axis], kinds)
        yield Widen(name, axis, tuple(where), fill)
        size = tensor.shape[axis]
        numbers = owned_sizes(module, name, axis, size, size + sum(count for _, count in where))
        yield from (number for number in numbers if number not in said)
        said.update(numbers)


def _fill(roles: set[str], kinds: set[str]) -> str:
    """Return what new lanes of a tensor hold, by what it does with them and which norms follow."""
    if kinds:
        neutral = "zero" if kinds == {"rms"} else "mean"
        return "like" if roles == {"reader"} else neutral
    return "zero" if "reader" in roles else "like" if "writer" in roles else "mean"


def _rescaled(scratch: Scratch, name: str, group: LaneGroup, after: int) -> Iterator[Edit]:
    """Yield what makes a norm of more lanes answer as before: gain and epsilon."""
    norm = scratch.module.get_submodule(name)
    gains = [
        member.name
        for member in group.members
        if member.role == "pointwise" and member.name.rpartition(".")[0] == name and not member.name.endswith("bias")
    ]
    if not gains:
        raise GrowthRefusedError(
            f"The norm {name} has no gain.",
            "Expected one: it has to take back what more lanes do to the statistics.",
            "Grow another part, or give the norm a gain.",
        )
    yield Scale(gains[0], math.sqrt(group.size / after), _silent_gain(scratch, norm, name, gains[0]))
    for attribute in EPSILON:
        held = norm.__dict__.get(attribute)
        if isinstance(held, float) and held > 0:
            yield Number(name, (attribute,), held, held * group.size / after)
            return


def _silent_gain(scratch: Scratch, norm: nn.Module, name: str, gain: str) -> float:
    """Return the value of a gain at which its norm answers its shift alone: 0, or -1 where code adds it to one."""
    held = tensor_of(scratch.module, gain)
    kept = held.detach().clone()
    answers: dict[float, float] = {}

    def note(where: str, child: nn.Module, given: object, output: object) -> None:
        if child is norm and (answer := first_tensor(output)) is not None:
            answers[value] = float((answer - answer.flatten(0, -2)[0]).abs().max())

    try:
        for value in (0.0, -1.0):
            held.data.fill_(value)
            with torch.no_grad(), observe(scratch.module, note):
                scratch.adapter.logits(scratch.inputs)
    finally:
        held.data.copy_(kept)
    silent = [value for value, spread in answers.items() if spread == 0.0]
    if not silent:
        raise GrowthRefusedError(
            f"The gain {gain} of the norm {name} does not multiply what the norm makes.",
            "Expected a gain at which nothing but a shift is left, 0 or -1.",
            "Grow another part.",
        )
    return silent[0]
