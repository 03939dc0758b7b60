"""What flows through a model: every submodule's inputs and output, in execution order, without changing it.

Nested tensors, ragged batches that torch's fused encoders make inside, have no shape and are left out.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

Observer = Callable[[str, nn.Module, tuple[Any, ...], Any], None]


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Have torch's attention layers run their operators one by one while the block does, as they do in train mode.

    In eval mode they may run a whole layer as one operator, on nested tensors inside; the answers are the same.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def observe(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Call ``observer(name, child, inputs, output)`` after the forward of every submodule while the block runs.

    Args:
        module: The model; its own name is ``""``.
        observer: Sees positional inputs and then keyword inputs in one tuple, and the raw output, with None for a
            nested tensor. It must not keep large tensors.
    """

    def hook_for(name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = tuple(_unless_nested(value) for value in (*args, *kwargs.values()))
            observer(name, child, given, _unless_nested(output))

        return hook

    handles = [child.register_forward_hook(hook_for(name), with_kwargs=True) for name, child in module.named_modules()]
    try:
        with unfused_attention():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _unless_nested(value: Any) -> Any:
    return None if isinstance(value, Tensor) and value.is_nested else value


def named_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor inside tuples, lists, mappings and dataclasses with its path, such as ``logits``."""
    if isinstance(value, Tensor):
        if not value.is_nested:
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))
        for key, item in zip(names, value, strict=True):
            yield from named_tensors(item, f"{path}.{key}" if path else str(key))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from named_tensors(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)


def tensor_at(value: Any, path: str) -> Tensor:
    """Return the tensor that `named_tensors` yields under `path`.

    Raises:
        KeyError: There is no tensor at that path.
    """
    for name, tensor in named_tensors(value):
        if name == path:
            return tensor
    raise KeyError(path)


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor inside a nested value, or None."""
    return next((tensor for _, tensor in named_tensors(value)), None)
