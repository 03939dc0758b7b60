"""Add hidden units to feed-forward pairs: random rows in, zero columns out.

The new units' contribution is zero times whatever they compute (Net2Wider without replication, Chen et al.,
arXiv:1511.05641; Gesmundo & Maile, arXiv:2308.06103, MLP expansion), so the function stays, up to the order in which a
longer sum is added. Their outgoing weights get a gradient in the first step, their incoming ones from the second on.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from utils.adapters.structure import Structure
from utils.adapters.wiring import FeedForward, Projection
from utils.growth.edits import Edit, GrowthRefusedError, Plan, Widen
from utils.growth.numbers import owned_sizes, settled
from utils.growth.request import Request
from utils.growth.scratch import Scratch

WORDS = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "mlp_dim", "ffn_hidden_size", "dim_feedforward")
"""How the names end of numbers that count hidden units."""


def plan_feed_forward(scratch: Scratch, found: Structure, request: Request) -> Plan:
    """Plan more hidden units in one block's feed-forward pair, or in all of them.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        request: How many units, and in which block.

    Raises:
        GrowthRefusedError: There is no such pair, or the function would change.
    """
    pairs = chosen(found.feed_forwards.value, scratch.module, found, request)
    if not pairs:
        raise GrowthRefusedError(
            f"There is no feed-forward pair to widen: {found.feed_forwards.reason}.",
            "Expected two linear layers with an activation between that lead back to the same width.",
            "Grow the depth, or channels.",
        )
    whole = len(pairs) == len(found.feed_forwards.value)
    refusal: GrowthRefusedError | None = None
    if len({pair.hidden for pair in pairs}) == 1:
        try:
            return _planned(scratch, found, request, pairs, whole)
        except GrowthRefusedError as error:
            refusal = error
    kinds: dict[str, list[FeedForward]] = {}
    for pair in pairs:
        kinds.setdefault(re.sub(r"\d+", "N", pair.up.module), []).append(pair)
    # What looks like a pair may be a mixer of another kind, which counts its lanes in other places too.
    able = [pair for kind in kinds.values() if _can(scratch, found, request, kind) for pair in kind]
    sizes = sorted({pair.hidden for pair in able})
    if len(sizes) > 1:
        names = ", ".join(next(p.name or p.up.module for p in able if p.hidden == size) for size in sizes)
        raise GrowthRefusedError(
            f"The feed-forward pairs have {', '.join(map(str, sizes))} hidden units.",
            f"Expected pairs of one size, or one of them named by `where`, such as {names}.",
            "Name one of these by `where`, and grow the others in events of their own.",
        )
    if not able or len(able) == len(pairs):
        raise refusal or _planning_refused(scratch, found, request, pairs)
    plan = _planned(scratch, found, request, able, whole)
    left = ", ".join(dict.fromkeys(pair.name or pair.up.module for pair in pairs if pair not in able))
    return replace(plan, reasons=(*plan.reasons, f"{left} cannot grow so and stay as they are"))


def _can(scratch: Scratch, found: Structure, request: Request, pairs: Sequence[FeedForward]) -> bool:
    """Tell whether alike pairs can grow."""
    try:
        _planned(scratch, found, request, pairs, False)
    except GrowthRefusedError:
        return False
    return True


def _planning_refused(
    scratch: Scratch, found: Structure, request: Request, pairs: Sequence[FeedForward]
) -> GrowthRefusedError:
    """Return why the first of pairs that all cannot grow cannot."""
    try:
        _planned(scratch, found, request, [pair for pair in pairs if pair.hidden == pairs[0].hidden], False)
    except GrowthRefusedError as error:
        return error
    return GrowthRefusedError(
        "The feed-forward pairs cannot grow together.", "Expected pairs of one kind.", "Name one of them by `where`."
    )


def _planned(scratch: Scratch, found: Structure, request: Request, pairs: Sequence[FeedForward], whole: bool) -> Plan:
    """Plan the growth of pairs of one size.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        request: How many units.
        pairs: The pairs.
        whole: No pair stays as it is, so what a config says of their size has to follow.
    """
    hidden = pairs[0].hidden
    added = request.added(hidden, "hidden units")
    edits: list[Edit] = []
    grown: set[str] = set()
    for pair in pairs:
        for projection, fill in ((pair.up, "like"), (pair.gate, "like"), (pair.down, "zero")):
            if projection is not None and projection.weight not in grown:
                grown.add(projection.weight)
                edits += widened(scratch.module, projection, added, fill)
    where = tuple(pair.name or pair.up.module for pair in pairs)
    plan = Plan("feed_forward", where, tuple(edits), hidden, hidden + added, "bounded", None,
                (found.feed_forwards.reason, pairs[0].reason))  # fmt: skip
    numbers = [(hidden, hidden + added), (2 * hidden, 2 * (hidden + added))]
    # A config that other pairs share speaks of these only when all of them grow.
    return settled(scratch, plan, numbers, WORDS, everywhere=whole)


def chosen(pairs: Sequence[FeedForward], module: nn.Module, found: Structure, request: Request) -> list[FeedForward]:
    """Return the pairs of the block or module that was asked for; all when none was."""
    if request.where is None or not pairs:
        return list(pairs)
    name = request.place(found.blocks.value)
    inside = [pair for pair in pairs if f"{pair.up.module}.".startswith(f"{name}.")]
    if not inside:
        raise GrowthRefusedError(
            f"There is no feed-forward pair in {name!r}.",
            f"Expected one of {', '.join(dict.fromkeys(pair.block or pair.name or pair.up.module for pair in pairs))}.",
            "Name one of these, or leave where at None.",
        )
    return inside


def widened(module: nn.Module, projection: Projection, added: int, fill: str) -> list[Edit]:
    """Return the edits that add entries behind each group of a projection's axis, its bias included."""
    weight = module.get_parameter(projection.weight)
    size = weight.shape[projection.axis]
    places = tuple((max(group) + 1, added) for group in sorted(projection.groups))
    after = size + added * len(places)
    edits: list[Edit] = [Widen(projection.weight, projection.axis, places, fill)]
    if projection.bias is not None:
        edits.append(Widen(projection.bias, 0, places, "zero"))
    return [*edits, *owned_sizes(module, projection.weight, projection.axis, size, after)]
