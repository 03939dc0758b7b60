"""Insert blocks that begin as the identity.

A pre-norm block is ``x + f(x)``; with the matrices and biases that write f's branches into the stream at zero it
returns x, bit for bit (Gesmundo & Maile, arXiv:2308.06103, layer addition; Staged Training, Shen et al.,
arXiv:2203.06211). Which tensors those are is found on a copy: with all of a block's tensors at zero it is the identity
or it never is; then each gets its values back, the earliest first, unless the block stops being the identity. What is
left are the last writers of each branch, and exactly one side of each branch is zero, so that it learns.

A post-norm block is ``n2(h + g(h))`` with ``h = n1(x + f(x))``. Its input is the output of a norm with gain a and shift
b, and a norm of that is not the same again. But a norm without gain and shift is, up to its epsilon, so the gain and
shift of the block in front move into the new block's last norm, and all norms between begin at one and zero.

What is neither gets a gate (`utils.growth.gated_block`). A model without blocks is a chain (`layers`).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.adapters.structure import Structure, lone_blocks
from utils.growth.certificate import DOUBLE_BOUND, EPSILON_BOUND
from utils.growth.edits import Edit, Gate, GrowthRefusedError, InsertBlock, KeepBlocks, Overwrite, Plan
from utils.growth.numbers import counts, renumbered
from utils.growth.operators.layers import plan_layers
from utils.growth.request import Request
from utils.growth.scratch import Scratch, identity_error
from utils.growth.surgery import Surgery

IDENTITY = 1e-6
"""Largest change of the stream, as a share of its size, by a block that counts as the identity."""


def plan_depth(scratch: Scratch, found: Structure, request: Request) -> Plan:
    """Plan the insertion of blocks.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        request: How many blocks, and behind which.

    Raises:
        GrowthRefusedError: There is no stack of blocks, or none of the ways to insert one keeps the function.
    """
    chain: GrowthRefusedError | None = None
    if not found.stacks.value and not lone_blocks(scratch.module):
        try:
            return plan_layers(scratch, request)
        except GrowthRefusedError as error:
            if isinstance(request.where, str):
                raise
            chain = error
    try:
        stack, place = _chosen(scratch.module, found, request)
    except GrowthRefusedError as error:
        raise GrowthRefusedError(
            f"{error.found} {chain.found}" if chain else error.found, error.expected, error.action
        ) from None
    container, numbers = _container(scratch.module, stack)
    added = request.added(len(stack), "blocks")
    source, last = numbers[place], stack[place]
    made = [f"{container}.{source + 1 + i}".lstrip(".") for i in range(added)]
    problems: list[str] = []
    for promise, edits, reason in _ways(scratch, found, last, container, source, added, request):
        bound = EPSILON_BOUND if promise == "bounded" else DOUBLE_BOUND
        plan = Plan("depth", tuple(made), tuple(edits), len(stack), len(stack) + added, promise, None,
                    (found.stacks.reason, reason), bound)  # fmt: skip
        for numbered in renumbered(scratch.module, plan, stack, place, added):
            for complete in counts(scratch.module, numbered, len(stack), len(stack) + added):
                trial = scratch.attempt(complete, must_run=made, also=_alive(scratch, complete))
                if trial.problem is None:
                    return complete
                problems.append(trial.problem)
    raise GrowthRefusedError(
        f"No block can be inserted behind {last}: {'; '.join(dict.fromkeys(problems)) or 'it hands on another shape'}.",
        "Expected blocks that add to what they are given, or that can be gated.",
        "Grow the width instead.",
    )


def plan_beginning(scratch: Scratch, found: Structure, blocks: int) -> Plan:
    """Plan to begin with the first blocks of a stack only; what the model computes changes.

    Args:
        scratch: A copy of the model.
        found: Its parts.
        blocks: How many stay.

    Raises:
        GrowthRefusedError: There are no more than these, or the model does not run without the others.
    """
    stack, _ = _chosen(scratch.module, found, Request("depth", 1))
    container, places = _container(scratch.module, stack)
    if blocks >= len(stack):
        raise GrowthRefusedError(
            f"begin_blocks is {blocks}, and the model has {len(stack)} blocks.",
            f"Expected a number from 1 to {len(stack) - 1}.",
            "Set begin_blocks to one of these, or leave it at None.",
        )
    cut = KeepBlocks(container, places[blocks], places[-1] + 1)
    plan = Plan("depth", (container,), (cut,), len(stack), blocks, "anew", None, (found.blocks.reason,))
    problem = ""
    for complete in counts(scratch.module, plan, len(stack), blocks):
        trial = scratch.attempt(complete)
        if trial.ran:
            return complete
        problem = problem or trial.problem or ""
    raise GrowthRefusedError(
        f"The model does not run with {blocks} of its {len(stack)} blocks: {problem}.",
        "Expected blocks that can be left out.",
        "Leave begin_blocks at None.",
    )


def _chosen(module: nn.Module, found: Structure, request: Request) -> tuple[list[str], int]:
    """Return the stack, and the place in it of the block behind which the new ones go."""
    stacks = found.stacks.value or [[name] for name in lone_blocks(module)]
    if not stacks:
        for name, child in module.named_modules():
            if isinstance(child, nn.ModuleList) and len(set(child)) < len(child):
                raise _several_times(name)
        raise GrowthRefusedError(
            f"There are no repeated blocks: {found.stacks.reason}.",
            "Expected blocks in an nn.ModuleList, or at least two alike children of one container.",
            "Grow the width instead.",
        )
    main = found.blocks.value or stacks[0]
    if request.where is None:
        return main, len(main) - 1
    if isinstance(request.where, int):
        if not -len(main) <= request.where < len(main):
            raise GrowthRefusedError(
                f"Block {request.where} was asked for, and there are {len(main)}.",
                f"Expected a number from 0 to {len(main) - 1}.",
                "Set where to one of these, or leave it at None.",
            )
        return main, request.where % len(main)
    for stack in stacks:
        if request.where in stack:
            return stack, stack.index(request.where)
    known = ", ".join(name for stack in stacks for name in stack)
    raise GrowthRefusedError(
        f"There is no block {request.where!r}.",
        f"Expected one of {known}.",
        "Name one of these, or leave where at None.",
    )


def _container(module: nn.Module, stack: Sequence[str]) -> tuple[str, list[int]]:
    """Return the name of what holds a stack, and the places of the blocks in it."""
    container = stack[0].rpartition(".")[0]
    names = list(module.get_submodule(container)._modules)
    children = list(module.get_submodule(container)._modules.values())
    if names != [str(number) for number in range(len(names))]:
        raise GrowthRefusedError(
            f"The blocks of {container or 'the model'} are attributes with their own names ({', '.join(names[:4])}).",
            "Expected an nn.ModuleList or nn.Sequential: code that names each block would never call a new one.",
            "Put the blocks into an nn.ModuleList.",
        )
    if len({id(child) for child in children}) < len(children):
        raise _several_times(container)
    return container, [int(name.rpartition(".")[2]) for name in stack]


def _several_times(container: str) -> GrowthRefusedError:
    """Return the refusal of a container whose blocks are one and the same."""
    return GrowthRefusedError(
        f"{container} holds one block several times.",
        "Expected blocks of their own: a copy would share nothing with the others, and they would not grow.",
        "Build each block anew, as in nn.ModuleList(make() for _ in range(n)), or grow the width.",
    )


def _ways(
    scratch: Scratch, found: Structure, last: str, container: str, source: int, added: int, request: Request
) -> Iterator[tuple[str, list[Edit], str]]:
    """Yield the ways to insert blocks behind one, the most exact first: promise, edits and why."""
    block = scratch.module.get_submodule(last)
    args, kwargs = scratch.block_call(last)
    zeroed = writers(block, args, kwargs)

    def inserted(zero: Sequence[str]) -> list[Edit]:
        return [InsertBlock(container, source + 1, source, tuple(zero), request.drawn) for _ in range(added)]

    if zeroed:
        yield "exact", inserted(zeroed), f"with {', '.join(zeroed[:4])} at zero the block returns its input"
    norms = [name for name in found.norms.value if name.startswith(f"{last}.")]
    post = None if zeroed else _post_norm(block, args, kwargs, last, norms)
    if post is not None:
        inner, outer, zero = post
        edits = inserted(zero)
        for number in range(added + 1):
            at = f"{container}.{source + number}".lstrip(".")
            # The last of the new blocks keeps the gain and shift of the block in front.
            flat = [*([] if number == 0 else inner), *([outer] if number < added else [])]
            edits += [edit for name in flat for edit in _flattened(block, name, at)]
        yield "bounded", edits, f"post-norm: the gain and shift of {last}.{outer} move behind the new block"
    if request.gated:
        edits = inserted(())
        edits += [Gate(container, source + 1 + i) for i in range(added)]
        yield "gated", edits, "a gate that begins at zero multiplies what the block changes"


def writers(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Return the tensors of a block with which at zero it returns its input; empty when there are none.

    The block is in eval mode and comes back as it was.
    """
    order = _in_order(block, args, kwargs)
    kept = {name: block.get_parameter(name).detach().clone() for group in order for name in group}
    try:
        for group in order:
            _set(block, group, None)
        if identity_error(block, args, kwargs) > IDENTITY:
            return []
        zeroed: list[str] = []
        shown = _shown(kept)
        for group in order:
            _set(block, group, shown)
            if identity_error(block, args, kwargs) > IDENTITY:
                _set(block, group, None)
                zeroed += _needed(block, args, kwargs, group, shown, IDENTITY)
        return zeroed
    finally:
        for group in order:
            _set(block, group, kept)


def _in_order(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[str]]:
    """Return the names of a block's parameters by the module that holds them, in the order of their first use."""
    uses = _Uses()
    with uses:
        identity_error(block, args, kwargs)
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, parameter in block.named_parameters():
        if parameter.is_floating_point():
            groups.setdefault(name.rpartition(".")[0], []).append((uses.order.get(id(parameter), -1), name))
    return [[name for _, name in group] for group in sorted(groups.values())]


class _Uses(TorchFunctionMode):
    """Notes when each parameter is used for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.order: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, nn.Parameter):
                self.order.setdefault(id(value), len(self.order))
        return func(*args, **(kwargs or {}))


def _set(block: nn.Module, names: Sequence[str], values: dict[str, Tensor] | None) -> None:
    """Set parameters of a block to values, or to zero."""
    for name in names:
        parameter = block.get_parameter(name).data
        if values is None:
            parameter.zero_()
        else:
            parameter.copy_(values[name])


def _post_norm(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], last: str, norms: Sequence[str]
) -> tuple[list[str], str, list[str]] | None:
    """Return, for a block whose answer a norm makes, its other norms, that norm, and what is to be zero.

    On a stream that is normalized already, a block of norms without gain and shift is the identity; what else has to be
    zero for that is found as for any other block.
    """
    own = [name.removeprefix(f"{last}.") for name in norms]
    own = [name for name in own if any(True for _ in block.get_submodule(name).parameters())]
    if not own:
        return None
    kept = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    try:
        for name in own:
            for leaf, parameter in block.get_submodule(name).named_parameters():
                parameter.data.fill_(0.0 if leaf.endswith("bias") else 1.0)
        outer = own[-1]
        stream: list[Tensor] = []
        handle = block.get_submodule(outer).register_forward_hook(lambda _m, _i, output: stream.append(output))
        identity_error(block, args, kwargs)
        handle.remove()
        if not stream:
            return None
        # Its own answer, which the norm has just normalized, is such a stream.
        normal, named = args, dict(kwargs)
        if args:
            normal = (stream[-1].detach(), *args[1:])
        else:
            first = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
            if first is None:
                return None
            named[first] = stream[-1].detach()
        tensors = {f"{name}.{leaf}" for name in own for leaf, _ in block.get_submodule(name).named_parameters()}
        zeroed = _writers_but(block, normal, named, tensors)
        return (own[:-1], outer, zeroed) if zeroed else None
    finally:
        for name, value in kept.items():
            block.get_parameter(name).data.copy_(value)


def _writers_but(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], norms: set[str]) -> list[str]:
    """As `writers`, with the norms left as they are, and up to their epsilon."""
    order = [group for group in _in_order(block, args, kwargs) if not set(group) & norms]
    kept = {name: block.get_parameter(name).detach().clone() for group in order for name in group}
    for group in order:
        _set(block, group, None)
    floor = max(identity_error(block, args, kwargs), IDENTITY)
    if floor > 1e-4:
        return []
    zeroed: list[str] = []
    shown = _shown(kept)
    for group in order:
        _set(block, group, shown)
        if identity_error(block, args, kwargs) > 2 * floor:
            _set(block, group, None)
            zeroed += _needed(block, args, kwargs, group, shown, 2 * floor)
    return zeroed


def _shown(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return values for a trial: what is zero just now, such as a fresh bias, counts as if it were not."""
    return {name: value if bool(value.any()) else torch.full_like(value, 0.1) for name, value in kept.items()}


def _needed(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    group: Sequence[str],
    kept: dict[str, Tensor],
    bound: float,
) -> list[str]:
    """Give back the tensors of one module, the earliest first, that may have values while the others are zero.

    A module may hold both sides of a branch, as stacked experts do; with both at zero nothing would ever learn.
    """
    zeroed = []
    for name in group:
        _set(block, [name], kept)
        if identity_error(block, args, kwargs) > bound:
            _set(block, [name], None)
            zeroed.append(name)
    return zeroed


def _alive(scratch: Scratch, plan: Plan) -> Callable[[Surgery], str | None]:
    """Check that every tensor of a new block that begins at zero gets a gradient, and that each is read at all.

    Some blocks hold what only the first of a stack needs, such as a table of distances; a copy of it would be dead.
    Where alike modules stand beside each other, such as experts, one of them is enough: a token visits few.
    """
    names = {
        f"{edit.container}.{edit.index}.{name}".lstrip(".")
        for edit in plan.edits
        if isinstance(edit, InsertBlock)
        for name in edit.zeroed
    }

    def check(_surgery: Surgery) -> str | None:
        parameters = {name: p for name, p in scratch.module.named_parameters() if name in names and p.requires_grad}
        uses = _Uses()
        with uses:
            output = scratch.adapter.logits(scratch.inputs)
        unread = _unread(scratch.module, plan, uses)
        if unread:
            return f"{unread} of the new block would never be read"
        if not parameters or not output.requires_grad:
            return None
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        finite = torch.isfinite(output)
        total = (output * weights)[finite].sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        alive: dict[str, bool] = {}
        for name, gradient in zip(parameters, gradients, strict=True):
            kind = re.sub(r"\d+", "", name)
            alive[kind] = alive.get(kind, False) or (gradient is not None and bool((gradient != 0).any()))
        dead = [kind for kind, learns in alive.items() if not learns]
        return f"no gradient reaches {dead[0]} of the new block" if dead else None

    return check


def _unread(module: nn.Module, plan: Plan, uses: _Uses) -> str | None:
    """Return a tensor that a forward pass reads in a block and not in those that are modelled on it."""

    def read(number: int) -> set[str]:
        block = module.get_submodule(f"{inserts[0].container}.{inserts[0].source + number}".lstrip("."))
        named = ((name.removeprefix("block."), parameter) for name, parameter in block.named_parameters())
        return {re.sub(r"\d+", "N", name) for name, parameter in named if id(parameter) in uses.order}

    inserts = [edit for edit in plan.edits if isinstance(edit, InsertBlock)]
    # The new blocks stand behind the one that they are modelled on.
    made = set().union(*(read(number) for number in range(1, len(inserts) + 1)))
    return next(iter(sorted(read(0) - made)), None)


def _flattened(block: nn.Module, name: str, at: str) -> Iterator[Overwrite]:
    """Yield the edits that let a norm begin without gain and shift."""
    for leaf, _ in block.get_submodule(name).named_parameters():
        yield Overwrite(f"{at}.{name}.{leaf}", 0.0 if leaf.endswith("bias") else 1.0)
