"""Ordinary Python state reachable from a model: what it held is noted, and put back into the very same objects."""

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
SEQUENCES = (list, deque)
MOST_OBJECTS = 100_000
"""Containers and objects that are looked into; what lies beyond is not put back."""
LONGEST_SEARCHED = 10_000
"""Containers with more entries are put back themselves, but their entries are not searched."""
PLAIN_BYTES = 64e6
"""Tensors and arrays that are neither parameters nor buffers are copied up to this size in all."""


class ObjectState:
    """Contents of the dicts, lists, deques, sets, tensors, arrays, generators and simple objects of a model.

    A simple object is a module, a `types.SimpleNamespace`, or an instance of a class from a package that also defines
    one of the model's modules: its code can be expected to change it. Everything else (files, iterators, objects of
    other libraries, slots) is left alone.
    """

    def __init__(self, module: nn.Module, copied_elsewhere: Iterable[Tensor]) -> None:
        """Look at everything once.

        Args:
            module: The model.
            copied_elsewhere: Tensors whose values are somebody else's care: parameters and buffers.
        """
        self._undo: list[Callable[[], None]] = []
        self._bytes = 0.0
        packages = {type(child).__module__.partition(".")[0] for child in module.modules()}
        self._packages = packages - {"torch", "numpy", *sys.stdlib_module_names}
        seen: dict[int, Any] = {id(tensor): tensor for tensor in copied_elsewhere}
        waiting: deque[Any] = deque(module.modules())
        while waiting and len(seen) < MOST_OBJECTS:
            value = waiting.popleft()
            if id(value) in seen:
                continue
            # Holding on to the object keeps its id from being reused.
            seen[id(value)] = value
            inside = self._note(value)
            if len(inside) <= LONGEST_SEARCHED:
                waiting.extend(item for item in inside if type(item) not in (int, float, str, bool, type(None)))

    def restore(self) -> None:
        """Put back what has changed; what has not is not touched."""
        for undo in self._undo:
            undo()

    def _note(self, value: Any) -> list[Any]:
        """Remember one value's contents and return what may be searched next."""
        kind = type(value)
        if kind in MAPPINGS:
            return self._note_mapping(value)
        if kind in SEQUENCES:
            entries = list(value)
            self._undo.append(lambda: _refill(value, entries))
            return entries
        if kind is set:
            members = set(value)
            self._undo.append(lambda: _refill_set(value, members))
            return list(members)
        if kind is tuple:
            return list(value)
        if isinstance(value, Tensor):
            self._note_tensor(value)
        elif kind is np.ndarray and value.dtype != object:
            self._note_array(value)
        elif kind is torch.Generator:
            self._note_state(value.get_state(), value.set_state)
        elif kind is random.Random:
            self._note_state(value.getstate(), value.setstate)
        elif self._is_simple(value):
            return self._note_mapping(vars(value))
        return []

    def _note_mapping(self, value: dict[Any, Any]) -> list[Any]:
        entries = list(value.items())
        self._undo.append(lambda: _refill_mapping(value, entries))
        return [item for _, item in entries]

    def _note_state(self, state: Any, put_back: Callable[[Any], Any]) -> None:
        self._undo.append(lambda: _call(put_back, state))

    def _note_tensor(self, value: Tensor) -> None:
        if value.layout != torch.strided or value.device.type == "meta" or not self._fits(value.nbytes):
            return
        data, copy = value.data, value.detach().clone()
        self._undo.append(lambda: _call(restore_tensor, value, data, copy))

    def _note_array(self, value: np.ndarray) -> None:
        if self._fits(value.nbytes) and value.flags.writeable:
            copy = value.copy()
            self._undo.append(lambda: np.copyto(value, copy))

    def _fits(self, size: float) -> bool:
        self._bytes += size
        return self._bytes <= PLAIN_BYTES

    def _is_simple(self, value: Any) -> bool:
        if isinstance(value, nn.Module) or type(value) is SimpleNamespace:
            return True
        package = type(value).__module__.partition(".")[0]
        return package in self._packages and not isinstance(value, type) and hasattr(value, "__dict__")


def restore_tensor(tensor: Tensor, data: Tensor, copy: Tensor) -> bool:
    """Give a tensor its storage and values back.

    Args:
        tensor: What may have changed.
        data: What ``tensor.data`` was: it still points to the first storage when another has taken its place.
        copy: What its values were, on any device.

    Returns:
        Whether anything had changed.
    """
    moved = (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride()) != (
        data.data_ptr(), data.shape, data.dtype, data.stride(),
    )  # fmt: skip
    # Writing to an inference tensor is allowed in inference mode only.
    with torch.inference_mode(data.is_inference()), torch.no_grad():
        if moved:
            tensor.data = data
        same = same_bits(data, copy)
        if not same:
            data.copy_(copy)
    return moved or not same


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Compare two tensors of one shape exactly; NaN equals the same NaN."""
    second = second.to(first.device)
    return torch.equal(first, second) or torch.equal(bits(first), bits(second))


def bits(tensor: Tensor) -> Tensor:
    """Return a flat view of a tensor's bits as whole numbers; a copy when it is not contiguous."""
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()]
    return plain.detach().contiguous().reshape(-1).view(whole)


def _call(function: Callable[..., Any], *arguments: Any) -> None:
    function(*arguments)


def _refill_set(value: set[Any], members: set[Any]) -> None:
    if value != members:
        value.clear()
        value.update(members)


def _refill(value: Any, entries: list[Any]) -> None:
    if len(value) != len(entries) or any(now is not then for now, then in zip(value, entries, strict=True)):
        value.clear()
        value.extend(entries)


def _refill_mapping(value: dict[Any, Any], entries: list[tuple[Any, Any]]) -> None:
    same = len(value) == len(entries) and all(
        key is old_key and item is old_item
        for (key, item), (old_key, old_item) in zip(value.items(), entries, strict=True)
    )
    if not same:
        value.clear()
        value.update(entries)
