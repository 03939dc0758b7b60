"""A training of a minute, for a model to look into: a plain loop with nothing to install and nothing on disk.

It has the objective, the optimiser and the schedule of a real run, and none of what makes one survive: no checkpoints,
no resuming, no second device. For anything longer than a demonstration there is `utils.train`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import nn

from utils.adapters import ModelAdapter
from utils.memory.key_reader import adapter_of
from utils.runtime.errors import AdapterError, ConfigError
from utils.runtime.seeding import derive_seed, isolated_streams
from utils.runtime.settings import settings_of
from utils.training.batching import collate
from utils.training.config import AUTO, TrainingConfig
from utils.training.dataset_utilities import prepare_data
from utils.training.evaluation import evaluate, objective
from utils.training.prepared_data import PreparedData
from utils.training.schedules import make_optimizer, make_schedule

CLIP = 1.0
"""Largest norm of the gradient."""
SHOWN = 40
"""Points of the curve that are kept."""


@dataclass(frozen=True, eq=False, repr=False)
class BriefRun:
    """A model that was trained briefly; functions that take a run's model and tokenizer take this as well."""

    adapter: ModelAdapter
    """The trained copy."""
    data: PreparedData
    steps: int
    losses: tuple[float, ...]
    """Mean training loss over stretches of equal length, first to last."""
    measured: Mapping[str, float]
    """On the held-out samples, see `utils.training.evaluation.evaluate`."""

    @property
    def module(self) -> nn.Module:
        """The trained module."""
        return self.adapter.module

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "model": self.adapter.name, "data": self.data.reference, "steps": self.steps,
            "losses": list(self.losses), "measured": dict(self.measured),
        }  # fmt: skip

    def __str__(self) -> str:
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.measured.items())
        course = " → ".join(f"{loss:.2f}" for loss in self.losses[:: max(1, len(self.losses) // 5)])
        return (
            f"{self.adapter.name} on {self.data.reference}, {self.steps} steps. Held out: {numbers}. "
            f"Training loss: {course}."
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{escape(str(self))}</p>"


def train_briefly(model: Any, data: Any, config: TrainingConfig | Mapping[str, Any] | None = None) -> BriefRun:
    """Train a copy of a model; the model and the random streams are left as they were.

    Args:
        model: A loaded model, an adapter or a module.
        data: A reference as for `utils.train`, or prepared data.
        config: Settings, or their names and values. Of them these count: max_steps or max_epochs, batch_size,
            learning_rate, weight_decay, beta2, schedule and its warm-up, context_length, validation_share,
            label_smoothing and seed.

    Raises:
        ConfigError: A setting is ``auto``, or the model cannot be copied.
        DataError: The data do not fit the model.
        AdapterError: The model cannot be called.
    """
    config = settings_of(TrainingConfig, config)
    if AUTO in (config.batch_size, config.learning_rate):
        raise ConfigError(
            "The batch size or the learning rate is auto.",
            "A brief training expects numbers.",
            "Give numbers, or use utils.train.",
        )
    try:
        adapter = adapter_of(copy.deepcopy(model))
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"The model cannot be copied ({type(error).__name__}: {error}).",
            "The model that is given stays as it is, so a copy is trained.",
            "Make it of plain modules and tensors, or use utils.train.",
        ) from error
    if adapter.failure is not None:
        raise AdapterError(adapter.failure)
    prepared = prepare_data(adapter, data, config)
    per_epoch = -(-prepared.train_samples // config.batch_size)
    limits = [config.max_steps, None if config.max_epochs is None else int(config.max_epochs * per_epoch)]
    steps = max(1, min(limit for limit in limits if limit is not None))
    optimizer = make_optimizer(adapter.module, config)
    schedule = make_schedule(optimizer, steps, config)
    losses: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(derive_seed("brief training", config.seed))
    with isolated_streams("brief training", config.seed), torch.enable_grad():
        adapter.module.train()
        order = torch.empty(0, dtype=torch.long)
        for step in range(steps):
            while len(order) < min(config.batch_size, prepared.train_samples):
                order = torch.cat([order, torch.randperm(prepared.train_samples, generator=generator)])
            chosen, order = order[: config.batch_size], order[config.batch_size :]
            batch = {name: value.to(adapter.device) for name, value in collate(prepared.train, chosen).items()}
            seed = derive_seed("brief masking", config.seed, step)
            loss, _, _ = objective(adapter, prepared, batch, seed, config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter.module.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        adapter.module.eval()
    stretches = torch.stack(losses).tensor_split(min(SHOWN, steps))
    measured = evaluate(adapter, prepared, config.batch_size, config.seed)
    return BriefRun(adapter, prepared, steps, tuple(float(part.mean()) for part in stretches), measured)
