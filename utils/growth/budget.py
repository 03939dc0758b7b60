"""How far may a model grow? Its size in parameters, arithmetic and memory, and the limits that no event exceeds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.capture import unfused_attention
from utils.growth.config import GrowthConfig
from utils.runtime.errors import SeedbedError
from utils.runtime.resources import format_bytes, format_count
from utils.training.config import AUTO, TrainingConfig
from utils.training.prepared_data import PreparedData
from utils.training.step_memory import SPARE, activation_bytes, run_bytes, tensor_bytes

STEP_PASSES = 3
"""A training step costs about three forward passes: the backward pass makes two products for each one."""


class BudgetError(SeedbedError):
    """A model would grow past its budget."""


@dataclass(frozen=True)
class ModelSize:
    """What a model costs."""

    parameters: int
    """Numbers in its parameters, shared ones once."""
    flops: int
    """Floating-point operations of a training step on the batch that was given."""
    bytes: int
    """Memory of a training step: weights, gradients, optimizer, what a checkpoint copies, and activations if known."""

    def to_dict(self) -> dict[str, int]:
        """Return the numbers as plain values."""
        return asdict(self)


def forward_flops(adapter: ModelAdapter, inputs: Mapping[str, Tensor]) -> int:
    """Return the floating-point operations of one forward pass, counted operator by operator.

    The counts are those of `torch.utils.flop_counter`, and of the fused CPU kernels for attention and recurrence that
    its table leaves out; a multiplication with an addition counts as two.

    Args:
        adapter: The model; it stays as it was.
        inputs: A batch, as `ModelAdapter.logits` takes it.

    Raises:
        AdapterError: No forward pass succeeds.
    """
    from utils.validation.costs import CostCounter
    from utils.validation.watching import Running

    counter = CostCounter(Running())
    # A whole layer of torch's encoder as one operator would hide its products.
    with adapter.isolated(), unfused_attention(), counter:
        adapter.logits(inputs)
    return sum(counter.flops.values())


def model_size(
    adapter: ModelAdapter,
    inputs: Mapping[str, Tensor],
    config: TrainingConfig | None = None,
    data: PreparedData | None = None,
    device: torch.device | None = None,
) -> ModelSize:
    """Measure what a model costs.

    Args:
        adapter: The model; it stays as it was.
        inputs: The batch on which arithmetic is counted, the same before and after an event.
        config: Settings of the run; None takes the defaults.
        data: The run's data. With it the activations of a batch are counted too, by `step_memory.activation_bytes`.
        device: Where the run trains; None takes the model's device.

    Raises:
        AdapterError: No forward pass succeeds.
    """
    config, device = config or TrainingConfig(), device or adapter.device
    parameters = sum(p.numel() for p in {id(p): p for p in adapter.module.parameters()}.values())
    held = run_bytes(adapter, config, device)
    if device.type != "cuda":
        # There the weights of the run are those that are in memory already.
        held += tensor_bytes(adapter.module)
    if data is not None:
        samples = config.batch_size if config.batch_size != AUTO else 1
        held += activation_bytes(adapter, data, config) * samples
    return ModelSize(parameters, STEP_PASSES * forward_flops(adapter, inputs), held)


@dataclass(frozen=True)
class Budget:
    """Limits of growth; None sets no limit."""

    max_parameters: int | None = None
    """Parameters."""
    max_flops_share: float | None = None
    """FLOPs of a step relative to the first step of the run."""
    max_memory_gb: float | None = None
    """Memory of a training step in 10^9 bytes."""
    max_events: int | None = None
    """Events in all."""

    @classmethod
    def from_config(cls, config: GrowthConfig) -> "Budget":
        """Return the limits of the settings."""
        return cls(config.max_parameters, config.max_flops_share, config.max_memory_gb, config.max_events)

    def refusal(
        self, before: ModelSize, after: ModelSize, start: ModelSize, events: int = 0, free: int | None = None
    ) -> BudgetError | None:
        """Return why an event must not happen, or None when it may.

        Args:
            before: The model as it is.
            after: As it would be.
            start: As it was at the first step, on the same batch.
            events: Events so far.
            free: Bytes of memory that are free now, such as `utils.training.step_memory.room` tells; None asks nothing.
        """
        if self.max_events is not None and events >= self.max_events:
            return BudgetError(
                f"The model has grown {events} times.",
                f"Expected at most max_events={self.max_events} events.",
                "Raise max_events to let it grow further.",
            )
        if self.max_parameters is not None and after.parameters > self.max_parameters:
            return BudgetError(
                f"Growth would take the model from {format_count(before.parameters)} to "
                f"{format_count(after.parameters)} parameters.",
                f"Expected at most max_parameters={self.max_parameters:,}.",
                "Raise max_parameters or let it grow by less.",
            )
        share = after.flops / start.flops if start.flops else 1.0
        if self.max_flops_share is not None and share > self.max_flops_share:
            return BudgetError(
                f"Growth would make a step {share:.2f} times as expensive as the first one "
                f"({format_count(after.flops)} FLOPs).",
                f"Expected at most max_flops_share={self.max_flops_share:g}.",
                "Raise max_flops_share or let it grow by less.",
            )
        if self.max_memory_gb is not None and after.bytes > self.max_memory_gb * 1e9:
            return BudgetError(
                f"Growth would take a training step from {format_bytes(before.bytes)} to {format_bytes(after.bytes)} "
                "of memory.",
                f"Expected at most max_memory_gb={self.max_memory_gb:g}.",
                "Raise max_memory_gb, or let it grow by less.",
            )
        more = SPARE * (after.bytes - before.bytes)
        if free is not None and more > free:
            return BudgetError(
                f"Growth needs {format_bytes(more)} more memory, a reserve of {SPARE - 1:.0%} included, and "
                f"{format_bytes(free)} are free.",
                "Expected room for the grown model beside what runs.",
                "Let it grow by less, or use a smaller batch_size.",
            )
        return None

    def check(
        self, before: ModelSize, after: ModelSize, start: ModelSize, events: int = 0, free: int | None = None
    ) -> None:
        """Do as `refusal` does, and raise the reason.

        Raises:
            BudgetError: The event must not happen.
        """
        if (refused := self.refusal(before, after, start, events, free)) is not None:
            raise refused
