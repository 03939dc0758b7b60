"""Numbers beside the weights that say how large a model is: sizes, counts and places that its code reads.

A plan changes as few of them as keep the model running: those of torch's own layers always, others when the model does
not run, or does not reach what is new, without.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from utils.growth.edits import GrowthRefusedError, InsertBlock, KeepBlocks, Number, Plan
from utils.growth.scratch import Scratch
from utils.growth.surgery import Surgery

MOST_TRIED = 64
"""Combinations of numbers that are tried at most."""
SIZES: Mapping[tuple[type[nn.Module], int], tuple[str, ...]] = {
    (nn.Linear, 0): ("out_features",),
    (nn.Linear, 1): ("in_features",),
    (nn.Embedding, 0): ("num_embeddings",),
    (nn.Embedding, 1): ("embedding_dim",),
    (nn.modules.conv._ConvNd, 0): ("out_channels",),
    (nn.modules.conv._ConvNd, 1): ("in_channels",),
    (nn.modules.conv._ConvTransposeNd, 0): ("in_channels",),
    (nn.modules.conv._ConvTransposeNd, 1): ("out_channels",),
    (nn.modules.batchnorm._NormBase, 0): ("num_features",),
    (nn.GroupNorm, 0): ("num_channels",),
}
"""What torch's layers call the size of their weight along an axis."""


def owned_sizes(module: nn.Module, name: str, axis: int, before: int, after: int) -> list[Number]:
    """Return the numbers of the module that owns a tensor which say its size along an axis.

    Args:
        module: The model.
        name: The tensor.
        axis: Which of its axes grows.
        before: Its size.
        after: Its size then.
    """
    numbers = []
    for owner, leaf in _owners(module, name):
        child = module.get_submodule(owner)
        if isinstance(child, (nn.LayerNorm, nn.RMSNorm)):
            shape = tuple(child.normalized_shape)
            numbers.append(Number(owner, ("normalized_shape",), shape, (*shape[:-1], after)))
        elif leaf == "weight":
            known = [names for (kind, of), names in SIZES.items() if isinstance(child, kind) and of == axis]
            names = known[-1] if known else () if _is_torchs(child) else _unique(child, name, before)
            # Some code puts another table in place of the one that a layer was made with, and leaves its number.
            names = tuple(name for name in names if getattr(child, name, before) == before)
            numbers += [Number(owner, (attribute,), before, after) for attribute in names]
    return numbers


def _owners(module: nn.Module, name: str) -> Iterator[tuple[str, str]]:
    """Yield the modules that hold a tensor, with the names that they have for it."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    for prefix, child in module.named_modules():
        for table in (child._parameters, child._buffers):
            for key, held in table.items():
                if held is tensor:
                    yield prefix, key


def _is_torchs(child: nn.Module) -> bool:
    return type(child).__module__.partition(".")[0] == "torch"


def _unique(child: nn.Module, name: str, size: int) -> tuple[str, ...]:
    """Return the attribute of a layer of the user's own that holds a size, where there is just one."""
    held = [key for key, value in child.__dict__.items() if type(value) is int and value == size]
    return tuple(held) if len(held) == 1 else ()


def candidates(module: nn.Module, owners: Sequence[str], before: int, after: int) -> list[Number]:
    """Return the whole numbers equal to a size that some modules, or the configs they hold, keep."""
    found: list[Number] = []
    seen: set[tuple[int, str]] = set()
    for owner in dict.fromkeys(owners):
        child = module.get_submodule(owner)
        if _is_torchs(child):
            continue
        for path, holder, value in _numbers(child):
            place = id(holder), path[-1]
            if type(value) is int and value == before and place not in seen:
                seen.add(place)
                found.append(Number(owner, path, before, after))
    return found


def _numbers(child: nn.Module) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield the numbers of a module and of the settings that it holds, with their holder."""
    for key, value in child.__dict__.items():
        if key.startswith("_") or key == "training":
            continue
        if type(value) is int:
            yield (key,), child, value
        else:
            yield from _settings((key,), value, 2)


def _settings(path: tuple[str, ...], value: Any, depth: int) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield the numbers of a config, those that it computes and lets one set included, and of configs in it."""
    inner = value if isinstance(value, dict) else None if isinstance(value, type) else getattr(value, "__dict__", None)
    if inner is None or isinstance(value, (nn.Module, Tensor)) or callable(value):
        return
    for name, number in inner.items():
        if not isinstance(name, str) or name.startswith("__"):
            continue
        if type(number) is int:
            yield (*path, name), value, number
        elif depth > 1:
            yield from _settings((*path, name), number, depth - 1)
    for name in () if isinstance(value, dict) else dir(type(value)):
        made = inspect.getattr_static(type(value), name, None)
        if not isinstance(made, property) or made.fset is None or name.startswith("_"):
            continue
        with suppress(Exception):
            if type(number := getattr(value, name)) is int:
                yield (*path, name), value, number


def counts(module: nn.Module, plan: Plan, before: int, after: int) -> Iterator[Plan]:
    """Yield a plan as it is, and then with each combination of numbers that count the blocks, few first.

    Numbers whose names speak of layers or blocks come first: they are what a config counts blocks with. So do lists
    with one entry per block, such as its kind: a new block has the entry of the one it is modelled on.
    """
    container = next(edit.container for edit in plan.edits if isinstance(edit, (InsertBlock, KeepBlocks)))
    inserts = [edit for edit in plan.edits if isinstance(edit, InsertBlock)]
    parts = container.split(".") if container else []
    outer = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    # Between the blocks of a stack others may stand, as in a hybrid; what counts the layers counts these too.
    whole = len(module.get_submodule(container)._modules)
    total = candidates(module, outer, whole, whole + after - before)
    found = total if whole == before else [*total, *candidates(module, outer, before, after)]
    found.sort(key=lambda number: not _counts_blocks(number))
    first, named = (
        _of_this_stack(module, parts, [number for number in numbers if _counts_blocks(number)])
        for numbers in (total, found)
    )
    named, first = (first, named) if first else (named, named)
    lists = list(_lists(module, outer, whole, inserts))
    spoken = [number for number in lists if _counts_blocks(number)]
    tried: list[tuple[Number, ...]] = []
    some = [(), *(c for size in (1, 2) for c in combinations(found, size))]
    for choice in ((*named, *spoken), (*named, *lists), (*first, *spoken), *((*c, *spoken) for c in some), *some):
        if choice not in tried and len(tried) < MOST_TRIED:
            tried.append(choice)
            yield replace(plan, edits=(*plan.edits, *choice))


def _counts_blocks(number: Number) -> bool:
    return any(word in number.path[-1].lower() for word in ("layer", "block", "depth"))


def _of_this_stack(module: nn.Module, container: Sequence[str], named: Sequence[Number]) -> list[Number]:
    """Leave out numbers that count the blocks of another stack of the same length, such as an encoder's."""

    def spoken(number: Number) -> set[str]:
        return {*number.path[-1].lower().split("_"), *number.owner.lower().split(".")}

    names = {word for number in named for word in number.path[-1].lower().split("_")}
    own = {part.lower() for part in container} & names - {"layer", "layers", "block", "blocks", "depth", "h"}
    ours = [number for number in named if spoken(number) & own]
    if ours:
        return ours
    outer = [".".join(container[:depth]) for depth in range(len(container))]
    beside = {name.lower() for owner in outer for name, _ in module.get_submodule(owner).named_children()}
    return [number for number in named if not spoken(number) & (beside - set(container) - {"layers", "blocks", "h"})]


def _lists(module: nn.Module, owners: Sequence[str], before: int, inserts: Sequence[InsertBlock]) -> Iterator[Number]:
    """Yield the lists of the configs around a stack that have one entry per block."""
    seen: set[tuple[int, str]] = set()
    for owner in dict.fromkeys(owners):
        for key, value in list(module.get_submodule(owner).__dict__.items()):
            settings = None if isinstance(value, (dict, type, nn.Module, Tensor)) else getattr(value, "__dict__", None)
            if key.startswith("_") or settings is None or callable(value):
                continue
            for name, held in settings.items():
                plain = type(held) in (list, tuple) and all(isinstance(item, (str, int)) for item in held)
                if plain and len(held) == before and (id(value), name) not in seen:
                    seen.add((id(value), name))
                    entries = list(held)
                    for edit in inserts:
                        entries.insert(edit.index, entries[edit.source])
                    yield Number(owner, (key, name), tuple(held), tuple(entries))


def renumbered(module: nn.Module, plan: Plan, stack: Sequence[str], place: int, added: int) -> Iterator[Plan]:
    """Yield a plan with the numbers by which blocks know their own place moved on, and the plan as it is.

    Such a number differs from block to block by as much as their places do, whatever kinds of blocks there are; one
    that a single block has is its place, or zero, and its name speaks of an index. Numbers that count the blocks of one
    kind only differ by one within the stack.
    """
    container = stack[0].rpartition(".")[0]
    base, source = (int(name.rpartition(".")[2]) for name in (stack[0], stack[place]))
    own = [int(name.rpartition(".")[2]) for name in stack]
    held: dict[tuple[str, str], dict[int, int]] = {}
    for index, block in enumerate(module.get_submodule(container).children()):
        for inner, child in block.named_modules():
            for key, value in child.__dict__.items():
                if type(value) is int and not _is_torchs(child):
                    held.setdefault((inner, key), {})[index] = value
    edits: list[Number] = []
    for (inner, key), values in held.items():
        if len(values) == 1:
            index, value = next(iter(values.items()))
            moves = ("idx" in key or "index" in key) and (value == index or (index, value) == (base, 0))
        else:
            moves = len({value - index for index, value in values.items()}) == 1
        if not moves:
            values = {index: values[index] for index in own if index in values}
            if len(own) == 1 or list(values.values()) != [values.get(base, 0) + number for number in range(len(own))]:
                continue
        for index in range(source + 1, source + 1 + added):
            # New blocks are copies of the source; those behind them keep what they had.
            if source in values:
                owner = ".".join(part for part in (container, str(index), inner) if part)
                edits.append(Number(owner, (key,), values[source], values[source] + index - source))
        for index, value in values.items():
            if index > source:
                owner = ".".join(part for part in (container, str(index + added), inner) if part)
                edits.append(Number(owner, (key,), value, value + added))
    if edits:
        yield replace(plan, edits=(*plan.edits, *edits))
    yield plan


def settled(
    scratch: Scratch,
    plan: Plan,
    sizes: Sequence[tuple[int, int]],
    words: Sequence[str] = (),
    also: Callable[[Surgery], str | None] | None = None,
    learns: bool = True,
    everywhere: bool = True,
) -> Plan:
    """Return a plan with as few further numbers changed as it takes to run and to keep the function.

    Args:
        scratch: The copy on which to try.
        plan: The edits of the weights.
        sizes: Pairs of what a number may be now and what it then becomes.
        words: Numbers whose names end in one of these follow too, where the function stays: what a config says of a
            size is read when the model is saved or its loss is computed.
        also: See `Scratch.attempt`.
        learns: See `Scratch.attempt`.
        everywhere: Such numbers follow in the whole model and its configs, not just in the modules that change.

    Raises:
        GrowthRefusedError: Nothing helps; the message has the problem of the first trial, or of the first that ran.
    """
    changed: list[str] = []

    def problem(numbers: Sequence[Sequence[Number]]) -> str | None:
        trial = scratch.attempt(_with(plan, numbers), also=also, learns=learns)
        if trial.problem is not None and trial.difference > scratch.close:
            changed.append(trial.problem)
        return trial.problem

    first = problem(())
    chosen: list[list[Number]] = []
    own = [name for where in plan.where for name in _inside(scratch.module, where)]
    if first is not None:
        around = [parent for name in plan.where for parent in _upwards(name)]
        for owners in (own, [*own, *around]):
            pool = _fresh(scratch.module, plan, _alike(scratch.module, owners, sizes))
            if pool and (found := _sufficient(pool, words, problem)) is not None:
                chosen = found
                break
        else:
            raise GrowthRefusedError(
                f"{plan.describe()} does not keep the function: {next(iter(changed), first)}.",
                "Expected code that takes its sizes from the tensors or from attributes, and reads old entries without "
                "notice of new ones; a norm whose answer is itself handed on, as in post-norm blocks, does not.",
                "Sizes written into forward() have to become attributes; or grow another part.",
            )
    if not words:
        return _with(plan, chosen)
    pool = _alike(scratch.module, [name for name, _ in scratch.module.named_modules()] if everywhere else own, sizes)
    if not everywhere:
        # A config may be others' too.
        pool = [group for group in pool if len(group[0].path) == 1]
    pool = [group for group in pool if _speaks(group[0], words)]
    return _followed(scratch.module, _with(plan, chosen), pool, lambda tried: problem([*chosen, *tried]))


def _sufficient(
    pool: Sequence[list[Number]], words: Sequence[str], problem: Callable[[Sequence[list[Number]]], str | None]
) -> list[list[Number]] | None:
    """Return a choice of numbers that is enough, and of which none is too many; None when there is none."""
    named = [group for group in pool if _speaks(group[0], words)]
    choices = [c for size in (1, 2, 3) for c in combinations(pool, size)]
    for choice in dict.fromkeys(map(_indices(pool), [tuple(pool), tuple(named), *choices][:MOST_TRIED])):
        kept = [pool[index] for index in choice]
        if not kept or problem(kept) is not None:
            continue
        for group in list(kept):
            fewer = [other for other in kept if other is not group]
            if problem(fewer) is None:
                kept = fewer
        return kept
    return None


def _indices(pool: Sequence[list[Number]]) -> Callable[[Sequence[list[Number]]], tuple[int, ...]]:
    places = {id(group): index for index, group in enumerate(pool)}
    return lambda choice: tuple(places[id(group)] for group in choice)


def _speaks(number: Number, words: Sequence[str]) -> bool:
    """Tell whether a number's name says that it counts what grows."""
    return number.path[-1].lower().endswith(tuple(words))


def _followed(
    module: nn.Module,
    plan: Plan,
    pool: Sequence[list[Number]],
    problem: Callable[[Sequence[list[Number]]], str | None],
) -> Plan:
    """Return a plan with the numbers that only speak of a size changed too, where the function stays."""
    fresh = _fresh(module, plan, pool)
    if not fresh or problem(fresh) is None:
        return _with(plan, fresh)
    kept: list[list[Number]] = []
    for group in fresh:
        if problem([*kept, group]) is None:
            kept.append(group)
    return _with(plan, kept)


def _fresh(module: nn.Module, plan: Plan, pool: Sequence[list[Number]]) -> list[list[Number]]:
    """Return the numbers of a pool that a plan does not change yet."""
    known = {_holder(module, edit) for edit in plan.edits if isinstance(edit, Number)}
    left = [[number for number in group if _holder(module, number) not in known] for group in pool]
    return [group for group in left if group]


def _with(plan: Plan, numbers: Sequence[Sequence[Number]]) -> Plan:
    return replace(plan, edits=(*plan.edits, *(number for group in numbers for number in group)))


def _alike(module: nn.Module, owners: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[list[Number]]:
    """Return the numbers that may change, those of alike modules together."""
    groups: dict[tuple[Any, ...], list[Number]] = {}
    for before, after in dict.fromkeys(sizes):
        if before != after:
            for number in candidates(module, owners, before, after):
                groups.setdefault((number.path, before, after), []).append(number)
    return list(groups.values())


def _holder(module: nn.Module, number: Number) -> tuple[int, str]:
    """Return what tells two numbers apart, whichever way leads to them."""
    holder: Any = module.get_submodule(number.owner)
    for name in number.path[:-1]:
        holder = holder[name] if isinstance(holder, dict) else getattr(holder, name)
    return id(holder), number.path[-1]


def _inside(module: nn.Module, where: str) -> list[str]:
    """Return the names of a module and of those in it."""
    return [name for name, _ in module.named_modules() if name == where or name.startswith(f"{where}.") or not where]


def _upwards(name: str) -> list[str]:
    """Return the names of the modules around one, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
