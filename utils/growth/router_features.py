"""What a router of domains reads: the mean of a sample's features in the parent's trunk, run no further than that."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import first_tensor
from utils.adapters.roles import role_of
from utils.adapters.structure import structure
from utils.growth.clone_record import CloneError, DomainClone


class Enough(BaseException):
    """Ends a forward pass early; no handler of the model's own code for errors takes it for one."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
    """Hand over what a module returned, or was given."""
    state = first_tensor((args, kwargs) if output is None else output)
    if state is not None and state.is_floating_point():
        raise Enough(state)


def place(adapter: ModelAdapter, clones: Sequence[DomainClone], wanted: str | None) -> tuple[str, bool]:
    """Name the module that the router reads; and whether it reads what that one is given."""
    if wanted is not None:
        if wanted not in dict(adapter.module.named_modules()):
            raise CloneError(
                f"{adapter.name} has no module {wanted!r} for the router to read.",
                "features_at is the full name of a module.",
                "model.named_modules() lists all names.",
            )
        return wanted, False
    cuts = {clone.record.cut for clone in clones}
    if len(cuts) == 1 and (cut := cuts.pop()) is not None:
        return cut, False
    found = structure(adapter)
    if found.blocks.value:
        return found.blocks.value[-1], False
    if found.head.value:
        return found.head.value, True
    raise CloneError(
        f"{adapter.name} has no blocks and no head ({found.head.reason}).",
        "Expected one: the router reads what comes out of the blocks or goes into the head.",
        "Name a module with features_at=....",
    )


def pooled(state: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the mean over places ``(batch, width)``, of channels first for images and last else."""
    if state.dim() > 3:
        return state.flatten(2).mean(dim=2)
    if state.dim() == 2:
        return state
    for name, value in inputs.items():
        role = role_of(name)
        if role in ("mask", "padding") and isinstance(value, Tensor) and value.shape == state.shape[:2]:
            counts = (value == 0 if role == "padding" else value != 0).to(state)[..., None]
            return (state * counts).sum(dim=1) / counts.sum(dim=1).clamp_min(1)
    return state.mean(dim=1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block with a module in eval mode, and give every part its mode back."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
