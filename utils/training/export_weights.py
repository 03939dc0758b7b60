"""Which weights of a run leave the house: its moving average, its best checkpoint or its last step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.runtime.errors import CheckpointError, ConfigError, ExportError
from utils.training.extensions import check_export
from utils.training.module_memory import ModuleMemory
from utils.training.weight_average import WeightAverage

CHOICES = ("last", "best", "average")
"""What can be asked for; None takes the average where the run kept one, else the last."""


@dataclass(frozen=True)
class ChosenWeights:
    """What a model holds while it is exported."""

    text: str = ""
    """In words; empty for what is no run."""
    step: int | None = None
    """The step of the run that the weights are of."""
    measured: bool = False
    """Whether the held-out numbers of the run were measured with weights of this kind."""


@contextmanager
def chosen_weights(run: Any, weights: str | None = None) -> Iterator[ChosenWeights]:
    """Put the weights that were asked for into a run's model while the block runs.

    A run that kept a moving average measured that, and not the weights themselves, on the held-out data; so the average
    is the default, and the best checkpoint of such a run gives the average of that checkpoint.

    Args:
        run: A training run, or anything else, which has one set of weights only.
        weights: One of `CHOICES`, or None.

    Yields:
        What the model holds.

    Raises:
        ConfigError: There is no such choice, or the run kept no average.
        ExportError: The checkpoint that holds the weights is missing.
    """
    if weights is not None and weights not in CHOICES:
        raise ConfigError(f"weights is {weights!r}.", f"Expected one of {', '.join(CHOICES)}, or None.")
    checkpoints = getattr(run, "checkpoints", None)
    if checkpoints is None:
        if weights not in (None, "last"):
            raise ConfigError(
                f"weights is {weights!r}, and the model is not a training run.",
                "Expected a run, whose checkpoints hold other weights.",
                "Pass the run, or leave weights out.",
            )
        yield ChosenWeights()
        return
    check_export(run.config)
    decay = run.config.ema_decay
    if weights == "average" and decay is None:
        raise ConfigError(
            "weights is 'average', and the run kept no average of its weights.",
            "Expected a run with TrainingConfig.ema_decay.",
            "Ask for 'last' or 'best'.",
        )
    if weights == "last" or (weights is None and (decay is None or run.step == 0)):
        yield ChosenWeights(f"the weights after step {run.step}", run.step, decay is None)
        return
    checkpoint = _checkpoint(run, weights)
    module: nn.Module = run.adapter.module
    memory = ModuleMemory(module).state_dict()
    kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
    where = f"step {checkpoint.step}"
    if weights == "best":
        where += ", the checkpoint with the lowest held-out loss"
    try:
        state = _loaded(run, checkpoint)
        if "memory" in state:
            ModuleMemory(module).load_state_dict(state["memory"])
        if decay is None:
            yield ChosenWeights(f"the weights after {where}", checkpoint.step, True)
            return
        if "average" not in state:
            raise ExportError(
                f"The checkpoint {checkpoint.directory.name} holds no average of the weights.",
                "Expected one, because the run has ema_decay.",
                "Export with weights='last'.",
            )
        average = WeightAverage(module, decay)
        average.load_state_dict(state["average"])
        with average.applied():
            text = f"the moving average (decay {decay:g}) of the weights at {where}"
            yield ChosenWeights(text, checkpoint.step, True)
    finally:
        with torch.no_grad():
            for name, value in module.state_dict().items():
                value.copy_(kept[name])
        ModuleMemory(module).load_state_dict(memory)


def _loaded(run: Any, checkpoint: Any) -> dict[str, Any]:
    """Load a checkpoint into a run's model, which may have changed its structure since.

    Raises:
        ExportError: It has.
    """
    try:
        return checkpoint.load_into(run.adapter.module)
    except CheckpointError as error:
        if run.config.growth is None:
            raise
        raise ExportError(
            f"The checkpoint of step {checkpoint.step} is from before the model grew: {error.found}",
            "Expected one of the model as it is now.",
            "Export with weights='last'.",
        ) from error


def _checkpoint(run: Any, weights: str | None) -> Any:
    """Return the checkpoint that holds what was asked for."""
    if weights == "best":
        best = run.checkpoints.best()
        if best is None:
            raise ExportError(
                "No checkpoint of the run has a measured held-out loss.",
                "Expected one that was saved on a step of a measurement.",
                "Ask for 'last', or let checkpoint_every_steps be a multiple of val_every_steps.",
            )
        return best
    try:
        newest = run.checkpoints.latest()
    except CheckpointError as error:
        raise ExportError(f"The average of the weights cannot be read: {error}") from error
    if newest.step != run.step:
        raise ExportError(
            f"The newest checkpoint is of step {newest.step}, and the run stands at step {run.step}.",
            "Expected the average of the weights as of now, which only a checkpoint holds.",
            "Export with weights='last', or resume the run so that it saves.",
        )
    return newest
