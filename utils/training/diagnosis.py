"""Where a number that is not finite first appeared."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.adapters.capture import first_tensor, observe
from utils.runtime.isolation import preserved
from utils.training.evaluation import objective

if TYPE_CHECKING:
    from utils.training.training_module import TrainingModule


def culprit(module: "TrainingModule", batch: dict[str, Tensor]) -> str:
    """Say in words which module of a model first puts out, or which parameter gets, a number that is not finite.

    The batch is run again with the same random draws; the model and its gradients are left as they are.
    """
    bad = [name for name, p in module.model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    with preserved(module.model, module.config.seed, "batch", module.batch_number, module.global_rank):
        found = first_not_finite(module, batch)
    if found:
        return f" (first in what {found} puts out)"
    # Backward runs from the last module to the first: the last bad parameter was the first to become so.
    return f" (the forward pass is finite; first in the gradient of {bad[-1]})" if bad else ""


def first_not_finite(module: "TrainingModule", batch: dict[str, Tensor]) -> str | None:
    """Return the name of the first module whose output is not finite although its inputs are."""
    names: list[str] = []

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None and tensor.is_floating_point() and not _finite(tensor):
            names.append(name or type(child).__name__)

    with torch.no_grad(), observe(module.model, note):
        module.model.train()
        objective(module.adapter, module.data, batch, 0)
    return names[0] if names else None


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
