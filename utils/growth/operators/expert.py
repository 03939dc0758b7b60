"""Add an expert to a mixture: a copy of a used one, behind a router that cannot choose it yet.

With top-k routing an expert that enters the k displaces another, and a softmax over all experts gives away a share to
each: a duplicate or a silent expert is not exact (measured: the output changes by half of its size). It is exact, bit
for bit, when the router adds a number to each expert's score and the new one's is `CLOSED`: it is never among the k,
and its share of a softmax is zero. Then it gets no gradient either, so whoever trains the model raises that number step
by step until tokens arrive; the plan's reasons name the tensor and the entry (`opening`). A router without such a
number is refused.

Experts are found by what they do, not by name: alike modules in an nn.ModuleList, or tensors with one slice per expert,
beside a matrix and a vector with one row per expert. Whether it is a mixture shows on a copy: with its number at
`CLOSED` the new expert changes nothing, and with a large one instead it is used, changes the output and gets a
gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.adapters.structure import Structure
from utils.growth.edits import Edit, GrowthRefusedError, InsertBlock, Plan, Widen
from utils.growth.numbers import owned_sizes, settled
from utils.growth.request import Request
from utils.growth.scratch import Scratch
from utils.growth.surgery import Surgery
from utils.runtime.printing import captured_output
from utils.runtime.seeding import isolated_streams

CLOSED = -1e4
"""What a router adds to the score of a new expert: out of reach of every score, and finite in half precision."""
WORDS = ("experts", "n_expert", "num_expert")
"""How the names end of numbers that count experts."""
Check = Callable[[Surgery], str | None]


@dataclass(frozen=True)
class Mixture:
    """Experts and their router."""

    name: str
    """The innermost module that holds both."""
    experts: int
    """How many."""
    container: str | None
    """The nn.ModuleList of the experts; None where they are slices of tensors."""
    stacked: tuple[str, ...]
    """Tensors with one slice per expert along their first axis."""
    weight: tuple[str, ...]
    """The router's matrices."""
    bias: tuple[str, ...]
    """Vectors that may be added to the scores."""


def plan_expert(scratch: Scratch, found: Structure, request: Request) -> Plan:
    """Plan one more expert in every mixture, or in one.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        request: How many experts, and in which block or module.

    Raises:
        GrowthRefusedError: There is no mixture, or its router cannot keep a new expert out.
    """
    mixtures = _chosen(list(_mixtures(scratch.module, found)), found, request)
    sizes = {mixture.experts for mixture in mixtures}
    if len(sizes) > 1:
        raise GrowthRefusedError(
            f"The mixtures have {', '.join(map(str, sorted(sizes)))} experts.",
            "Expected mixtures of one size, or one of them named by `where`.",
            f"Name one of {', '.join(mixture.name or 'the model itself' for mixture in mixtures)}.",
        )
    before = sizes.pop()
    added = request.added(before, "experts")
    lacking = [mixture for mixture in mixtures if not mixture.bias]
    if lacking:
        raise GrowthRefusedError(
            f"The router of {lacking[0].name or 'the model'} has no number of its own for each expert, and without one "
            "nothing keeps a new expert from displacing another.",
            "Expected a bias with one entry per expert, in the router's linear layer or added to its scores.",
            "Give the router's linear layer a bias of zeros, which changes nothing, or grow the feed-forward width.",
        )
    problems: list[str] = []
    for choice in range(max(len(mixture.bias) for mixture in mixtures)):
        edits, reasons, used = _edits(scratch, mixtures, added, choice)
        where = tuple(mixture.name for mixture in mixtures)
        plan = Plan("expert", where, tuple(edits), before, before + added, "exact", None, tuple(reasons))
        try:
            also = _opens(scratch, edits, used, before)
            return settled(scratch, plan, [(before, before + added)], WORDS, also, learns=False)
        except GrowthRefusedError as error:
            problems.append(error.found.rstrip("."))
    raise GrowthRefusedError(
        f"No expert can be added to {mixtures[0].name or 'the model'}: {'; '.join(dict.fromkeys(problems))}.",
        "Expected a router whose bias decides whether an expert is used.",
        "Grow the feed-forward width.",
    )


def opening(plan: Plan) -> list[tuple[str, int]]:
    """Return which entries of which tensors hold a plan's new experts back: (name, first new entry)."""
    return [
        (edit.name, edit.places[0][0])
        for edit in plan.edits
        if isinstance(edit, Widen) and edit.fill == "value" and edit.value == CLOSED
    ]


def _mixtures(module: nn.Module, found: Structure) -> Iterator[Mixture]:
    """Yield what may be a mixture of experts."""
    blocks = {name for stack in found.stacks.value for name in stack}
    for name, child in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(child, nn.ModuleList) and len(child) > 1 and f"{prefix}0" not in blocks:
            shapes = [[tuple(p.shape) for p in expert.parameters()] for expert in child]
            if shapes[0] and all(shape == shapes[0] for shape in shapes):
                yield from _with_router(module, name, len(child), name, ())
        stacked = [key for key, p in child.named_parameters(recurse=False) if p.dim() == 3]
        sizes = {child.get_parameter(key).shape[0] for key in stacked}
        if len(stacked) > 1 and len(sizes) == 1:
            experts = sizes.pop()
            beside = [
                key
                for key, p in child.named_parameters(recurse=False)
                if p.dim() in (2, 3) and p.shape[0] == experts and key != "weight"
            ]
            yield from _with_router(module, name, experts, None, tuple(prefix + key for key in beside))


def _with_router(
    module: nn.Module, name: str, experts: int, container: str | None, stacked: tuple[str, ...]
) -> Iterator[Mixture]:
    """Yield a mixture when a matrix with one row per expert is near, in the module around or the one around that."""
    around = name.rpartition(".")[0] if container is not None or name else name
    for _ in range(2):
        prefix = f"{around}." if around else ""
        inside = f"{name}."
        weight, bias = [], []
        child = module.get_submodule(around)
        for key, tensor in (*child.named_parameters(), *child.named_buffers()):
            full = f"{prefix}{key}"
            own = full in stacked or (container is not None and full.startswith(inside))
            if own or not tensor.is_floating_point() or key.count(".") > 2:
                continue
            if tensor.dim() == 2 and tensor.shape[0] == experts and isinstance(tensor, nn.Parameter):
                weight.append(full)
            elif tuple(tensor.shape) == (experts,):
                bias.append(full)
        if weight:
            yield Mixture(around, experts, container, stacked, tuple(weight[:1]), tuple(bias))
            return
        if not around:
            return
        around = around.rpartition(".")[0]


def _chosen(mixtures: list[Mixture], found: Structure, request: Request) -> list[Mixture]:
    """Return the mixtures that were asked for."""
    if not mixtures:
        raise GrowthRefusedError(
            "There is no mixture of experts.",
            "Expected alike modules in an nn.ModuleList, or tensors with a slice per expert, and a router beside them.",
            "Grow the feed-forward width.",
        )
    where = request.place(found.blocks.value)
    if where is None:
        return mixtures
    inside = [mixture for mixture in mixtures if f"{mixture.name}.".startswith(f"{where}.")]
    if not inside:
        raise GrowthRefusedError(
            f"There is no mixture of experts in {where!r}.",
            f"Expected one of {', '.join(m.name or 'the model itself' for m in mixtures)}.",
            "Name one of these, or leave where at None.",
        )
    return inside


def _edits(
    scratch: Scratch, mixtures: list[Mixture], added: int, choice: int
) -> tuple[list[Edit], list[str], list[str]]:
    """Return the edits, why, and the modules that are new, with one of the vectors as the number that keeps out."""
    edits: list[Edit] = []
    reasons: list[str] = []
    used: list[str] = []
    for mixture in mixtures:
        source = _busiest(scratch, mixture)
        place = ((mixture.experts, added),)
        if mixture.container is not None:
            for number in range(added):
                at = mixture.experts + number
                edits.append(InsertBlock(mixture.container, at, source, ()))
                used.append(f"{mixture.container}.{at}")
        for name in mixture.stacked:
            edits.append(Widen(name, 0, place, "copy", float(source)))
        for name in mixture.weight:
            edits.append(Widen(name, 0, place, "copy", float(source)))
            edits += owned_sizes(scratch.module, name, 0, mixture.experts, mixture.experts + added)
        closing = mixture.bias[min(choice, len(mixture.bias) - 1)]
        for name in mixture.bias:
            edits.append(Widen(name, 0, place, "value", CLOSED) if name == closing else Widen(name, 0, place, "zero"))
        reasons.append(
            f"a copy of expert {source} of {mixture.name}; {closing}[{mixture.experts}:] begins at {CLOSED:g}, and "
            "training has to raise it until tokens arrive"
        )
    return edits, reasons, used


def _busiest(scratch: Scratch, mixture: Mixture) -> int:
    """Return the expert that gets most tokens of the example; the last one where experts are slices of tensors."""
    if mixture.container is None:
        return mixture.experts - 1
    seen = [0] * mixture.experts
    handles = []
    for number, child in enumerate(scratch.module.get_submodule(mixture.container).children()):

        def hook(_module: nn.Module, args: tuple[object, ...], number: int = number) -> None:
            given = next((value for value in args if isinstance(value, Tensor)), None)
            seen[number] += 1 if given is None else given[..., 0].numel()

        handles.append(child.register_forward_pre_hook(hook))
    try:
        with torch.no_grad(), captured_output(), isolated_streams("growth"):
            scratch.adapter.logits(scratch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return max(range(mixture.experts), key=lambda number: (seen[number], number))


def _opens(scratch: Scratch, edits: Sequence[Edit], used: Sequence[str], before: int) -> Check:
    """Check that the number that keeps new experts out is what does so.

    With a large number instead of `CLOSED` each of them has to get a gradient.
    """
    closing = [edit.name for edit in edits if isinstance(edit, Widen) and edit.fill == "value"]
    copied = [edit.name for edit in edits if isinstance(edit, Widen) and edit.fill == "copy"]

    def check(_surgery: Surgery) -> str | None:
        tensors = {**dict(scratch.module.named_parameters()), **dict(scratch.module.named_buffers())}
        stacked = [tensors[name] for name in copied if tensors[name].dim() == 3]
        made = [list(scratch.module.get_submodule(name).parameters()) for name in used]
        wanted = {id(p): p for p in (*stacked, *(p for group in made for p in group)) if p.requires_grad}
        for name in closing:
            tensors[name].data[before:] = -CLOSED
        try:
            output = scratch.adapter.logits(scratch.inputs)
            weights = torch.linspace(0.5, 1.5, output.numel()).reshape(output.shape).to(output)
            if not wanted:
                return None
            gradients = torch.autograd.grad((output * weights).sum(), list(wanted.values()), allow_unused=True)
        finally:
            for name in closing:
                tensors[name].data[before:] = CLOSED
        known = {key: gradient for key, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
        alive = [bool(known[id(t)][before:].flatten(1).abs().sum(1).gt(0).any()) for t in stacked if id(t) in known]
        alive += [any(bool(known[id(p)].abs().sum() > 0) for p in group if id(p) in known) for group in made]
        return None if alive and all(alive) else "an expert whose number is large gets no gradient"

    return check
