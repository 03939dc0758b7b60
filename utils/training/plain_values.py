"""Generators, arrays and containers of numbers as plain values that a checkpoint can hold, and back.

What comes out is made of dicts, lists, texts, numbers and tensors, which ``torch.load(weights_only=True)`` reads: no
object is ever pickled. Texts are left out, but as keys: they are settings such as paths, which belong to a machine.
"""

import json
import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float)
"""Exactly these types: a NumPy number or an enum is an int or a float too, and no checkpoint could be read with one."""
MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter, "defaultdict": defaultdict}
SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "deque": deque}
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
"""NumPy's own."""
ARRAYS = frozenset("biuf")
"""Kinds of NumPy's types that torch has too."""
MOST_ITEMS = 10_000
"""Containers with more in them, such as vocabularies, are not kept."""
DEEPEST = 6
"""Containers inside each other."""


class NotPlainError(Exception):
    """A value cannot be kept."""


def packed(value: Any) -> dict[str, Any]:
    """Return a generator, an array or a container as plain values; its tensors are copied.

    Raises:
        NotPlainError: It holds something else, or too much.
    """
    if type(value) in GENERATORS:
        return _packed_generator(value)
    if type(value) is np.ndarray:
        return {"kind": "array", "value": _tensor_of(value)}
    if not is_container(value):
        raise NotPlainError
    budget = [MOST_ITEMS]
    kept: dict[str, Any] = _packed(value, budget, DEEPEST)
    return kept


def is_container(value: Any) -> bool:
    """Tell whether a value is one of the containers that may be kept."""
    return type(value) in (*MAPPINGS.values(), *SEQUENCES.values())


def unpacked(state: dict[str, Any], present: Any, device: torch.device) -> Any:
    """Return what `packed` was given, written into what is there now where that is of the same kind.

    Args:
        state: What `packed` returned.
        present: What is there now; others may hold it too.
        device: Where tensors go that were not in main memory.
    """
    kind = state["kind"]
    if kind in ("torch", "random", "numpy", "numpy-legacy"):
        return _unpacked_generator(state, present)
    if kind == "array":
        value = state["value"].numpy()
        same = type(present) is np.ndarray and (present.shape, present.dtype) == (value.shape, value.dtype)
        if not same or not present.flags.writeable:
            return value.copy()
        present[...] = value
        return present
    return _unpacked(state, present, device)


def put(present: Any, value: Tensor, device: torch.device) -> Tensor:
    """Write into the tensor that is there, which others may share; put a new one where none fits."""
    if isinstance(present, Tensor) and (present.shape, present.dtype) == (value.shape, value.dtype):
        with torch.no_grad():
            if not torch.equal(present.detach().cpu(), value):
                present.copy_(value)
        return present
    return value.to(present.device if isinstance(present, Tensor) else device)


def _packed(value: Any, budget: list[int], depth: int) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        raise NotPlainError
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is Tensor:
        return {"kind": "tensor", "value": value.detach().cpu().clone(), "here": value.device.type == "cpu"}
    for name, container in SEQUENCES.items():
        if kind is container:
            most = {"most": value.maxlen} if kind is deque else {}
            return {"kind": name, "items": [_packed(item, budget, depth - 1) for item in value], **most}
    for name, container in MAPPINGS.items():
        if kind is container:
            items = [[_key(key), _packed(item, budget, depth - 1)] for key, item in value.items()]
            return {"kind": name, "items": items}
    raise NotPlainError


def _key(key: Any) -> Any:
    if type(key) is tuple:
        return [_key(part) for part in key]
    if type(key) in (*PLAIN, str):
        return key
    raise NotPlainError


def _key_of(key: Any) -> Any:
    return tuple(_key_of(part) for part in key) if isinstance(key, list) else key


def _unpacked(state: Any, present: Any, device: torch.device) -> Any:
    if not isinstance(state, dict):
        return state
    kind = state["kind"]
    if kind == "tensor":
        return put(present, state["value"], torch.device("cpu") if state["here"] else device)
    if kind in MAPPINGS:
        same = type(present) is MAPPINGS[kind]
        pairs = [(_key_of(key), item) for key, item in state["items"]]
        values = {key: _unpacked(item, present.get(key) if same else None, device) for key, item in pairs}
        # A default belongs to the object that is there; without one there is none.
        target = present if same else MAPPINGS[kind]()
        target.clear()
        target.update(values)
        return target
    same = type(present) is SEQUENCES[kind]
    before = list(present) if same and kind != "set" else []
    before += [None] * len(state["items"])
    items = [_unpacked(item, old, device) for item, old in zip(state["items"], before, strict=False)]
    if kind == "deque":
        return _refilled(present if same and present.maxlen == state["most"] else deque(maxlen=state["most"]), items)
    if kind == "list" and same:
        return _refilled(present, items)
    if kind == "set" and same:
        present.clear()
        present.update(items)
        return present
    return SEQUENCES[kind](items)


def _refilled(target: Any, items: list[Any]) -> Any:
    target.clear()
    target.extend(items)
    return target


def _tensor_of(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in ARRAYS or not array.dtype.isnative:
        raise NotPlainError
    try:
        return torch.from_numpy(array.copy())
    except (TypeError, ValueError) as error:
        raise NotPlainError from error


def _packed_generator(value: Any) -> dict[str, Any]:
    if type(value) is torch.Generator:
        return {"kind": "torch", "device": value.device.type, "state": value.get_state().clone()}
    if type(value) is random.Random:
        return {"kind": "random", "state": json.dumps(value.getstate())}
    legacy = type(value) is np.random.RandomState
    state = value.get_state(legacy=False) if legacy else value.bit_generator.state
    if state["bit_generator"] not in BIT_GENERATORS:
        raise NotPlainError
    text = json.dumps(state, default=lambda one: one.tolist())
    return {"kind": "numpy-legacy" if legacy else "numpy", "state": text}


def _unpacked_generator(state: dict[str, Any], present: Any) -> Any:
    kind = state["kind"]
    if kind == "torch":
        if type(present) is not torch.Generator:
            present = torch.Generator()
        # One of a GPU says nothing to one of a CPU; on another machine no run repeats its numbers anyway.
        if present.device.type == state["device"]:
            present.set_state(state["state"])
        return present
    content = json.loads(state["state"])
    if kind == "random":
        drawn = present if type(present) is random.Random else random.Random()
        version, numbers, following = content
        drawn.setstate((version, tuple(numbers), following))
        return drawn
    if kind == "numpy-legacy":
        target = present if type(present) is np.random.RandomState else np.random.RandomState()
        target.set_state(content)
        return target
    if (
        type(present) is not np.random.Generator
        or present.bit_generator.state["bit_generator"] != content["bit_generator"]
    ):
        present = np.random.Generator(getattr(np.random, content["bit_generator"])())
    present.bit_generator.state = content
    return present
