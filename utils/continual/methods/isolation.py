"""What methods have in common that give each task weights of its own, so that old answers keep every bit.

Beside weights an answer depends on buffers, such as the running statistics of BatchNorm, which training on a later task
moves: each task keeps its own. And a model may answer several tasks with different outputs of one layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.continual.learner import Learner
from utils.runtime.errors import ConfigError
from utils.runtime.isolation import preserved
from utils.runtime.seeding import derive_seed
from utils.training.batch_inputs import model_inputs
from utils.training.evaluation import masked
from utils.training.state import ModelChange

SAMPLES = 8
"""Samples of a task with which the model is looked at."""


class TaskBuffers:
    """The buffers of a model as each task left them; those that training never changes are kept once."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self.before: dict[str, Tensor] = {}
        self.tasks: dict[int, dict[str, Tensor]] = {}

    def begin(self, module: nn.Module) -> None:
        """Note what there is before the first task, to see later what changes."""
        if not self.tasks:
            self.before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    def keep(self, module: nn.Module, task: int) -> None:
        """Keep the buffers that have changed, as a task left them."""
        self.tasks[task] = {
            name: buffer.detach().clone()
            for name, buffer in module.named_buffers()
            if name not in self.before or not _equal(self.before[name], buffer)
        }

    @contextmanager
    def applied(self, module: nn.Module, task: int) -> Iterator[None]:
        """Put the buffers of a task into the model while the block runs."""
        own = {**self.before, **self.tasks[task]}
        buffers = {name: buffer for name, buffer in module.named_buffers() if name in own}
        present = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(own[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(present[name])

    def state_dict(self) -> dict[str, Any]:
        """Return all that is kept."""
        return {"before": dict(self.before), "tasks": {str(task): dict(own) for task, own in self.tasks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.before = dict(state["before"])
        self.tasks = {int(task): dict(own) for task, own in state["tasks"].items()}

    def renamed(self, change: ModelChange) -> "TaskBuffers":
        """Return the same under the names that the buffers have after a change of the model."""
        names = {change.of(name).source: name for name in change.buffers}
        made = TaskBuffers()
        made.before = {names[name]: value for name, value in self.before.items() if name in names}
        made.tasks = {
            task: {names[name]: value for name, value in own.items() if name in names}
            for task, own in self.tasks.items()
        }
        return made

    @property
    def numbers(self) -> int:
        """How many numbers are kept."""
        return sum(one.numel() for own in (self.before, *self.tasks.values()) for one in own.values())


def _equal(kept: Tensor, present: Tensor) -> bool:
    """Tell whether two buffers hold the same values; NaN is as good as NaN."""
    kept = kept.to(present.device)
    if kept.shape != present.shape or kept.dtype != present.dtype:
        return False
    if not present.is_floating_point():
        return torch.equal(kept, present)
    return torch.allclose(kept, present, rtol=0, atol=0, equal_nan=True)


def samples_of(learner: Learner, task: int) -> dict[str, Tensor]:
    """Return the model's inputs for a few training samples of a task."""
    chosen = learner.tasks[task]
    batch = chosen.batch(learner.data.train, chosen.train[:SAMPLES])
    batch = {name: value.to(learner.adapter.device) for name, value in batch.items()}
    batch = masked(learner.data, batch, derive_seed(learner.seed, "look", task))
    return model_inputs(learner.adapter, batch, learner.data)


@dataclass(frozen=True)
class Rows:
    """Which entries along the first axis of a parameter belong to a task's own outputs, and which to others'."""

    own: Tensor
    """Boolean ``(rows,)``: these change only outputs with which the task answers."""
    foreign: Tensor
    """Boolean ``(rows,)``: these change only outputs with which it does not."""


def rows_of(learner: Learner, task: int) -> dict[str, Rows]:
    """Find the parameters of the outputs, such as a head, by what changes which output.

    Each row of a parameter is held against the gradients of two numbers: a random sum of the outputs that answer the
    task, and one of the other outputs. A row that moves only one of them belongs to that side; the model is left as it
    was.

    Args:
        learner: The stream.
        task: Number of a task that answers with some of the outputs.

    Returns:
        By name, the parameters of which some rows belong to one side; empty when all outputs answer every task.
    """
    allowed = learner.allowed(learner.tasks[task].answers)
    if allowed is None or bool(allowed.all()):
        return {}
    parameters = learner.parameters
    inputs = samples_of(learner, task)
    with preserved(learner.module, learner.seed, "rows"), torch.enable_grad():
        learner.module.eval()
        logits = learner.adapter.logits(inputs)
        generator = torch.Generator().manual_seed(derive_seed(learner.seed, "rows", task))
        weights = torch.randn(logits.shape, generator=generator).to(logits)
        parts = [(logits * weights)[..., side.to(logits.device)].sum() for side in (allowed, ~allowed)]
        sides = [
            torch.autograd.grad(part, list(parameters.values()), retain_graph=True, allow_unused=True) for part in parts
        ]
    found = {}
    for (name, parameter), mine, others in zip(parameters.items(), *sides, strict=True):
        if parameter.dim() == 0:
            continue
        moves, moved = (
            torch.zeros(len(parameter), dtype=torch.bool, device=parameter.device) if g is None
            else (g != 0).flatten(1).any(1) if g.dim() > 1 else g != 0
            for g in (mine, others)
        )  # fmt: skip
        rows = Rows(moves & ~moved, moved & ~moves)
        if bool(rows.own.any()) and bool(rows.foreign.any()):
            found[name] = rows
    return found


def check_bits(learner: Learner, name: str) -> None:
    """Refuse what would change old answers whatever the method does.

    Raises:
        ConfigError: The run averages its weights.
    """
    if learner.training is not None and learner.training.ema_decay is not None:
        raise ConfigError(
            f"ContinualConfig.method is {name!r} and TrainingConfig.ema_decay is {learner.training.ema_decay}.",
            "Expected None: an average goes on moving when a task has ended, and old answers with it.",
            "Set ema_decay to None.",
        )
