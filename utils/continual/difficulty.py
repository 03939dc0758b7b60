"""How hard each sample is: by its length, by the model's loss on it, or by a function of the user's."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.continual.curriculum import MEASURED
from utils.runtime.errors import ConfigError, DataError
from utils.runtime.isolation import preserved
from utils.training.batching import collate
from utils.training.evaluation import held_out_seeds, objective
from utils.training.prepared_data import PreparedData

Difficulty = Callable[[dict[str, Tensor]], Tensor]
"""Takes a batch as `utils.training.batching.collate` makes it, returns a number for each sample, harder ones larger."""
AT_ONCE = 256
"""Samples that a function sees together."""
_FUNCTIONS: dict[str, Difficulty] = {}


def register_difficulty(name: str, function: Difficulty) -> None:
    """Give a function a name under which the settings of a curriculum find it.

    Args:
        name: What ``CurriculumConfig.difficulty`` says.
        function: See `Difficulty`.

    Raises:
        ConfigError: The name is taken by a difficulty that needs no function, or the function cannot be called.
    """
    if not isinstance(name, str) or not name or name in MEASURED or not callable(function):
        raise ConfigError(
            f"The difficulty {name!r} is to be {function!r}.",
            f"Expected a name other than {', '.join(MEASURED)}, and a function.",
        )
    _FUNCTIONS[name] = function


def check_difficulty(name: str, data: PreparedData) -> None:
    """Make sure that the samples of some data can be put in an order.

    Raises:
        SeedbedError: No function has this name, or the samples have no lengths that differ.
    """
    if name == "length":
        sample_lengths(data.train, data.reference)
    elif name not in (*MEASURED, *_FUNCTIONS):
        known = ", ".join((*MEASURED, *sorted(_FUNCTIONS)))
        raise ConfigError(
            f"CurriculumConfig.difficulty is {name!r}, which no function has for a name.",
            f"Expected one of {known}.",
            f"Call utils.continual.difficulty.register_difficulty({name!r}, function) before the run.",
        )


def sample_lengths(samples: Mapping[str, Tensor], origin: str = "The data") -> Tensor:
    """Return how many tokens each sample has, float32 ``(samples,)``.

    Raises:
        DataError: They have none, or all the same number.
    """
    if "lengths" in samples:
        found = samples["lengths"].float()
        if "target_lengths" in samples:
            found = found + samples["target_lengths"].float()
        if bool((found != found[0]).any()):
            return found
    why = "are all of the same length" if "input_ids" in samples else "have no length"
    raise DataError(
        f"The samples of {origin} {why}.",
        "Expected texts of different lengths for difficulty='length'.",
        "Set CurriculumConfig.difficulty to 'loss', or to a function of your own.",
    )


def scored(function: Difficulty, samples: Mapping[str, Tensor], origin: str = "The data") -> Tensor:
    """Return what a function says of each sample, float32 ``(samples,)``.

    Raises:
        DataError: It does not return one finite number for each sample.
    """
    count = len(next(iter(samples.values())))
    pieces = []
    for start in range(0, count, AT_ONCE):
        chosen = torch.arange(start, min(start + AT_ONCE, count))
        found = torch.as_tensor(function(collate(samples, chosen))).detach().float().cpu()
        if found.shape != chosen.shape or not bool(torch.isfinite(found).all()):
            raise DataError(
                f"The difficulty of {len(chosen)} samples of {origin} is a tensor of shape {tuple(found.shape)}"
                + ("." if found.shape != chosen.shape else " that holds what is not finite."),
                "Expected one finite number for each sample.",
                "Check the function that says what is hard.",
            )
        pieces.append(found)
    return torch.cat(pieces)


@torch.no_grad()
def sample_losses(
    adapter: ModelAdapter,
    data: PreparedData,
    batch_size: int,
    seed: int = 0,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Return the model's mean loss on each training sample, float32 ``(samples,)``, in nats or squared deviations.

    The model is in evaluation mode, and comes back as it was, random streams included.

    Args:
        adapter: The model.
        data: Where the samples are.
        batch_size: Samples per forward pass.
        seed: Seed of what is masked in each sample.
        context: Makes the context of each forward pass, for mixed precision.
    """
    pieces = []
    with preserved(adapter.module, seed, "difficulty"):
        adapter.module.eval()
        for start in range(0, data.train_samples, batch_size):
            chosen = torch.arange(start, min(start + batch_size, data.train_samples))
            batch = {name: value.to(adapter.device) for name, value in collate(data.train, chosen).items()}
            with context():
                _, logits, labels = objective(adapter, data, batch, held_out_seeds(seed, chosen))
            pieces.append(_each(logits.float(), labels, data.task).cpu())
    # A loss that is not finite is harder than any other.
    return torch.nan_to_num(torch.cat(pieces), nan=torch.inf)


def _each(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """Return the mean loss of each sample of a batch."""
    if task in REAL_VALUED:
        return (logits.reshape(len(labels), -1) - labels.reshape(len(labels), -1).float()).square().mean(1)
    rows = labels.reshape(len(labels), -1)
    known = rows != IGNORED
    if logits.shape[-1] == 1:
        scores, wanted = logits.reshape(rows.shape), rows.clamp(min=0).float()
        losses = functional.binary_cross_entropy_with_logits(scores, wanted, reduction="none") * known
    else:
        flat = logits.reshape(-1, logits.shape[-1])
        losses = functional.cross_entropy(flat, rows.reshape(-1), ignore_index=IGNORED, reduction="none").view_as(rows)
    return losses.sum(1) / known.sum(1).clamp(min=1)


def difficulty_of(
    name: str,
    adapter: ModelAdapter,
    data: PreparedData,
    batch_size: int,
    seed: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Return how hard each training sample is, float32 ``(samples,)``, as the settings of a curriculum say.

    Args:
        name: ``length``, ``loss``, or what a function was registered as.
        adapter: The model.
        data: Where the samples are.
        batch_size: Samples per forward pass.
        seed: Seed of what is masked.
        context: Makes the context of each forward pass.

    Raises:
        SeedbedError: See `check_difficulty` and `scored`.
    """
    check_difficulty(name, data)
    if name == "length":
        return sample_lengths(data.train, data.reference)
    if name == "loss":
        return sample_losses(adapter, data, batch_size, seed, context)
    return scored(_FUNCTIONS[name], data.train, data.reference)
