"""What a norm is, by behaviour: the operations of one are run again on numbers that are scaled and shifted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.adapters.lane_operations import tensors_in
from utils.adapters.operations import results

SAME = 1e-2
"""Relative change of the result up to which a norm counts as invariant; its epsilon moves it a little."""
SCALE, SHIFT = 100.0, 50.0
"""Size of the numbers, against which an epsilon is nothing, and how far they are shifted."""


@dataclass(frozen=True, eq=False)
class Node:
    """How a tensor was made."""

    order: int
    """When, counted from the start."""
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None
    """The operation and its arguments; None where the trail begins."""
    place: int = 0
    """Which of its results."""


def invariance(result: Tensor, first: int, node: Callable[[Tensor], Node | None]) -> tuple[str, Tensor] | None:
    """Tell what kind of norm a tensor is the result of.

    Args:
        result: The tensor.
        first: When the first statistic in it was taken; the norm's input is older.
        node: How a tensor was made; None for what does not depend on the model's input.

    Returns:
        ``"rms"`` when scaling the norm's input changes nothing, ``"layer"`` when shifting it does not either, and that
        input; None when it is no norm.
    """
    steps: list[Tensor] = []
    waiting = {id(result): result}
    while True:
        newest = max(waiting.values(), key=lambda tensor: _order(node(tensor)))
        known = node(newest)
        if known is None or (len(waiting) == 1 and known.order < first):
            break
        if known.call is None:
            return None
        steps.append(newest)
        del waiting[id(newest)]
        for tensor in tensors_in(known.call[1:]):
            if node(tensor) is not None:
                waiting[id(tensor)] = tensor
        if not waiting:
            return None
    if len(waiting) != 1:
        return None
    base = next(iter(waiting.values()))
    if not base.is_floating_point():
        return None

    def again(value: Tensor) -> Tensor:
        made = {id(base): value}
        for tensor in reversed(steps):
            known = node(tensor)
            assert known is not None
            assert known.call is not None
            function, args, kwargs = known.call
            found = function(*_replaced(args, made), **_replaced(kwargs, made))
            made[id(tensor)] = results(found)[known.place]
        return made[id(result)].double()

    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return SCALE * torch.randn(base.shape, generator=generator).to(base)

    try:
        numbers = drawn()
        plain, other = again(numbers), again(drawn())
        scaled, shifted = again(2 * numbers), again(numbers + SHIFT)
    except Exception:
        # What cannot be run again is not known to be a norm.
        return None
    size = float(plain.abs().max())
    if not torch.isfinite(plain).all() or not float((other - plain).abs().max()) > SAME * size:
        return None
    if not float((scaled - plain).abs().max()) <= SAME * size:
        return None
    return ("layer" if float((shifted - plain).abs().max()) <= SAME * size else "rms"), base


def _order(node: Node | None) -> int:
    return -1 if node is None else node.order


def _replaced(value: Any, made: dict[int, Tensor]) -> Any:
    """Put new tensors in the place of old ones among arguments."""
    if isinstance(value, Tensor):
        return made.get(id(value), value)
    if isinstance(value, dict):
        return {key: _replaced(one, made) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replaced(one, made) for one in value)
    return value
