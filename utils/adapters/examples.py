"""Inputs made up for a plan: token ids, images, features, and what follows from them; a user's own, looked into."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor
from utils.adapters.detection import config_number, kind_by_name
from utils.adapters.nesting import flattened
from utils.adapters.plans import InputPlan
from utils.adapters.roles import are_twins, role_of
from utils.adapters.spec import ModelSpec
from utils.runtime.errors import ConfigError

STEPS = 10
"""Time steps of a diffusion model that certainly exist."""


def made_up(
    plan: InputPlan,
    name: str,
    batch_size: int,
    length: int,
    draw_ids: Callable[[str, tuple[int, ...]], Tensor],
    real: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """Make one input.

    Args:
        plan: How the model is called.
        name: The input.
        batch_size: Number of samples.
        length: Tokens per sample, where there are tokens.
        draw_ids: Draws legal token ids of a shape for an input.
        real: Dtype of real values.
        generator: Draws them.
    """
    main, last = plan.names[0], name.rsplit(".", 1)[-1]
    tokens = plan.modality == "tokens"
    shape = (batch_size, *plan.shape.value, length) if tokens else (batch_size, *plan.shape.value)
    steps = length if tokens else plan.shape.value[0] if len(plan.shape.value) == 2 else length
    role = role_of(name) if name != main else None
    if role == "mask":
        return torch.ones(shape if tokens else (batch_size, steps), dtype=torch.long)
    if role == "padding":
        return torch.zeros(shape if tokens else (batch_size, steps), dtype=torch.bool)
    if role == "segments":
        return torch.zeros(shape, dtype=torch.long)
    if role == "positions":
        return torch.arange(steps).expand((*shape[:-1], steps) if tokens else (batch_size, steps))
    if role == "lengths":
        return torch.full((batch_size,), steps, dtype=torch.long)
    if role == "steps":
        return torch.randint(STEPS, (batch_size,), generator=generator)
    if role == "labels":
        return draw_ids(main, shape) if tokens and plan.labels_per_token else torch.zeros(batch_size, dtype=torch.long)
    if name in plan.other_shapes:
        return torch.randint(2, (batch_size, *plan.other_shapes[name]), generator=generator)
    if tokens or (last.endswith("_ids") and not are_twins(main, name)) or kind_by_name(last) == "tokens":
        return draw_ids(name, shape if tokens else (batch_size, length))
    return torch.randn((batch_size, *plan.shape.value), generator=generator, dtype=real)


def check_examples(module: nn.Module, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Look for what is wrong with a user's inputs that do not run: ids that no table has, or that are no ids.

    Args:
        module: The model.
        spec: What the user said.
        config: The model's settings; ids that they promise are the model's to read.

    Raises:
        ConfigError: A table is asked for what one of these inputs holds and no table can have.
    """
    if spec.example_inputs is None:
        return
    tensors = {name: value for name, value in flattened(spec.example_inputs).items() if isinstance(value, Tensor)}
    stated = config_number(config, "vocab_size")
    promised = max(spec.vocab_size or 0, stated.value if stated else 0)
    asked: list[tuple[str, int, Tensor]] = []
    handles, rows = [], 0
    for name, child in module.named_modules():
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)):
            rows = max(rows, child.num_embeddings)

            def hook(table: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                ids = first_tensor((*args, *kwargs.values()))
                if ids is not None:
                    asked.append((name, table.num_embeddings, ids.detach().clone()))

            handles.append(child.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        # Only the model's own code may fail here, as it is known to; what it asked for is judged afterwards.
        with suppress(Exception), torch.no_grad():
            module(**spec.example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, size, ids in asked:
        if wrong := _wrong_ids(tensors, name, max(size, promised), ids):
            raise ConfigError(
                f"{wrong}.",
                f"Expected whole numbers from 0 on, below the rows of the table (the largest has {rows}).",
                "Correct example_inputs, or the table if it should have more rows.",
            )


def _wrong_ids(tensors: Mapping[str, Tensor], table: str, size: int, ids: Tensor) -> str | None:
    """Say what is wrong with ids that a table of a size was asked for; None if nothing, or if no input holds them."""
    own = next((key for key, value in tensors.items() if _same(value, ids)), None)
    if own is None or not ids.numel():
        return None
    if ids.is_floating_point():
        return f"ModelSpec.example_inputs[{own!r}] is {str(ids.dtype)[6:]}, and `{table}` looks rows up by it"
    low, high = int(ids.min()), int(ids.max())
    if low >= 0 and high < size:
        return None
    return f"ModelSpec.example_inputs[{own!r}] holds the id {low if low < 0 else high}, and `{table}` reads it"


def _same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers, whatever their shapes."""
    if first.numel() != second.numel() or first.device != second.device or first.is_meta:
        return False
    return bool((first.reshape(-1) == second.reshape(-1)).all())
