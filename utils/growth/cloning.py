"""Clones of a model for a domain: a copy in full, from a cut on, or a low-rank correction.

What is shared is found by what the cut's answer depends on, never by names. A clone begins as exactly the same function
(certified, bit for bit) and keeps where it comes from in a `CloneRecord`.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import first_tensor, observe
from utils.adapters.structure import blocks
from utils.growth.certificate import answers, certify
from utils.growth.clone_record import MODES, TRUNKS, CloneError, CloneRecord, DomainClone, build, freeze, own_tensors
from utils.growth.lineage import lineage_of
from utils.growth.low_rank import LowRank, require_felt, targets_of
from utils.training.weights import weights_sha256

SAMPLES = 3
"""Samples on which a clone is compared with its parent."""


def clone_for_domain(
    model: Any,
    domain: str,
    mode: str = "full",
    *,
    cut: int | str | None = None,
    trunk: str = "frozen",
    untie: bool = False,
    low_rank: LowRank | None = None,
    seed: int = 0,
) -> DomainClone:
    """Make a model for one domain that begins as exactly the same function.

    Args:
        model: A module, a loaded model or an adapter (with a spec where the inputs cannot be guessed).
        domain: What the clone is for.
        mode: ``"full"``: a copy that shares nothing. ``"partial"``: the parameters on which the cut's answer depends
            are shared, the others (last blocks, head) are copied. ``"light"``: all parameters are shared, and low-rank
            corrections (LoRA) are added to the projections of attention and feed-forward.
        cut: For partial clones: how many blocks of the largest stack are shared (default: half of them), or the name
            of the last shared module where there are no blocks.
        trunk: ``"frozen"``: what is shared trains no more, in the parent neither (`thaw` undoes that). ``"joint"``,
            for partial clones: training it through one clone changes the parent and every other clone.
        untie: For partial clones: a head that is tied to a shared embedding becomes a copy of its own.
        low_rank: Settings of a light clone.
        seed: Of what is drawn for a light clone.

    Raises:
        CloneError: It cannot be done as asked; the message says why, and the parent is as it was.
        LowRankError: The same, for a light clone.
        MissingPackageError: A light clone needs peft.

    Warns:
        UserWarning: The trunk is trained jointly.
    """
    _check(domain, mode, trunk, partial={"cut": cut is not None, "untie": untie}, light={"low_rank": low_rank})
    adapter = model if isinstance(model, ModelAdapter) else ModelAdapter(model)
    parent = adapter.module
    if adapter.lazy:
        raise CloneError(
            f"The parameter {adapter.lazy[0]} has no shape yet.",
            "Expected a model whose parameters all exist.",
            "Run one forward pass on real input first.",
        )
    inputs = adapter.example_inputs(SAMPLES)
    before = answers(adapter, inputs)
    named = dict(parent.named_parameters())
    shared, notes = tuple(named), ["everything is shared"]
    late: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    where = None
    if mode == "full":
        shared, notes = (), ["everything is copied"]
    elif mode == "partial":
        where, shared, late, notes = _below(adapter, inputs, cut, untie)
    else:
        low_rank = low_rank or LowRank()
        targets, found = targets_of(adapter, low_rank)
        notes += found
    reference = getattr(adapter.origin, "reference", None)
    record = CloneRecord(
        domain=domain,
        mode=mode,
        parent=reference if isinstance(reference, str) and reference else adapter.name,
        parent_sha256=weights_sha256(parent),
        parent_parameters=sum(parameter.numel() for parameter in named.values()),
        own_parameters=0,
        shared_parameters=sum(named[name].numel() for name in shared),
        own=late,
        shared=shared,
        trunk=trunk,
        cut=where,
        low_rank=low_rank,
        targets=targets,
        seed=seed,
        growth_events=len(lineage_of(parent)),
        notes=tuple(notes),
    )
    view = copy.copy(adapter)
    view.module = build(parent, record)
    certificate = certify(before, answers(view, inputs), bound=0.0)
    if not (certificate.equal and certificate.passed):
        raise CloneError(
            f"The clone does not answer as {adapter.name} does: {certificate.describe()}.",
            "Expected the same numbers, bit for bit and without nan.",
            "Look for state that forward() changes and that a copy of the module does not take along.",
        )
    if mode == "light":
        require_felt(view, parent, inputs, targets)
    own = own_tensors(view.module, parent)
    distinct = {id(tensor): tensor.numel() for tensor in own.values() if isinstance(tensor, nn.Parameter)}
    if trunk == "joint":
        warn(
            f"The clone for {domain!r} trains {record.shared_parameters:,} parameters jointly: that changes the parent "
            "and every other clone that shares them.",
            stacklevel=2,
        )
    freeze(parent, shared if trunk == "frozen" else ())
    record = replace(record, own=tuple(own), own_parameters=sum(distinct.values()))
    return DomainClone(view.module, parent, record, certificate)


def _check(domain: str, mode: str, trunk: str, partial: Mapping[str, Any], light: Mapping[str, Any]) -> None:
    """Refuse what no model could be cloned with."""
    if not isinstance(domain, str) or not domain.strip():
        raise CloneError(f"The domain is {domain!r}.", "Expected a name.", "Say what the clone is for.")
    for name, value, known in (("mode", mode, MODES), ("trunk", trunk, TRUNKS)):
        if value not in known:
            raise CloneError(
                f"The {name} of a clone is {value!r}.", f"Expected one of {', '.join(known)}.", "Correct it."
            )
    idle = [name for name, value in partial.items() if value and mode != "partial"]
    idle += [name for name, value in light.items() if value and mode != "light"]
    idle += ["trunk='joint'"] if trunk == "joint" and mode != "partial" else []
    if idle:
        raise CloneError(
            f"{idle[0]} was given for a {mode} clone.",
            f"Expected it for a {'light' if idle[0] in light else 'partial'} clone only.",
            "Leave it out, or choose another mode.",
        )


def _below(
    adapter: ModelAdapter, inputs: Mapping[str, Any], cut: int | str | None, untie: bool
) -> tuple[str, tuple[str, ...], tuple[str, ...], list[str]]:
    """Find the parameters on which the answer of a cut depends.

    Returns:
        The module that is the cut, the shared parameters, further names of them that become copies, and the reasons.
    """
    module = adapter.module
    where, members, notes = _cut(module, cut)
    done: list[str] = []
    state: list[Tensor | None] = []
    early: list[set[str]] = []

    def watch(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        done.append(name)
        if name == where and not state:
            state.append(first_tensor(output))
            early.append(set(done))

    named = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    reached: tuple[Tensor | None, ...] = ()
    with adapter.isolated(), torch.enable_grad():
        for parameter in named.values():
            parameter.requires_grad_(True)
        with observe(module, watch):
            adapter.logits(inputs)
        if state and state[0] is not None and state[0].requires_grad:
            reached = torch.autograd.grad(state[0].sum(), list(named.values()), allow_unused=True)
    if not reached:
        raise CloneError(
            f"The answer of {where} depends on no parameter that a gradient reaches.",
            "Expected a module that runs in every forward pass and returns a tensor, after parameters were used.",
            "Choose another cut, or make a full clone.",
        )
    # Parts of a shared block that this input does not reach, such as an expert that was not chosen, belong to it.
    inside = {id(p) for name in members for p in module.get_submodule(name).parameters()}
    inside |= {id(p) for p, gradient in zip(named.values(), reached, strict=True) if gradient is not None}
    shared = tuple(name for name, p in module.named_parameters() if id(p) in inside)
    if len(shared) == len(dict(module.named_parameters())):
        raise CloneError(
            f"All parameters of {adapter.name} are used up to {where}.",
            "Expected some behind the cut, for the clone to have as its own.",
            "Choose an earlier cut, or a light or full clone.",
        )
    notes.append(f"{len(shared)} parameters are shared: a gradient leads from the answer of {where} to them")
    late: list[str] = []
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for group in (names for key, names in groups.items() if key in inside and len(names) > 1):
        behind = [name for name in group if name.rpartition(".")[0] not in early[0] | set(members)]
        if behind and len(behind) < len(group):
            late += behind
    if late:
        how = "becomes a copy" if untie else "stays shared (untie=True makes it a copy)"
        notes.append(f"{', '.join(late)} is tied to a shared parameter and {how}")
    return where, shared, tuple(late) if untie else (), notes


def _cut(module: nn.Module, cut: int | str | None) -> tuple[str, list[str], list[str]]:
    """Return the module that is the cut, the blocks up to it, and the reasons."""
    if isinstance(cut, str):
        if cut not in dict(module.named_modules()) or not cut:
            raise CloneError(
                f"{type(module).__name__} has no module {cut!r} to cut behind.",
                "Expected the full name of a module.",
                "model.named_modules() lists all names.",
            )
        return cut, [cut], [f"{cut} was given as the cut"]
    found = blocks(module)
    count = len(found.value)
    if not count:
        raise CloneError(
            f"{type(module).__name__} has no repeated blocks ({found.reason}).",
            "A cut is counted in blocks.",
            "Give the name of the last shared module as cut=..., or make a full or light clone.",
        )
    number = max(1, count // 2) if cut is None else cut
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= count:
        raise CloneError(
            f"The cut is {cut!r}.",
            f"Expected how many of the {count} blocks are shared, 1 to {count}, or the name of a module.",
            "Correct it, or leave it out for half of them.",
        )
    return found.value[number - 1], found.value[:number], [f"{number} of {count} blocks are shared: {found.reason}"]
