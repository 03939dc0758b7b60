"""What a model remembers outside its weights: buffers that are not persistent, and plain attributes."""

from typing import Any

import torch
from torch import Tensor, nn

from utils.training.state import ModelChange

_OWN = frozenset(nn.Module().__dict__)
# Exactly these types: a NumPy number or an enum is an int or a float too, and no checkpoint could be read with one.
_PLAIN = (type(None), bool, int, float, Tensor)


class ModuleMemory:
    """A part of the run's state for models that count, cache or average in attributes of their own.

    Kept are buffers that ``state_dict`` leaves out, and attributes that are plain numbers or tensors. Texts, lists,
    dicts and other objects are not: a model whose results depend on such state should register it as a buffer.
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
        attributes = {}
        for prefix, child in self.module.named_modules():
            for name, value in child.__dict__.items():
                if name in _OWN or type(value) not in _PLAIN:
                    continue
                kept = value.detach().cpu().clone() if isinstance(value, Tensor) else value
                attributes[f"{prefix}.{name}" if prefix else name] = kept
        return {"buffers": buffers, "attributes": attributes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the values back, tensors onto the device of what they replace."""
        for qualified, value in state["buffers"].items():
            owner, name = self._owner(qualified)
            if owner is not None and name in owner._buffers:
                owner._buffers[name] = self._put(owner._buffers[name], value)
        for qualified, value in state["attributes"].items():
            owner, name = self._owner(qualified)
            if owner is not None:
                kept = isinstance(value, Tensor)
                owner.__dict__[name] = self._put(owner.__dict__.get(name), value) if kept else value

    def migrate(self, change: ModelChange) -> None:
        """Nothing is kept here: the values are read from the model when a checkpoint is written."""

    def _put(self, present: Any, value: Tensor) -> Tensor:
        """Write into the tensor that is there, which others may share; put a new one where none fits."""
        if isinstance(present, Tensor) and (present.shape, present.dtype) == (value.shape, value.dtype):
            with torch.no_grad():
                if not torch.equal(present.detach().cpu(), value):
                    present.copy_(value)
            return present
        device = present.device if isinstance(present, Tensor) else next(self.module.parameters(), value).device
        return value.to(device)

    def _owner(self, qualified: str) -> tuple[nn.Module | None, str]:
        prefix, _, name = qualified.rpartition(".")
        try:
            return self.module.get_submodule(prefix), name
        except AttributeError:
            return None, name


def frozen_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that do not train."""
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


def freeze(module: nn.Module, names: list[str]) -> None:
    """Make exactly the named parameters not train."""
    frozen = set(names)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen and (parameter.is_floating_point() or parameter.is_complex()))
