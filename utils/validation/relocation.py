"""A model elsewhere: on another device or in another dtype, without a copy of it and without the device.

Parameters and buffers are exchanged for converted ones while a block runs. The other device is torch's meta device,
where tensors have shapes and no values; what a forward pass needs to know about values (an ``item()``, the number of
non-zero elements) is answered from a recording of the same pass on the real device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from utils.runtime.dispatch import OperatorMode

CLOSED = 0.01
"""Largest value of a gate that hardly lets anything through."""
Convert = Callable[[Tensor], Tensor]
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor,
            aten._index_put_impl_.default, aten._unsafe_index_put.default}  # fmt: skip
"""Operations whose index may be on the CPU wherever the rest is."""


class DeviceMismatch(Exception):
    """An operation got tensors of two devices."""


class Unanswerable(Exception):
    """The pass asked for values in another order than the recorded one."""


@contextmanager
def swapped(module: nn.Module, convert: Convert) -> Iterator[None]:
    """Exchange every parameter and buffer for what `convert` makes of it while the block runs."""
    made: dict[int, Tensor] = {}
    undo: list[tuple[nn.Module, str, Tensor]] = []

    def converted(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = convert(tensor)
            if isinstance(tensor, nn.Parameter) and new is not tensor:
                new = nn.Parameter(new.detach(), requires_grad=tensor.requires_grad and new.is_floating_point())
            made[id(tensor)] = new
        return made[id(tensor)]

    try:
        for child in module.modules():
            for held in (child._parameters, child._buffers):
                for key, tensor in list(held.items()):
                    if tensor is not None:
                        undo.append((child, key, tensor))
                        # Recurrent layers keep a second list of their weights, which only setattr renews.
                        setattr(child, key, converted(tensor))
        yield
    finally:
        for child, key, tensor in undo:
            setattr(child, key, tensor)


def awakened(tensor: Tensor) -> Tensor:
    """Return a tensor as it is, or larger random numbers where a branch starts closed: all zeros, tiny gates."""
    weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.numel() > 0
    return torch.randn_like(tensor) if weight and float(tensor.detach().abs().max()) < CLOSED else tensor


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, strides and dtype without values."""
    return tensor.detach().to("meta")


class Recorder(OperatorMode):
    """Records what values a pass asks for.

    Attributes:
        answers: Name of each operation whose result depends on values, and the result.
    """

    def __init__(self) -> None:
        """Start with nothing recorded."""
        super().__init__()
        self.answers: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        result = func(*args, **(kwargs or {}))
        if _asks_for_values(func, args):
            self.answers.append((str(func), result))
        return result


class Elsewhere(OperatorMode):
    """Runs a pass on the meta device: refuses to mix devices as a GPU would, and answers from a recording."""

    def __init__(self, answers: list[tuple[str, Any]]) -> None:
        """Take the recording of the same pass."""
        super().__init__()
        self.answers = iter(answers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation.

        Raises:
            DeviceMismatch: Its tensors are on two devices.
            Unanswerable: It asks for values that were not recorded.
        """
        given = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        # Single numbers on the CPU mix with anything; those of a GPU do not.
        mixed = {tensor.device.type for tensor in tensors if tensor.dim() > 0 or tensor.device.type == "meta"}
        if func is aten.copy_.default and len(mixed) > 1:
            return args[0]
        if func is aten._to_copy.default and "meta" in mixed:
            target = given.get("device")
            if target is not None and torch.device(target).type != "meta":
                dtype = given.get("dtype") or tensors[0].dtype
                return torch.zeros(tensors[0].shape, dtype=dtype, device=target)
        free = func in INDEXING and tensors[0].device.type == "meta"
        if len(mixed) > 1 and not free and func not in COPIES:
            shapes = ", ".join(f"{tuple(t.shape)} on {_place(t)}" for t in tensors)
            raise DeviceMismatch(f"{func.overloadpacket.__name__} of {shapes}")
        if _asks_for_values(func, args) and any(tensor.device.type == "meta" for tensor in tensors):
            name, answer = next(self.answers, ("", None))
            if name != str(func):
                raise Unanswerable(str(func))
            return _without_values(answer)
        return func(*args, **given)


def _place(tensor: Tensor) -> str:
    return "the new device" if tensor.device.type == "meta" else str(tensor.device)


def _without_values(answer: Any) -> Any:
    """Move the tensors of a recorded answer to the meta device."""
    if isinstance(answer, Tensor):
        return on_meta(answer)
    return type(answer)(_without_values(item) for item in answer) if isinstance(answer, (tuple, list)) else answer


def _asks_for_values(func: Any, args: Any) -> bool:
    """Tell whether the result, or its shape, depends on values."""
    if func in INDEXING:
        indices = args[1] if len(args) > 1 else ()
        return func is aten.index.Tensor and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices
        )
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
