"""Tiny models and streams of the tests of continual learning."""

import torch
from torch import nn

import utils
from utils.training import TrainingConfig


class Net(nn.Module):
    """Two layers on images of eight by eight pixels."""

    def __init__(self, outputs=10, width=32, norm=False):
        super().__init__()
        middle = [nn.BatchNorm1d(width)] if norm else []
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), *middle, nn.ReLU(), nn.Linear(width, outputs))

    def forward(self, pixel_values):
        return self.net(pixel_values)


def net(seed=0, **settings):
    """Return a `Net` with weights drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**settings)


SPEC = utils.ModelSpec(task="image_classification", num_labels=10)
QUICK = TrainingConfig(
    max_steps=50, batch_size=16, learning_rate=3e-3, schedule="constant", warmup_share=0.0, weight_decay=0.0,
    val_every_steps=1000, log_every_steps=10, checkpoint_every_steps=1000, keep_checkpoints=100,
)  # fmt: skip


def settings(method, **changes):
    """Return the settings of a short stream of five tasks of digits."""
    continual = {"method": method, "buffer": 60, **changes.pop("continual", {})}
    return QUICK.with_changes(continual=continual, **changes)
