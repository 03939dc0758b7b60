"""Optimizers and learning-rate schedules: what changes the weights, and by how much at which step."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from utils.training.config import TrainingConfig


def learning_rate_share(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step as a share of the peak.

    All schedules begin with a linear warm-up. Then ``cosine`` follows half a cosine (Loshchilov & Hutter,
    arXiv:1608.03983) and ``linear`` a straight line to the final share; ``wsd`` stays at the peak and falls in a
    straight line over the last `config.decay_share` of the steps (Hu et al., arXiv:2404.06395); ``constant`` stays.
    """
    warmup = round(config.warmup_share * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    final = config.final_learning_rate_share
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        warmup = max(warmup, total_steps - round(config.decay_share * total_steps))
    progress = min(1.0, max(0, step - warmup) / max(1, total_steps - warmup))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return final + (1 - final) * left


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters into those that decay and those that do not, with their names.

    Matrices and larger tensors decay; vectors (norms, biases, gains) do not: decay is decoupled from the gradient
    (Loshchilov & Hutter, arXiv:1711.05101) and would pull gains towards zero, not one.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [(name, p) for name, p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over a model's trainable parameters; fused into one kernel on a GPU, where that is faster."""
    first = next((p for p in module.parameters() if p.requires_grad), None)
    fused = first is not None and first.is_cuda
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay),
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        fused=fused or None,
    )


def make_schedule(optimizer: torch.optim.Optimizer, total_steps: int, config: TrainingConfig) -> LambdaLR:
    """Return the schedule of an optimizer over a run of `total_steps` steps."""
    return LambdaLR(optimizer, lambda step: learning_rate_share(step, total_steps, config))
