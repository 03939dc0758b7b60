"""Kinds of tensor operations by name, and small questions about their arguments."""

import math
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

REARRANGING = frozenset((
    "view", "reshape", "transpose", "permute", "contiguous", "clone", "to", "float", "half", "double", "bfloat16",
    "type", "type_as", "squeeze", "unsqueeze", "flatten", "unflatten", "expand", "expand_as", "swapaxes",
    "swapdims", "movedim", "moveaxis", "detach", "dropout", "t", "view_as", "view_as_complex", "view_as_real",
    "get", "nan_to_num", "cuda", "cpu", "alias", "adjoint", "requires_grad",
))  # fmt: skip
"""What moves numbers about and changes none, at least in eval mode; ``get`` is an attribute such as ``.mT``."""
CUTTING = frozenset((
    "getitem", "narrow", "select", "index_select", "gather", "chunk", "split", "tensor_split", "unbind", "neg",
    "negative", "roll", "flip", "pad", "repeat", "repeat_interleave", "unfold", "tile", "hsplit", "take_along_dim",
))  # fmt: skip
"""What keeps some of the numbers, or repeats them."""
ADDING = frozenset(("add", "sub", "subtract", "radd", "iadd", "isub", "rsub"))
JOINING = frozenset(("cat", "concat", "concatenate", "stack"))
NORMALISING = frozenset((
    "layer_norm", "rms_norm", "normalize", "group_norm", "instance_norm", "batch_norm",
))  # fmt: skip
BOUNDED = frozenset((
    "tanh", "sigmoid", "softsign", "atan", "arctan", "hardtanh", "sin",
))  # fmt: skip
MASKING = frozenset((
    "masked_fill", "where", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "max", "min",
    "masked_scatter",
))  # fmt: skip
CASTS = frozenset(("to", "float", "type", "type_as", "half", "bfloat16", "double"))
ALMOST_NOTHING = 1e4
"""Scores clamped this far out are masked, not bounded."""


def flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Any]:
    """Yield arguments and the members of lists among them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def results(result: Any) -> list[Tensor]:
    """Return the tensors of a result that may be a tuple."""
    if isinstance(result, Tensor):
        return [result]
    return [item for item in result if isinstance(item, Tensor)] if isinstance(result, (tuple, list)) else []


def constant(value: Any) -> float | None:
    """Return a number or the one number that a constant tensor holds; None if it holds several."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Tensor) or value.is_complex() or value.is_meta or not value.numel():
        return None
    low, high = torch.aminmax(value.detach().float())
    return float(low) if float(low) == float(high) else None


def fused_weights(given: Mapping[str, Any]) -> tuple[Tensor, Tensor, float, Tensor]:
    """Recompute what `scaled_dot_product_attention` keeps to itself.

    Args:
        given: Its arguments by name.

    Returns:
        Queries ``(..., query, dim)`` and keys ``(..., key, dim)`` in float32, keys repeated for grouped queries; the
        scale; and the weights ``(..., query, key)``, zero in rows that may look nowhere.
    """
    q, k = given["query"].detach().float(), given["key"].detach().float()
    if given.get("enable_gqa") and k.dim() > 2 and k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    stated, mask = given.get("scale"), given.get("attn_mask")
    scale = float(stated) if stated is not None else 1 / math.sqrt(max(1, q.shape[-1]))
    scores = (q @ k.transpose(-2, -1)) * scale
    if given.get("is_causal"):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.detach()
    return q, k, scale, scores.softmax(-1).nan_to_num(0.0)


def moved(axis: int, shape: torch.Size, stride: tuple[int, ...], after: Tensor, shared: bool) -> int | None:
    """Return where an axis went, counted from the end; None when that cannot be told."""
    size = shape[axis]
    if shared and size > 1:
        found = [
            i
            for i, (s, n) in enumerate(zip(after.stride(), after.shape, strict=True))
            if s == stride[axis] and n == size
        ]
        return found[0] - after.dim() if len(found) == 1 else None
    tail = len(shape) + axis
    return axis if after.dim() >= -axis and after.shape[axis:] == shape[tail:] else None


def is_function(child: nn.Module) -> bool:
    """Tell whether a module is only a function of torch in disguise, such as nn.Softmax, which its owner configured."""
    plain = next(child.parameters(), None) is None and next(child.children(), None) is None
    return plain and type(child).__module__.startswith("torch.nn.modules.")


def opened(function: Any) -> Any:
    """Return a copy of a function of torch that does not hand itself over to modes, so that its inside is seen."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


OPENED_MULTI_HEAD = opened(functional.multi_head_attention_forward)
"""`multi_head_attention_forward`, whose arithmetic a mode can see."""
