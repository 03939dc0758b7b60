"""Parameters without a gradient: several devices that exchange gradients must know whether a step leaves some out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.adapters import ModelAdapter
from utils.runtime.errors import RunError
from utils.runtime.isolation import preserved
from utils.runtime.seeding import seed_streams
from utils.training.batching import collate
from utils.training.config import TrainingConfig
from utils.training.evaluation import objective
from utils.training.prepared_data import PreparedData

TRIALS = 8
"""Passes that must all give every parameter a gradient: blocks may be left out, or experts chosen, at random."""
SAMPLES = 2
"""Training samples in each pass; batch normalization needs two."""


def leaves_some_out(adapter: ModelAdapter, data: PreparedData, config: TrainingConfig) -> bool:
    """Tell whether some pass of a model gives some trainable parameter no gradient.

    Every process that trains the model finds the same: it looks at the first training samples, with the run's seed.

    Args:
        adapter: The model; it is left as it is.
        data: What it is trained on.
        config: The run's settings.
    """
    trained = [parameter for parameter in adapter.module.parameters() if parameter.requires_grad]
    with preserved(adapter.module, config.seed, "unused"), torch.enable_grad():
        adapter.module.train()
        for trial in range(TRIALS):
            seed_streams(config.seed, "unused", trial)
            chosen = (torch.arange(SAMPLES) + trial * SAMPLES) % data.train_samples
            batch = {name: tensor.to(adapter.device) for name, tensor in collate(data.train, chosen).items()}
            loss = objective(adapter, data, batch, trial, config.label_smoothing)[0]
            if any(gradient is None for gradient in torch.autograd.grad(loss, trained, allow_unused=True)):
                return True
    return False


@contextmanager
def unused_explained(adapter: ModelAdapter) -> Iterator[None]:
    """Say in words when a step gives some parameter no gradient although no trial did.

    Raises:
        RunError: It does.
    """
    try:
        yield
    except RuntimeError as error:
        if "finished reduction in the prior iteration" not in str(error):
            raise
        raise RunError(
            f"A step of {adapter.name} gave some parameter no gradient, and {TRIALS} trials had given one to each.",
            "Expected the trials at the start to show that the model leaves some out at times.",
            "Train on one device, or let the forward pass use every parameter, such as times zero.",
        ) from error
