"""Add attention heads: random rows in the projections to queries, keys and values, zero columns in the one behind.

The new heads attend to something and contribute zero times it, so the function stays up to the order in which a longer
sum is added (Gesmundo & Maile, arXiv:2308.06103, head addition). Their columns of the output projection get a gradient
in the first step, all else of them from the second on.

With grouped queries a group grows as a whole: one more key and value head brings as many query heads as the others
serve. Where all query heads share one key and value head, query heads alone are added. The length of a head's vectors
never changes: the scale of the scores and rotary embeddings depend on it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor
from utils.adapters.structure import Structure
from utils.adapters.wiring import AttentionModule, Projection
from utils.growth.edits import Edit, GrowthRefusedError, Plan, Widen
from utils.growth.numbers import owned_sizes, settled
from utils.growth.request import Request
from utils.growth.scratch import Scratch
from utils.runtime.printing import captured_output
from utils.runtime.seeding import isolated_streams

WORDS = ("heads", "n_head", "num_head", "nhead")
"""How the names end of numbers that count heads."""
Places = tuple[tuple[int, int], ...]


def plan_heads(scratch: Scratch, found: Structure, request: Request) -> Plan:
    """Plan more heads in one attention, or in all self-attentions of the largest stack.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        request: How many query heads, and where.

    Raises:
        GrowthRefusedError: There is no attention that can grow so, or the function would change.
    """
    attentions = [_complete(scratch.module, attention) for attention in _chosen(scratch, found, request)]
    for attention in attentions:
        _growable(scratch.module, attention)
    kinds = {(a.heads, a.kv_heads, a.head_dim) for a in attentions}
    if len(kinds) > 1:
        raise GrowthRefusedError(
            f"The attentions have {', '.join(f'{heads} heads of {dim}' for heads, _, dim in sorted(kinds))}.",
            "Expected attentions of one size, or one of them named by `where`.",
            f"Name one of {', '.join(attention.name or 'the model itself' for attention in attentions)}.",
        )
    heads, kv_heads, _ = kinds.pop()
    added = request.added(heads, "heads")
    each = heads // kv_heads
    if kv_heads > 1 and (heads % kv_heads or added % each):
        raise GrowthRefusedError(
            f"{added} more heads were asked for, and each key and value head serves {each} query heads.",
            f"Expected a multiple of {each}: groups grow as a whole.",
            f"Set amount to {-(-added // each) * each}.",
        )
    new_kv = added // each if kv_heads > 1 or heads == 1 else 0
    sizes = _sizes(scratch.module, attentions[0], added, new_kv)
    # A config that other attentions share speaks of these only when all of them grow.
    everywhere = len(attentions) == len(found.attentions.value)
    refusal: GrowthRefusedError | None = None
    for edits, how in _ways(scratch.module, attentions, added, new_kv):
        reason = f"{added} query and {new_kv} key and value heads more, with zero columns of the output projection{how}"
        plan = Plan("heads", tuple(a.name for a in attentions), tuple(edits), heads, heads + added, "bounded", None,
                    (found.attentions.reason, attentions[0].reason, reason))  # fmt: skip
        try:
            return settled(scratch, plan, sizes, WORDS, everywhere=everywhere)
        except GrowthRefusedError as error:
            refusal = refusal or error
    assert refusal is not None
    hint = _hint(scratch.module, attentions[0], found)
    raise GrowthRefusedError(refusal.found, refusal.expected, hint or refusal.action)


def _chosen(scratch: Scratch, found: Structure, request: Request) -> list[AttentionModule]:
    """Return the attentions that were asked for: self-attentions, unless another is named."""
    attentions, blocks = found.attentions.value, found.blocks.value
    if not attentions:
        raise GrowthRefusedError(
            f"There is no attention: {found.attentions.reason}.",
            "Expected a softmax of a product of queries and keys that weights values.",
            "Grow the depth or the feed-forward width.",
        )
    where = request.place(blocks)
    if where is None:
        inside = [a for a in attentions if a.block in blocks] or list(attentions)
    else:
        named = [a for a in attentions if a.name == where]
        inside = named or [a for a in attentions if f"{a.name}.".startswith(f"{where}.")]
        if named:
            return named
    if not inside:
        raise GrowthRefusedError(
            f"There is no attention in {where!r}.",
            f"Expected one of {', '.join(a.name or 'the model itself' for a in attentions)}.",
            "Name one of these, or leave where at None.",
        )
    return [a for a in inside if _attends_to_itself(scratch, a)] or inside


def _attends_to_itself(scratch: Scratch, attention: AttentionModule) -> bool:
    """Tell whether queries and keys are made from the same tensor."""
    if attention.query is None or attention.key is None or attention.query.module == attention.key.module:
        return True
    given: dict[str, Tensor | None] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.setdefault(name, first_tensor((args, tuple(kwargs.values()))))

        return scratch.module.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(name) for name in (attention.query.module, attention.key.module)]
    try:
        with torch.no_grad(), captured_output(), isolated_streams("growth"):
            scratch.adapter.logits(scratch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    first, second = (given.get(name) for name in (attention.query.module, attention.key.module))
    return first is None or second is None or (first.shape == second.shape and torch.equal(first, second))


def _complete(module: nn.Module, attention: AttentionModule) -> AttentionModule:
    """Fill in keys and values that are repeated on their way: what one weight holds besides its queries."""
    query = attention.query
    if query is None or (attention.key is not None and attention.value is not None) or attention.out is None:
        return attention
    taken = {index for group in query.groups for index in group}
    runs: list[list[int]] = []
    for index in range(module.get_parameter(query.weight).shape[query.axis]):
        if index not in taken:
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([index])
    dim = attention.head_dim
    if not runs or any(len(run) != 2 * dim for run in runs):
        return attention
    key = replace(query, groups=tuple(tuple(run[:dim]) for run in runs), exact=False)
    value = replace(query, groups=tuple(tuple(run[dim:]) for run in runs), exact=False)
    return replace(attention, kv_heads=len(runs), key=key, value=value)


def _growable(module: nn.Module, attention: AttentionModule) -> None:
    """Check that an attention is of a kind to which heads can be added.

    Raises:
        GrowthRefusedError: It is not.
    """
    if isinstance(module.get_submodule(attention.name), nn.MultiheadAttention):
        raise GrowthRefusedError(
            f"{attention.name} is torch's nn.MultiheadAttention, where a head's width is embed_dim / num_heads "
            f"({attention.head_dim} now).",
            "Expected an attention whose heads keep their width when there are more of them.",
            "Grow the depth or the feed-forward width.",
        )
    parts = {"queries": attention.query, "keys": attention.key, "values": attention.value, "results": attention.out}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise GrowthRefusedError(
            f"No linear layer was seen to make the {' or '.join(missing)} of {attention.name}.",
            "Expected one for queries, one for keys, one for values and one that takes the results, apart or fused.",
            "Grow the depth or the feed-forward width.",
        )


def _sizes(module: nn.Module, attention: AttentionModule, added: int, new_kv: int) -> list[tuple[int, int]]:
    """Return what the numbers that depend on the heads are now, and what they become."""
    heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.head_dim
    assert attention.value is not None
    widths = dict.fromkeys((dim, len(attention.value.groups[0])))
    pairs = [(heads, heads + added), (kv_heads, kv_heads + new_kv)]
    for width in widths:
        pairs += [(heads * width, (heads + added) * width), (kv_heads * width, (kv_heads + new_kv) * width)]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]


def _ways(
    module: nn.Module, attentions: Sequence[AttentionModule], added: int, new_kv: int
) -> Iterator[tuple[list[Edit], str]]:
    """Yield the edits: each possible order of the rows, without and then with what else has one entry per head."""
    beside = [edit for attention in attentions for edit in _beside(module, attention, added)]
    for per_group in (True, False):
        edits: list[Edit] = []
        grown: set[str] = set()
        for attention in attentions:
            edits += _widened(module, attention, added, new_kv, per_group, grown)
        if edits and any(isinstance(edit, Widen) and edit.fill == "like" for edit in edits):
            yield edits, ""
            if beside:
                names = ", ".join([edit.name for edit in beside if isinstance(edit, Widen)][:3])
                yield [*edits, *beside], f"; what has an entry per head ({names}) gets the mean of the others"


def _widened(
    module: nn.Module, attention: AttentionModule, added: int, new_kv: int, per_group: bool, grown: set[str]
) -> list[Edit]:
    """Return the edits of one attention's weights; empty when the order of its rows is another one."""
    weights: dict[str, list[tuple[Projection, int]]] = {}
    for projection, count in ((attention.query, added), (attention.key, new_kv), (attention.value, new_kv)):
        assert projection is not None
        if projection.weight not in grown:
            weights.setdefault(projection.weight, []).append((projection, count))
    edits: list[Edit] = []
    for weight, parts in weights.items():
        projection = parts[0][0]
        places = _per_group(parts, attention.kv_heads, new_kv) if per_group else None
        if per_group and places is None and len(parts) > 1 and new_kv and attention.kv_heads == 1:
            return []
        places = places or _per_part(parts)
        if not places:
            continue
        grown.add(weight)
        edits.append(Widen(weight, projection.axis, places, "like"))
        if projection.bias is not None:
            edits.append(Widen(projection.bias, 0, places, "zero"))
        size = module.get_parameter(weight).shape[projection.axis]
        after = size + sum(count for _, count in places)
        edits += owned_sizes(module, weight, projection.axis, size, after)
    out = attention.out
    assert out is not None
    if out.weight not in grown:
        grown.add(out.weight)
        size = module.get_parameter(out.weight).shape[out.axis]
        after = size + added * (size // attention.heads)
        edits.append(Widen(out.weight, out.axis, ((size, after - size),), "zero"))
        edits += owned_sizes(module, out.weight, out.axis, size, after)
    return edits


def _per_group(parts: Sequence[tuple[Projection, int]], kv_heads: int, new_kv: int) -> Places | None:
    """Return where rows go when queries, keys and values of one group lie together; None when they do not."""
    if len(parts) < 3 or not new_kv:
        return None
    groups: list[list[int]] = [[] for _ in range(kv_heads)]
    for projection, _ in parts:
        for number, own in enumerate(projection.groups):
            groups[number * kv_heads // len(projection.groups)] += own
    for rows in groups:
        rows.sort()
    ordered = all(first[-1] < second[0] for first, second in pairwise(groups))
    if not ordered or any(rows[-1] - rows[0] + 1 != len(rows) for rows in groups):
        return None
    return ((groups[-1][-1] + 1, new_kv * len(groups[0])),)


def _per_part(parts: Sequence[tuple[Projection, int]]) -> Places:
    """Return where rows go when each of queries, keys and values has its own rows, head after head or interleaved."""
    counts: dict[int, int] = {}
    for projection, added in parts:
        if not added:
            continue
        last = sorted(projection.groups[-1])
        if last[-1] - last[0] + 1 == len(last):
            counts[last[-1] + 1] = counts.get(last[-1] + 1, 0) + added * len(last)
        else:
            for row in last:
                counts[row + 1] = counts.get(row + 1, 0) + added
    return tuple(sorted(counts.items()))


def _beside(module: nn.Module, attention: AttentionModule, added: int) -> list[Edit]:
    """Return the edits of what else in an attention has one entry per head, such as a table of biases or sinks."""
    parts = (attention.query, attention.key, attention.value, attention.out)
    used = {name for part in parts if part is not None for name in (part.weight, part.bias)}
    prefix = f"{attention.name}." if attention.name else ""
    child = module.get_submodule(attention.name)
    edits: list[Edit] = []
    for name, tensor in (*child.named_parameters(), *child.named_buffers()):
        axes = [axis for axis, size in enumerate(tensor.shape) if size == attention.heads]
        if axes and tensor.is_floating_point() and f"{prefix}{name}" not in used:
            after = attention.heads + added
            edits.append(Widen(f"{prefix}{name}", axes[-1], ((attention.heads, added),), "mean"))
            edits += owned_sizes(module, f"{prefix}{name}", axes[-1], attention.heads, after)
    return edits


def _hint(module: nn.Module, attention: AttentionModule, found: Structure) -> str | None:
    """Say so when a norm inside an attention runs over all of its heads together."""
    wholes = {attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim} - {attention.head_dim}
    for name in found.norms.value:
        sizes = {p.numel() for p in module.get_submodule(name).parameters()}
        if name.startswith(f"{attention.name}.") and sizes & wholes:
            return f"{name} normalizes all heads together, and a new head would change what it divides by."
    return None
