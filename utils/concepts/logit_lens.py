"""What a model would answer if it stopped after each block: the logit lens of any stack of blocks.

nostalgebraist 2020, "interpreting GPT: the logit lens" (LessWrong), without naming norms or heads: the model runs again
with the output of its last block replaced by that of an earlier one, so that everything behind the last block, whatever
it is, reads the earlier state. Two trials say whether that is sound. Putting back the last block's own output must give
the model's logits; and doing so while the model reads another input must give them too, or they also depend on
something that goes past the blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import first_tensor, unfused_attention
from utils.adapters.structure import block_stacks, lone_blocks
from utils.concepts.patching import with_first
from utils.runtime.errors import AdapterError
from utils.runtime.isolation import preserved

SAME = 1e-4
"""Largest difference, as a share of the largest logit, up to which logits count as equal."""


@dataclass(frozen=True, eq=False)
class LensReading:
    """The logits that each block's state leads to."""

    layers: tuple[str, ...]
    """What goes into the first block, then the blocks in order of execution; a block that runs twice is there twice."""
    logits: Tensor
    """float32 ``(layers, batch, ...)`` on the CPU, in the shape of the model's logits; the last are the model's own."""
    faithful: bool
    """Whether the logits are a function of the last block's output alone."""
    difference: float
    """Largest difference from the model's logits when another input is read and the last block's output put back, as a
    share of the largest logit."""
    reason: str
    """How the layers were found, and why the lens is faithful or not."""
    skipped: tuple[str, ...]
    """Blocks whose output is of another shape than that of the last one: nothing behind it could read them."""


def logit_lens(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> LensReading:
    """Read a model's answer off each of its blocks; the model is left as it was.

    Args:
        adapter: The model.
        inputs: By the names of forward's arguments, batch first.

    Raises:
        AdapterError: The model has no stack of blocks that runs, or putting the last block's output back does not give
            its logits.
    """
    module = adapter.module
    stacks = block_stacks(module).value or [[name] for name in lone_blocks(module)[:1]]
    if not stacks:
        raise AdapterError(
            f"{adapter.name} has no repeated blocks.",
            "Expected a stack of blocks, after each of which its answer can be read.",
            "Look at its layers with `utils.adapters.activations.representations` instead.",
        )
    with preserved(module, 0, "lens"), torch.no_grad(), unfused_attention():
        module.eval()
        calls, own = _recorded(adapter, inputs, [name for stack in stacks for name in stack])
        if not calls:
            raise AdapterError(
                f"No block of {adapter.name} ran, or none returned a tensor.",
                "Expected blocks that the model calls.",
                "Check that forward calls its blocks as modules.",
            )
        last = calls[-1]
        stack = next(stack for stack in stacks if last.name in stack)
        # Of an encoder and a decoder, only the one that ends with the last block speaks its language.
        mine = [call for call in calls if call.name in stack]
        start = _Call("before the blocks", 0, mine[0].given, None)
        readable = [call for call in (start, *mine) if _fits(call.output, last.output)]
        with _replaced(module, last.output, last):
            again = adapter.logits(inputs).float().cpu()
        scale = float(own.abs().max().clamp_min(1e-6))
        if not float((again - own).abs().max()) <= SAME * scale:
            raise AdapterError(
                f"Putting back what `{last.name}` of {adapter.name} returned does not give its logits again.",
                "Expected that the model is deterministic, and that its last block hands on one tensor.",
                "A lens on this model would not show what it computes.",
            )
        with _replaced(module, last.output, last):
            apart = adapter.logits(_other(adapter, inputs)).float().cpu()
        difference = float((apart - own).abs().max()) / scale
        read = []
        for call in readable:
            with _replaced(module, call.output, last):
                read.append(adapter.logits(inputs).float().cpu())
    faithful = difference <= SAME
    how = (
        "with another input and the same output of the last block the logits are the same"
        if faithful
        else f"the logits also depend on what goes past the last block: another input moves them by {difference:.1%}"
    )
    counts = {call.name: call.number for call in mine}
    names = tuple(f"{call.name} #{call.number + 1}" if counts.get(call.name, 0) else call.name for call in readable)
    skipped = tuple(call.name for call in mine if not _fits(call.output, last.output))
    return LensReading(names, torch.stack(read), faithful, difference, f"{len(mine)} blocks ran; {how}", skipped)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a block."""

    name: str
    number: int
    """Which of its calls, from 0 on."""
    output: Tensor | None
    """The first tensor that it returned."""
    given: Tensor | None
    """The first tensor that it was given."""


def _recorded(adapter: ModelAdapter, inputs: Mapping[str, Any], names: list[str]) -> tuple[list[_Call], Tensor]:
    """Run the model and return the calls of some modules in order, and the logits."""
    calls: list[_Call] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found, given = first_tensor(output), first_tensor((*args, *kwargs.values()))
            if found is not None:
                number = sum(call.name == name for call in calls)
                # Blocks may write into what they were given later on.
                calls.append(_Call(name, number, found.clone(), None if given is None else given.clone()))

        return hook

    handles = [
        adapter.module.get_submodule(name).register_forward_hook(hook_for(name), with_kwargs=True) for name in names
    ]
    try:
        logits = adapter.logits(inputs).float().cpu()
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def _fits(tensor: Tensor | None, last: Tensor | None) -> bool:
    return tensor is not None and last is not None and tensor.shape == last.shape and tensor.dtype == last.dtype


@contextmanager
def _replaced(module: nn.Module, tensor: Tensor | None, seat: _Call) -> Iterator[None]:
    """Have one call of a block return another tensor first while the block of code runs."""
    calls = 0

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != seat.number + 1:
            return None
        assert tensor is not None
        put = tensor.clone()
        return with_first(output, lambda _: put)

    handle = module.get_submodule(seat.name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _other(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same inputs with another content."""
    content = inputs[adapter.main_input]
    if content.is_floating_point():
        changed = content.flip(-1) * 0.5 + content.abs().mean() + 0.25
    else:
        changed = (content + 1) % adapter.readable_ids()
    return {**inputs, adapter.main_input: changed}
