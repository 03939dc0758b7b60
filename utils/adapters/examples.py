"""Inputs made up for a plan: token ids, images, features, and what follows from them; a user's own, looked into."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

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
    found: list[str] = []

    def look(name: str, table: nn.Embedding | nn.EmbeddingBag, asked: Tensor) -> None:
        own = next((key for key, value in tensors.items() if _same(value, asked)), None)
        if own is None or found or not asked.numel():
            return
        if asked.is_floating_point():
            found.append(
                f"ModelSpec.example_inputs[{own!r}] is {str(asked.dtype)[6:]}, and `{name}` looks rows up by it"
            )
            return
        low, high = int(asked.min()), int(asked.max())
        if low < 0 or high >= max(table.num_embeddings, promised):
            wrong = low if low < 0 else high
            found.append(f"ModelSpec.example_inputs[{own!r}] holds the id {wrong}, and `{name}` reads it")

    handles, rows = [], 0
    for name, child in module.named_modules():
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)):
            rows = max(rows, child.num_embeddings)

            def hook(table: Any, args: tuple[Any, ...], name: str = name) -> None:
                if args and isinstance(args[0], Tensor):
                    look(name, table, args[0])

            handles.append(child.register_forward_pre_hook(hook))
    try:
        with suppress(Exception), torch.no_grad():
            module(**spec.example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        raise ConfigError(
            f"{found[0]}.",
            f"Expected whole numbers from 0 on, below the rows of the table (the largest has {rows}).",
            "Correct example_inputs, or the table if it should have more rows.",
        )


def _same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers, whatever their shapes."""
    return first.numel() == second.numel() and bool((first.reshape(-1) == second.reshape(-1)).all())
