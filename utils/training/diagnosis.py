"""Where a number that is not finite first appeared."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import first_tensor, observe
from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.runtime.errors import RunError
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.training.batching import collate
from utils.training.evaluation import held_out_seeds, masking_seed, objective
from utils.training.prepared_data import PreparedData
from utils.training.sharding import whole

if TYPE_CHECKING:
    from utils.training.training_module import TrainingModule


class NotFiniteError(RunError):
    """A loss or a gradient is not finite."""


def not_finite(
    module: "TrainingModule", what: str, value: float | None, batches: Sequence[int], where: str
) -> NotFiniteError:
    """Return the error that says what was not finite, and where.

    Args:
        module: What trains.
        what: The number.
        value: What it was; None where that was not kept.
        batches: Numbers of the batches that it is from, all of one step.
        where: What `culprit` says.
    """
    first, last = batches[0], batches[-1]
    place = f"batch {first}" if first == last else f"batches {first} to {last}"
    return NotFiniteError(
        f"The {what} is {'not finite' if value is None else value} in {place} of step "
        f"{last // module.config.accumulate + 1}{where}.",
        "Expected a finite number; the last good state is kept.",
        "Lower the learning rate, and run utils.validate on the model.",
    )


def culprit(module: "TrainingModule", batch: dict[str, Tensor], number: int | None = None) -> str:
    """Say in words which module of a model first puts out, or which parameter gets, a number that is not finite.

    The batch is run again with the same random draws, masking too; the model and its gradients are left as they are.

    Args:
        module: What trains, with the weights of the failure, and with its gradients if it still has them.
        batch: The batch that failed, or the last of its step.
        number: Its number; None for the one under way.
    """
    number = module.batch_number if number is None else number
    called: list[str] = []
    bad = _bad_gradients(module.model)
    gone = all(parameter.grad is None for parameter in module.model.parameters())
    with preserved(module.model, module.config.seed, "batch", number, module.global_rank):
        found = first_not_finite(module, batch, number, called)
        if not found and gone and getattr(module, "alone", False):
            seed = masking_seed(module.config.seed, number, module.global_rank)
            with torch.enable_grad():
                objective(module.adapter, module.data, batch, seed)[0].backward()
            bad = _bad_gradients(module.model)
    if found:
        return f" (first in what {found} puts out)"
    if not bad:
        return ""
    # Backward runs from the last module to the first: what was called last among the bad ones was the first to become
    # so. A module that holds others is called around them, and so tells less than they do.
    inner = [name for name in bad if not list(module.model.get_submodule(name.rpartition(".")[0]).children())]
    ended = {name: place for place, name in enumerate(called)}
    # Of one module, the parameter that was made last.
    last = max(reversed(inner or bad), key=lambda name: ended.get(name.rpartition(".")[0], -1))
    return f" (the forward pass is finite; first in the gradient of {last})"


def first_not_finite(
    module: "TrainingModule", batch: dict[str, Tensor], number: int | None = None, called: list[str] | None = None
) -> str | None:
    """Return the name of the first module whose output is not finite although its inputs are.

    Args:
        module: What trains.
        batch: What is run.
        number: Its number; None for the one under way.
        called: Gets the names of all modules in the order in which they end.
    """
    module.model.train()
    number = module.batch_number if number is None else number
    seed = masking_seed(module.config.seed, number, module.global_rank)
    names, _ = _not_finite(module.adapter, module.data, batch, seed, called)
    return names[0] if names else None


def _bad_gradients(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.grad is not None and not _finite(whole(p.grad))]


def held_out_culprit(
    adapter: ModelAdapter,
    data: PreparedData,
    batch_size: int,
    seed: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    weights: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> str:
    """Say in words what makes the held-out loss not finite; the model and the random streams are left as they were.

    Args:
        adapter: The model, whose training loss is finite.
        data: Where the held-out samples are.
        batch_size: Samples per forward pass, as in the measurement; so are `seed` and `context`.
        seed: Seed of the masking.
        context: Makes the context of each forward pass, for mixed precision.
        weights: Makes the context in which the model holds the weights that were measured.
    """
    device = adapter.device

    def batch_of(samples: dict[str, Tensor], start: int) -> dict[str, Tensor]:
        chosen = torch.arange(start, min(start + batch_size, len(next(iter(samples.values())))))
        return {name: tensor.to(device) for name, tensor in collate(samples, chosen).items()}

    with preserved(adapter.module, seed, "diagnosis"), context():
        adapter.module.train()
        # What is infinite in training too, such as a mask that a module of its own makes, does no harm.
        harmless, _ = _not_finite(adapter, data, batch_of(data.train, 0), derive_seed(seed, "diagnosis"))
    answered = False
    with weights(), preserved(adapter.module, seed, "validation"):
        adapter.module.eval()
        for start in range(0, data.validation_samples, batch_size):
            with context():
                batch = batch_of(data.validation, start)
                seeds = held_out_seeds(seed, torch.arange(start, start + len(batch["labels"])))
                names, labels = _not_finite(adapter, data, batch, seeds)
            answered = answered or data.task in REAL_VALUED or bool((labels != IGNORED).any())
            guilty = [name for name in names if name not in harmless]
            if guilty:
                return f"in eval mode {guilty[0]} is the first module whose output is not finite"
    if not answered:
        return "no held-out sample has anything to predict"
    return "the output of every module is finite in eval mode where it is in training"


def _not_finite(
    adapter: ModelAdapter,
    data: PreparedData,
    batch: dict[str, Tensor],
    seed: int | Sequence[int],
    called: list[str] | None = None,
) -> tuple[list[str], Tensor]:
    """Run a batch in the present mode; return the modules whose output is not finite, and the batch's labels.

    Minus infinity alone is what masks are made of: such modules come last.
    """
    names: list[str] = []
    doubtful: list[str] = []

    def note(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if called is not None:
            called.append(name)
        tensor = first_tensor(output)
        if tensor is not None and tensor.is_floating_point() and not _finite(tensor):
            certain = not _finite(tensor.clamp(min=torch.finfo(tensor.dtype).min))
            (names if certain else doubtful).append(name or type(child).__name__)

    with torch.no_grad(), observe(adapter.module, note):
        _, _, labels = objective(adapter, data, batch, seed)
    return names + doubtful, labels


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
