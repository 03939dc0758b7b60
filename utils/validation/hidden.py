"""Tensors and modules that a model holds where torch does not look: plain attributes, lists, dicts, closures, objects.

What is hidden is invisible to ``parameters()``, ``state_dict()`` and ``to()``.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from utils.validation.relocation import Convert, swapped

PRIVATE = frozenset(vars(nn.Module()))
DEEPEST = 5
MOST = 2000
"""Items that are looked at per attribute."""


@dataclass
class Hidden:
    """One tensor or module that is not registered.

    Attributes:
        where: Qualified name of the owner with the attribute: ``blocks.1.experts``.
        item: The tensor or the module.
        slots: Where it is held: the namespace, its key, and whether the namespace had the key of its own.
    """

    where: str
    item: Tensor | nn.Module
    slots: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor itself, or all parameters and buffers of the module."""
        return [self.item] if isinstance(self.item, Tensor) else [*self.item.parameters(), *self.item.buffers()]

    @property
    def trains(self) -> bool:
        """Whether it is something that an optimizer should see."""
        return any(tensor.requires_grad and tensor.is_leaf for tensor in self.tensors)


_ABSENT = object()


def hidden_items(module: nn.Module) -> list[Hidden]:
    """Find everything hidden in a model, each item once, in order of the modules that hold it.

    Looked into are attributes of modules and of their own classes, lists, tuples, sets, dicts, partial functions,
    closures, bound methods, and simple objects: namespaces and instances of classes from the model's own packages.
    """
    known = {id(item) for item in (*module.modules(), *module.parameters(), *module.buffers())}
    storages = {_storage(t) for t in (*module.parameters(), *module.buffers())} - {0}
    packages = {type(child).__module__.partition(".")[0] for child in module.modules()} - {"torch"}
    found: dict[int, Hidden] = {}

    def search(value: Any, where: str, slot: tuple[dict[str, Any], str, Any], depth: int, seen: set[int]) -> None:
        if depth > DEEPEST or len(seen) > MOST or id(value) in known or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (Tensor, nn.Module)):
            plain = isinstance(value, nn.Module) or (
                type(value) in (Tensor, nn.Parameter) and value.device.type != "meta"
            )
            if plain and not (isinstance(value, Tensor) and _storage(value) in storages):
                item = found.setdefault(id(value), Hidden(where, value))
                if all(slot[0] is not known_slot[0] or slot[1] != known_slot[1] for known_slot in item.slots):
                    item.slots.append(slot)
            return
        if type(value) is SimpleNamespace or _is_own(value, packages):
            space = vars(value)
            for key, inner in list(space.items()):
                search(inner, f"{where}.{key}", (space, key, inner), depth + 1, seen)
            return
        for inner in _inside(value):
            search(inner, where, slot, depth + 1, seen)

    for name, child in module.named_modules():
        space = vars(child)
        own = [base for base in type(child).__mro__ if base.__module__.partition(".")[0] in packages]
        shared = {
            key: value for base in reversed(own) for key, value in vars(base).items() if isinstance(value, Tensor)
        }
        for key, value in [*shared.items(), *space.items()]:
            if key in PRIVATE or key.startswith("__"):
                continue
            slot = (space, key, space.get(key, _ABSENT))
            search(value, f"{name}.{key}" if name else key, slot, 0, set())
    return list(found.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _is_own(value: Any, packages: set[str]) -> bool:
    """Tell whether a value is a simple object of the model's own code."""
    kind = type(value)
    plain = not isinstance(value, (type, nn.Module, FunctionType, MethodType)) and hasattr(value, "__dict__")
    return plain and kind.__module__.partition(".")[0] in packages


def _inside(value: Any) -> Iterable[Any]:
    """Return what a container or a function holds."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, *(value.__defaults__ or ())]
    return ()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


@contextmanager
def exchanged(items: Iterable[Hidden], convert: Convert) -> Iterator[None]:
    """Exchange hidden tensors, and the tensors of hidden modules, for converted ones while the block runs."""
    items = list(items)
    undo: list[tuple[dict[str, Any], str, Any]] = []
    new = {id(item.item): convert(item.item) for item in items if isinstance(item.item, Tensor)}
    contexts = [swapped(item.item, convert) for item in items if isinstance(item.item, nn.Module)]
    entered = []
    try:
        for context in contexts:
            context.__enter__()
            entered.append(context)
        for item in items:
            for space, key, _ in item.slots if isinstance(item.item, Tensor) else ():
                present = space.get(key, _ABSENT)
                undo.append((space, key, present))
                space[key] = _rebuilt(item.item if present is _ABSENT else present, new)
        yield
    finally:
        for space, key, value in reversed(undo):
            if value is _ABSENT:
                space.pop(key, None)
            else:
                space[key] = value
        for context in reversed(entered):
            context.__exit__(None, None, None)


def _rebuilt(value: Any, new: dict[int, Any]) -> Any:
    """Return a container with some tensors exchanged."""
    if id(value) in new:
        return new[id(value)]
    if type(value) in (list, tuple):
        return type(value)(_rebuilt(item, new) for item in value)
    if type(value) is dict:
        return {key: _rebuilt(item, new) for key, item in value.items()}
    return value
