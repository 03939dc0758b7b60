"""Seeing every operator that runs, and building without memory, without importing the compiler.

Torch's compiler takes seconds to import. Torch imports it by itself for ordinary modes that see operators, for its own
optimizers, and for most operators on its meta device, whose shapes it computes in Python.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

LARGEST = 2**25
"""Elements of a result up to which an operator is run on zeros."""
VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


class OperatorMode(TorchDispatchMode):
    """Base of modes that see every operator in a block, in ``__torch_dispatch__``.

    By default torch guards such a mode against compilation, and imports its compiler for that.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Weightless(OperatorMode):
    """Computes the shapes of small results on zeros, and leaves out what only fills a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        away = any(tensor.device.type == "meta" for tensor in tensors)
        if not away and given.get("device") == torch.device("meta"):
            return _created(func, args, given)
        if not away or func.is_view or given.get("device") is not None or VALUES & set(func.tags):
            return func(*args, **given)
        if torch.Tag.inplace in func.tags and args[0].device.type == "meta":
            return args[0]
        if _largest_result(tensors, args) > LARGEST:
            return func(*args, **given)
        try:
            result = func(*tree_map_only(Tensor, _zeros, args), **tree_map_only(Tensor, _zeros, given))
        except Exception:
            # What zeros cannot answer, such as an inverse, the shapes alone may.
            return func(*args, **given)
        return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), result)


@contextmanager
def weightless() -> Iterator[None]:
    """Put what is created in a block on torch's meta device, where tensors have shapes and take no memory."""
    with torch.device("meta"), _Weightless():
        yield


def _zeros(tensor: Tensor) -> Tensor:
    """Return what has the shape of a tensor of the meta device and a single element in memory."""
    if tensor.device.type != "meta":
        return tensor
    return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def _created(func: Any, args: Any, given: dict[str, Any]) -> Any:
    """Create a tensor on the meta device; some ways of it are written in Python in torch."""
    name = func.overloadpacket.__name__
    if name in ("randn", "randint"):
        size = next(arg for arg in args if isinstance(arg, (list, tuple)))
        dtype = given.get("dtype") or (torch.int64 if name == "randint" else torch.get_default_dtype())
        return torch.empty(size, dtype=dtype, device="meta")
    if name in ("arange", "linspace", "logspace"):
        return func(*args, **{**given, "device": "cpu"}).to("meta")
    return func(*args, **given)


def _largest_result(tensors: list[Tensor], args: Any) -> int:
    """Return a bound for the elements of an operator's result: broadcasting and repeating multiply."""
    numbers = [abs(item) for arg in args if isinstance(arg, (list, tuple)) for item in arg if isinstance(item, int)]
    if len({tensor.shape for tensor in tensors if tensor.dim() > 0}) < 2 and not numbers:
        return sum(tensor.numel() for tensor in tensors)
    return math.prod(max(1, factor) for factor in (*numbers, *(tensor.numel() for tensor in tensors)))
