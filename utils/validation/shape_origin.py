"""Which module's own code goes wrong when a shape is refused: not the one that is handed the ruins.

A model runs once on a shape that works and once on the one that does not. A module is to blame when what it was given
has followed the batch and the length as it should, and what it returns, or its crash, has not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import named_tensors
from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.seeding import seed_streams

SLACK = 2
"""Lengths of internal tensors may differ from the input's by a class token or two, a shift, or rounding."""
LARGEST_BATCH = 3
"""Sizes up to this are batches, which nothing rounds."""
Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """The sizes that may follow from one run to another: ``(there, here)`` pairs."""

    pairs: tuple[tuple[int, int], ...]

    def fits(self, there: int, here: int) -> bool:
        """Tell whether a dimension is the same, or has followed one of the sizes."""
        if there == here:
            return True
        for old, new in self.pairs:
            if there * new == here * old:
                return True
            # Strides round, and a text may have gained a class token or lost its last position.
            if old > LARGEST_BATCH and abs(here - there * new / old) <= SLACK:
                return True
        return False

    def follows(self, there: Shapes, here: Shapes) -> bool:
        """Tell whether shapes are as they should be, given those of the run that worked."""
        if len(there) != len(here):
            return True
        batch, now = self.pairs[0]
        if batch != now and any(
            old[:1] == new[:1] == (batch,) and old != new and (batch, now) not in zip(old, new, strict=False)
            for old, new in zip(there, here, strict=True)
        ):
            # The other dimensions have followed and the samples have not.
            return False
        return all(
            len(old) == len(new) and all(self.fits(a, b) for a, b in zip(old, new, strict=True))
            for old, new in zip(there, here, strict=True)
        )

    def stale(self, there: Shapes, here: Shapes) -> bool:
        """Tell whether one input has kept the other run's batch size while another has followed."""
        batch = self.pairs[0][0]
        if self.pairs[0][0] == self.pairs[0][1] or len(there) != len(here) or len(there) < 2:
            return False
        kept = [old for old, new in zip(there, here, strict=True) if old == new and batch in old[:2]]
        moved = [old for old, new in zip(there, here, strict=True) if old != new and batch in old]
        return bool(kept and moved)


def shape_origin(adapter: ModelAdapter, good: Mapping[str, Any], bad: Mapping[str, Any]) -> str:
    """Return the name of the innermost module whose own code does not follow the input's shape.

    Args:
        adapter: The model.
        good: Inputs that run.
        bad: Inputs of the same kind and another shape that crash, or give a wrong shape.
    """
    sizes = Sizes(tuple(_pairs(adapter, good, bad)))
    given: dict[tuple[str, int], Shapes] = {}
    returned: dict[tuple[str, int], Shapes] = {}
    _watch(adapter, good, given.__setitem__, returned.__setitem__)
    culprits: list[str] = []
    running: list[tuple[str, bool]] = []

    def enter(call: tuple[str, int], shapes: Shapes) -> None:
        known = given.get(call, shapes)
        running.append((call[0], sizes.follows(known, shapes) and not sizes.stale(known, shapes)))

    def leave(call: tuple[str, int], shapes: Shapes) -> None:
        name, sound = running.pop()
        if sound and not sizes.follows(returned.get(call, shapes), shapes):
            culprits.append(name)

    _watch(adapter, bad, enter, leave)
    crashed = [name for name, sound in reversed(running) if sound]
    return next(iter([*culprits, *crashed]), "") or adapter.name


def _pairs(adapter: ModelAdapter, good: Mapping[str, Any], bad: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the sizes that differ or may be multiplied: the batch, the length or side, both together."""
    there, here = good[adapter.main_input].shape, bad[adapter.main_input].shape
    yield there[0], here[0]
    for old, new in zip(there[1:], here[1:], strict=False):
        yield old, new
        yield there[0] * old, here[0] * new


def _watch(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    enter: Callable[[tuple[str, int], Shapes], None],
    leave: Callable[[tuple[str, int], Shapes], None],
) -> None:
    """Run the model and report each call of each module, and the shapes it was given and returned."""
    counts: dict[str, int] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            counts[name] = counts.get(name, -1) + 1
            enter((name, counts[name]), _shapes((args, kwargs)))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            leave((name, counts[name]), _shapes(output))

        return hook

    for name, child in adapter.module.named_modules():
        handles.append(child.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(child.register_forward_hook(after(name)))
    try:
        seed_streams(0, "forward")
        with torch.no_grad():
            adapter.forward(inputs)
    except Exception:
        # The crash is what is being looked into.
        return
    finally:
        for handle in handles:
            handle.remove()


def _shapes(value: Any) -> Shapes:
    return [tuple(tensor.shape) for _, tensor in named_tensors(value) if isinstance(tensor, Tensor)]
