"""Optimizers and learning-rate schedules: what changes the weights, and by how much at which step."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from utils.training.config import TrainingConfig

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
"""Layers whose parameters scale and shift features one by one; a class of the user's own tells by its name."""
MIXING = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase)
"""Layers whose parameters with two axes or more are matrices."""


def learning_rate_share(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step as a share of the peak.

    All schedules begin with a linear warm-up. Then ``cosine`` follows half a cosine (Loshchilov & Hutter,
    arXiv:1608.03983) and ``linear`` a straight line from the peak, in the first step after the warm-up, to the final
    share, in the last step; ``wsd`` stays at the peak and takes that line over the last `config.decay_share` of the
    steps (Hu et al., arXiv:2404.06395); ``constant`` stays. A run of one step takes the peak.

    Args:
        step: Number of the step, from 0.
        total_steps: How many there are.
        config: The schedule's settings.
    """
    warmup = round(config.warmup_share * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    final, start, last = config.final_learning_rate_share, warmup, total_steps - 1
    if config.schedule == "wsd":
        falling = max(1, round(config.decay_share * total_steps)) if config.decay_share else 0
        start = max(warmup, total_steps - falling)
    if config.schedule == "constant" or last == 0 or step < start:
        return 1.0
    if step >= last:
        # Exactly, and also where the last step is the only one after the warm-up.
        return final if start <= last else 1.0
    progress = (step - start) / (last - start)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return final + (1 - final) * left


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not, with their names.

    Matrices and larger tensors decay. What scales or shifts features one by one does not, whatever its shape: decay is
    decoupled from the gradient (Loshchilov & Hutter, arXiv:1711.05101) and would pull gains towards zero, not one.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decaying = {name for name, p in trainable if _decays(module.get_submodule(name.rpartition(".")[0]), p)}
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in trainable if name in decaying], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in trainable if name not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _decays(owner: nn.Module, parameter: Tensor) -> bool:
    """Tell whether a parameter mixes features: it has two axes at least, and its owner does not normalise.

    Axes of length one do not count, such as those of a gain ``(channels, 1, 1)``, but in a layer that is known to
    multiply by matrices, which may have one input or output only.
    """
    if isinstance(owner, NORMS) or type(owner).__name__.endswith("Norm"):
        return False
    return (parameter.dim() if isinstance(owner, MIXING) else sum(size > 1 for size in parameter.shape)) >= 2


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over a model's trainable parameters, fused into one kernel where torch has one."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    # On a CPU the kernel takes plain tensors; parameters that are divided among devices are not.
    fused = all(p.is_cuda or (p.device.type == "cpu" and type(p.data) is Tensor) for p in trainable)
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay),
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        fused=(fused and all(p.is_floating_point() for p in trainable)) or None,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, config: TrainingConfig, restarts: Sequence[int] = ()
) -> LambdaLR:
    """Return the schedule of an optimizer over a run.

    Args:
        optimizer: The optimizer.
        total_steps: Steps of the run.
        config: The schedule's settings.
        restarts: Steps at which it begins anew, for the steps up to the next one; ascending.
    """
    borders = (0, *restarts, total_steps)

    def share(step: int) -> float:
        part = min(bisect_right(borders, step), len(borders) - 1)
        return learning_rate_share(step - borders[part - 1], borders[part] - borders[part - 1], config)

    return LambdaLR(optimizer, share)
