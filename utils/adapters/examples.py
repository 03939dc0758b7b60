"""Inputs made up for a plan: token ids, images, features, and what follows from them."""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.adapters.detection import kind_by_name
from utils.adapters.plans import InputPlan
from utils.adapters.roles import are_twins, role_of

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
