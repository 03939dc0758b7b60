"""A model comes back exactly as it was: modes, gradients, buffers, attributes, random streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from utils.runtime.errors import SeedbedError
from utils.runtime.seeding import isolated_streams


class ModelChangedError(SeedbedError):
    """A forward or backward pass changed the parameters themselves."""


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's plain attributes, containers copied one level deep."""
    kept = {}
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules") or name.startswith(("_forward_", "_backward_")):
            continue
        kept[name] = value.copy() if type(value) in (dict, list, set) else value
    return kept


@contextmanager
def preserved(module: nn.Module, *seed: int | str) -> Iterator[nn.Module]:
    """Let a block run the model freely and put everything back afterwards.

    Restored are: the train or eval mode of every submodule, gradients (the very same tensors), ``requires_grad``,
    buffers, plain attributes (caches, counters), the random streams, the default dtype and the grad mode. Parameters
    are watched rather than copied, because a copy would double the memory of a large model: training them inside the
    block is an error.

    Args:
        module: The model.
        *seed: Coordinates that seed the block's random streams.

    Raises:
        ModelChangedError: The block changed a parameter's values in place.
    """
    modules = list(module.modules())
    attributes = [_attributes(child) for child in modules]
    members = [(dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in modules]
    parameters = [(name, p, p._version, p.requires_grad, p.grad) for name, p in module.named_parameters()]
    # Inference tensors have no version counter to watch, and meta tensors no values.
    buffers = [(b, b.detach().clone()) for b in module.buffers() if b.device.type != "meta"]
    dtype, grad_enabled = torch.get_default_dtype(), torch.is_grad_enabled()
    for _, parameter, *_ in parameters:
        parameter.grad = None
    with isolated_streams(*seed):
        try:
            yield module
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad_enabled)
            for child, plain, (own_parameters, own_buffers, own_modules) in zip(
                modules, attributes, members, strict=True
            ):
                for name in _attributes(child).keys() - plain.keys():
                    del child.__dict__[name]
                child.__dict__.update(plain)
                child.__dict__["_parameters"].clear()
                child.__dict__["_parameters"].update(own_parameters)
                child.__dict__["_buffers"].clear()
                child.__dict__["_buffers"].update(own_buffers)
                child.__dict__["_modules"].clear()
                child.__dict__["_modules"].update(own_modules)
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            changed = []
            for name, parameter, version, requires_grad, grad in parameters:
                if parameter._version != version:
                    changed.append(name)
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
                parameter.grad = grad
    if changed:
        raise ModelChangedError(
            f"A forward or backward pass changed the values of {changed[0]}"
            + (f" and {len(changed) - 1} more parameters." if len(changed) > 1 else "."),
            "A model may change its buffers, never its parameters, outside an optimizer step.",
            "Look for in-place operations on weights in forward().",
        )
