"""A model elsewhere: on another device or in another dtype, without a copy of it and without the device.

Parameters and buffers are exchanged for converted ones while a block runs. To the model's code the other device is
torch's meta device, where tensors have shapes and no values; behind each stands a tensor with its values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from utils.runtime.dispatch import OperatorMode

CLOSED = 0.01
"""Largest value of a gate that hardly lets anything through."""
IS_CUDA, IS_META = Tensor.is_cuda.__get__, Tensor.is_meta.__get__  # type: ignore[attr-defined]
Convert = Callable[[Tensor], Tensor]
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor,
            aten._index_put_impl_.default, aten._unsafe_index_put.default}  # fmt: skip
"""Operations whose index may be on the CPU wherever the rest is."""
PACKING = aten._pack_padded_sequence.default
"""Wants the lengths on the CPU wherever the rest is, and leaves the sizes of the batches there."""


class DeviceMismatch(Exception):
    """An operation got tensors of two devices."""


@contextmanager
def swapped(module: nn.Module, convert: Convert) -> Iterator[None]:
    """Exchange every parameter and buffer for what `convert` makes of it while the block runs."""
    made: dict[int, Tensor] = {}
    undo: list[tuple[nn.Module, str, Tensor]] = []

    def converted(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = convert(tensor)
            if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
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


class Elsewhere(OperatorMode):
    """Runs a pass on the meta device, and refuses to mix devices as a GPU would.

    Each tensor there has a twin with its values where the model really is; operators run on the twins. So whatever
    asks for a value gets it, and torch's own implementation of the meta device, which is slow and incomplete, is hardly
    needed.
    """

    def __init__(self) -> None:
        """Start with nothing moved."""
        super().__init__()
        self.home = torch.device("cpu")
        self.twins = WeakTensorKeyDictionary()

    def moved(self, tensor: Tensor) -> Tensor:
        """Return a tensor like this one on the new device."""
        self.home = tensor.device
        away = self._with_twin(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            away = nn.Parameter(away, requires_grad=tensor.requires_grad)
            self.twins[away] = tensor.detach()
        return away

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation.

        Raises:
            DeviceMismatch: Its tensors are on two devices.
        """
        given = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        target = None if given.get("device") is None else torch.device(given["device"])
        if not any(_is_away(tensor) for tensor in tensors) and (target is None or target.type != "meta"):
            return func(*args, **given)
        _refuse_mixing(func, tensors)
        twins = {id(tensor): self._twin(tensor) for tensor in tensors}
        known = {id(twins[id(tensor)]): tensor for tensor in tensors}
        if target is not None and target.type == "meta":
            given["device"] = self.home

        def there(result: Tensor) -> Tensor:
            if id(result) in known:
                return known[id(result)]
            return result if target is not None and target.type != "meta" else self._with_twin(result)

        def twin(tensor: Tensor) -> Tensor:
            return twins[id(tensor)]

        try:
            result = func(*tree_map_only(Tensor, twin, args), **tree_map_only(Tensor, twin, given))
        except NotImplementedError:
            # An operation that only the new device has.
            return func(*args, **(kwargs or {}))
        if torch.Tag.inplace_view in func.tags:
            func(*args, **(kwargs or {}))
        if func is PACKING:
            return there(result[0]), result[1]
        return tree_map_only(Tensor, there, result)

    def _twin(self, tensor: Tensor) -> Tensor:
        """Return the tensor that has the values of another."""
        if not _is_away(tensor):
            return tensor
        if (twin := self.twins.get(tensor)) is None:
            twin = self.twins[tensor] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.home)
        return twin

    def _with_twin(self, values: Tensor) -> Tensor:
        """Return a tensor on the new device whose twin has these values."""
        if values.layout is not torch.strided:
            tensor = values.to("meta")
        else:
            tensor = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        self.twins[tensor] = values
        return tensor


class Disguised(TorchFunctionMode):
    """Lets the model's code read the name of a GPU where a tensor is on the meta device, and takes that name for it.

    Some code asks whether it is on the meta device, where weights have no values yet, and then does what it would never
    do on a GPU.
    """

    gpu = torch.device("cuda", 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function, or read one attribute, under the other name."""
        # What asks for a GPU without naming the device; the getters of attributes are made anew at each access.
        if func is Tensor.cuda:
            return args[0].to("meta")
        if func == IS_CUDA:
            return _is_away(args[0])
        if func == IS_META:
            return False
        if func is Tensor.get_device and _is_away(args[0]):
            return self.gpu.index
        back = (self._back(args), self._back(kwargs or {}))
        result = func(*back[0], **back[1])
        return self.gpu if isinstance(result, torch.device) and result.type == "meta" else result

    def _back(self, value: Any) -> Any:
        """Return arguments in which the meta device has its own name."""
        if isinstance(value, dict):
            return {key: torch.device("meta") if key == "device" and _is_gpu(v) else v for key, v in value.items()}
        return tuple(torch.device("meta") if isinstance(v, (torch.device, str)) and _is_gpu(v) else v for v in value)


def _is_gpu(place: Any) -> bool:
    return str(place).split(":")[0] == Disguised.gpu.type


def _refuse_mixing(func: Any, tensors: list[Tensor]) -> None:
    """Raise an error where a GPU would: single numbers on the CPU mix with anything, those of a GPU do not."""
    if func is PACKING:
        if _is_away(tensors[1]):
            raise DeviceMismatch("pack_padded_sequence wants the lengths on the CPU, and they are on the new device")
        return
    places = {tensor.device.type for tensor in tensors if tensor.dim() > 0 or _is_away(tensor)}
    free = func in COPIES or (func in INDEXING and _is_away(tensors[0]))
    if len(places) > 1 and not free:
        shapes = ", ".join(f"{tuple(t.shape)} on {'the new device' if _is_away(t) else t.device}" for t in tensors)
        raise DeviceMismatch(f"{func.overloadpacket.__name__} of {shapes}")


def _is_away(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"
