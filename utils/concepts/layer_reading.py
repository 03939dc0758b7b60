"""One vector for each sample from several layers at once, with the gradients that training through them needs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.activations import Place, as_table, captured, counted_positions, pooled_rows, taken
from utils.adapters.capture import first_tensor, observe
from utils.adapters.structure import structure
from utils.runtime.errors import SeedbedError
from utils.runtime.isolation import preserved

Read = Callable[[Mapping[str, Tensor]], list[Tensor]]


@contextmanager
def reading(
    adapter: ModelAdapter, places: Sequence[Place], pool: str = "mean", channels: int | None = None
) -> Iterator[Read]:
    """Yield a function from a batch of inputs to what each place makes of its samples: ``(batch, width)``, float32.

    Modes and gradients are the caller's affair. Recurrent layers run without cuDNN inside, which refuses gradients in
    eval mode.

    The function raises DataError where a mask hides positions and does not fit what the layer makes.

    Raises:
        ConfigError: No such layer.
    """
    with ExitStack() as stack:
        if any(isinstance(child, nn.RNNBase) for child in adapter.module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        held = stack.enter_context(captured(adapter.module, places))

        def read(batch: Mapping[str, Tensor]) -> list[Tensor]:
            inputs = on_device(adapter, batch)
            held.clear()
            adapter.forward(inputs)
            vectors = []
            for place in places:
                tensor = taken(held, place, adapter)
                table, _ = as_table(tensor, inputs[adapter.main_input], place[0], channels)
                real = counted_positions(inputs, table, place[0], pool)
                rows, _, _ = pooled_rows(table, real, "mean" if pool == "auto" else pool)
                vectors.append(rows.float())
            return vectors

        yield read


def on_device(adapter: ModelAdapter, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch where the model is."""
    return {name: value.to(adapter.device) for name, value in batch.items()}


def spaced_layers(adapter: ModelAdapter, batch: Mapping[str, Tensor], count: int) -> list[str]:
    """Return layers at about even depths that make a vector of each sample, the first and the last among them.

    Repeated blocks, where there are two at least; else all layers with parameters of their own, in the order of calls.

    Args:
        adapter: The model.
        batch: Inputs of two samples at least.
        count: How many at most.
    """
    called: list[str] = []
    inputs = on_device(adapter, batch)

    def note(name: str, child: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None or not tensor.is_floating_point() or name in called:
            return
        try:
            as_table(tensor, inputs[adapter.main_input], name, None)
        except SeedbedError:  # it makes something else than a vector of each sample
            return
        called.append(name)

    with preserved(adapter.module, 0, "layers"), torch.no_grad():
        adapter.module.eval()
        with observe(adapter.module, note):
            adapter.forward(inputs)
    blocks = [name for name in structure(adapter).blocks.value if name in called]
    children = dict(adapter.module.named_modules())
    own = [name for name in called if name and next(children[name].parameters(recurse=False), None) is not None]
    names = blocks if len(blocks) > 1 else own
    if count < 2 or len(names) <= count:
        return names[-count:] if count else []
    return [names[round(number * (len(names) - 1) / (count - 1))] for number in range(count)]
