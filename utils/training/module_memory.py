"""What a model remembers outside its weights: buffers that are not persistent, and plain attributes."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.training.plain_values import (
    DEEPEST,
    GENERATORS,
    MOST_ITEMS,
    NotPlainError,
    is_container,
    packed,
    put,
    unpacked,
)
from utils.training.plain_values import PLAIN as NUMBERS
from utils.training.state import ModelChange

_OWN = frozenset(nn.Module().__dict__)
_PLAIN = (*NUMBERS, Tensor)


class ModuleMemory:
    """A part of the run's state for models that count, draw, cache or average in attributes of their own.

    Kept are buffers that ``state_dict`` leaves out, and attributes that are numbers or tensors, containers or arrays of
    these, or random generators. Texts and other objects are not; `changing` tells which of them change while training.
    """

    def __init__(self, module: nn.Module) -> None:
        """Watch a model."""
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        """Return the values by qualified name."""
        persistent = self.module.state_dict().keys()
        buffers = {
            name: buffer.detach().cpu().clone()
            for name, buffer in self.module.named_buffers()
            if name not in persistent
        }
        attributes: dict[str, Any] = {}
        objects: dict[str, Any] = {}
        for owner, qualified, value in self._attributes():
            if type(value) in _PLAIN:
                attributes[qualified] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
            # Torch's own layers have settings in theirs.
            elif not _is_torchs(owner) and (kept := _packed(value)) is not None:
                objects[qualified] = kept
        return {"buffers": buffers, "attributes": attributes, "objects": objects}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the values back, tensors onto the device of what they replace."""
        for qualified, value in state["buffers"].items():
            owner, name = self._owner(qualified)
            if owner is not None and name in owner._buffers:
                owner._buffers[name] = put(owner._buffers[name], value, self._device)
        for qualified, value in state["attributes"].items():
            owner, name = self._owner(qualified)
            if owner is not None:
                kept = isinstance(value, Tensor)
                owner.__dict__[name] = put(owner.__dict__.get(name), value, self._device) if kept else value
        for qualified, value in state["objects"].items():
            owner, name = self._owner(qualified)
            if owner is not None:
                owner.__dict__[name] = unpacked(value, owner.__dict__.get(name), self._device)

    def prints(self) -> dict[str, Any]:
        """Return, of each attribute that is not kept, what tells later whether it has changed."""
        packages = {type(child).__module__.partition(".")[0] for child in self.module.modules()} - {"torch", "numpy"}
        return {
            qualified: _print(value, packages, [MOST_ITEMS], DEEPEST)
            for owner, qualified, value in self._attributes()
            if type(value) not in _PLAIN and not _is_torchs(owner) and _packed(value) is None
        }

    def changing(self, before: dict[str, Any]) -> list[str]:
        """Return the names of attributes that are not kept and change while the model trains.

        Args:
            before: What `prints` returned some steps ago, when the model had filled what it fills but once.
        """
        after = self.prints()
        moved = {name for name in before.keys() & after.keys() if before[name] != after[name]}
        drawn = {name for _, name, value in self._attributes() if isinstance(value, Iterator)}
        return sorted(moved | drawn)

    def migrate(self, change: ModelChange) -> None:
        """Nothing is kept here: the values are read from the model when a checkpoint is written."""

    def _attributes(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """Yield each module with the names and values of its attributes that torch does not keep for itself."""
        for prefix, child in self.module.named_modules():
            for name, value in child.__dict__.items():
                if name not in _OWN:
                    yield child, f"{prefix}.{name}" if prefix else name, value

    @property
    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))

    def _owner(self, qualified: str) -> tuple[nn.Module | None, str]:
        prefix, _, name = qualified.rpartition(".")
        try:
            return self.module.get_submodule(prefix), name
        except AttributeError:
            return None, name


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "torch"


def _packed(value: Any) -> dict[str, Any] | None:
    """Return a value as a checkpoint can hold it; None when it cannot."""
    if not (is_container(value) or type(value) in GENERATORS or type(value) is np.ndarray):
        return None
    try:
        return packed(value)
    except NotPlainError:
        return None


def _print(value: Any, packages: set[str], budget: list[int], depth: int) -> Any:
    """Return what is equal as long as a value holds the same; objects of other libraries count for nothing."""
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        return None
    if type(value) in (*NUMBERS, str, bytes):
        return value
    if type(value) is Tensor:
        return None if value.is_inference() else (value.data_ptr(), value._version, tuple(value.shape))
    if type(value) is np.ndarray:
        return value.tobytes() if value.dtype != object and value.nbytes < 1e6 else None
    if isinstance(value, dict):
        return [(str(key), _print(item, packages, budget, depth - 1)) for key, item in value.items()]
    if is_container(value):
        return [_print(item, packages, budget, depth - 1) for item in value]
    if isinstance(value, (nn.Module, nn.Parameter, type)) or callable(value):
        return None
    if (type(value).__module__.partition(".")[0] in packages or type(value) is SimpleNamespace) and hasattr(
        value, "__dict__"
    ):
        return _print(vars(value), packages, budget, depth - 1)
    return None


def frozen_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that do not train."""
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


def freeze(module: nn.Module, names: list[str]) -> None:
    """Make exactly the named parameters not train."""
    frozen = set(names)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen and (parameter.is_floating_point() or parameter.is_complex()))
