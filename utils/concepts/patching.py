"""A model's answers while one of its layers is made to say something else."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.activations import as_table, counted_positions, layer_named, pooled_rows
from utils.adapters.capture import first_tensor, unfused_attention
from utils.runtime.errors import AdapterError

Change = Callable[[Tensor], Tensor]
"""From rows ``(n, width)`` to rows of the same shape."""


@contextmanager
def changed(
    adapter: ModelAdapter, layer: str, change: Change, content: Tensor, *, side: str = "output", flat: bool = False,
    channels: int | None = None,
) -> Iterator[None]:  # fmt: skip
    """Put what `change` returns in the place of what a layer makes, or reads, while the block runs.

    Args:
        adapter: The model.
        layer: Qualified name.
        change: Is given a row for each position of each sample.
        content: The main input of the forward passes in the block, which tells samples and features apart.
        side: ``"output"`` of the layer, or its ``"input"``.
        flat: Give `change` a row for each sample instead, all its positions after each other.
        channels: The axis of features, where the shape leaves it open.

    Raises:
        ConfigError: No such layer.
        AdapterError: The layer makes no tensor with the samples of a batch, or `change` returns another shape.
    """

    def replaced(tensor: Tensor) -> Tensor:
        table, _ = as_table(tensor, content, layer, channels)
        rows = table.flatten(1) if flat else table.flatten(0, 1)
        made = change(rows)
        if made.shape != rows.shape:
            raise AdapterError(
                f"Rows of shape {tuple(rows.shape)} of `{layer}` were changed to {tuple(made.shape)}.",
                "Expected the same shape.",
                "Return a row for each row.",
            )
        # The table is a rearrangement of the tensor's entries; their numbers, rearranged alike, lead back.
        numbers = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
        places, _ = as_table(numbers, content, layer, channels)
        back = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        back[places.flatten()] = made.to(tensor.dtype).flatten()
        return back.view(tensor.shape)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return with_first(output, replaced)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if first_tensor(args) is not None:
            return with_first(args, replaced), kwargs
        return args, with_first(kwargs, replaced)

    child = layer_named(adapter.module, layer)
    handle = (
        child.register_forward_hook(after)
        if side == "output"
        else child.register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        with unfused_attention():
            yield
    finally:
        handle.remove()


def pooled_answers(adapter: ModelAdapter, inputs: Mapping[str, Tensor], pool: str = "last") -> Tensor:
    """Return the logits of each sample, float32 ``(batch, outputs)`` on the CPU.

    Args:
        adapter: The model.
        inputs: By name.
        pool: ``"last"`` or ``"mean"`` of the real positions of a causal language model; elsewhere it is the mean.

    Raises:
        DataError: A mask hides positions, and does not fit those of the logits.
    """
    placed = {name: value.to(adapter.device) for name, value in inputs.items()}
    logits = adapter.logits(placed)
    if logits.ndim > 2:
        content = placed[adapter.main_input]
        is_text = adapter.modality == "tokens"
        table, _ = as_table(logits, content, "the model", logits.ndim - 1 if is_text else None)
        how = pool if adapter.task.value == "causal_lm" else "mean"
        logits, _, _ = pooled_rows(table, counted_positions(placed, table, "the model"), how)
    return (logits if logits.ndim == 2 else logits[:, None]).float().cpu()


def answers(
    adapter: ModelAdapter, batches: Iterable[Mapping[str, Tensor]], layer: str = "", change: Change | None = None, *,
    pool: str = "last", side: str = "output", flat: bool = False, channels: int | None = None,
) -> Tensor:  # fmt: skip
    """Return the pooled logits of all samples, with a layer changed or as it is; the caller preserves the model.

    Raises:
        DataError: A mask hides positions, and does not fit those of the logits.
    """
    rows = []
    for inputs in batches:
        if change is None:
            rows.append(pooled_answers(adapter, inputs, pool))
            continue
        content = inputs[adapter.main_input]
        with changed(adapter, layer, change, content, side=side, flat=flat, channels=channels):
            rows.append(pooled_answers(adapter, inputs, pool))
    return torch.cat(rows)


def with_first(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested value with its first tensor changed, and everything else as it is."""
    done = False

    def visit(item: Any) -> Any:
        nonlocal done
        if done:
            return item
        if isinstance(item, Tensor):
            if item.is_nested:
                return item
            done = True
            return change(item)
        if isinstance(item, Mapping):
            made = {key: visit(part) for key, part in item.items()}
            return made if type(item) is dict else type(item)(**made)
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            return type(item)(*map(visit, item))
        if isinstance(item, (tuple, list)):
            return type(item)(map(visit, item))
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            names = [field.name for field in dataclasses.fields(item) if field.init]
            return dataclasses.replace(item, **{name: visit(getattr(item, name)) for name in names})
        return item

    return visit(value)
