"""The largest batch that fits into memory, from real steps of a copy of the model; running out of memory is survived.

Only sizes that divide the samples of a step are tried, the largest first: the rest of the step is made up by
accumulating gradients, so that the training stays the one that was asked for. On a CPU, where the system ends processes
that take too much, a size whose activations cannot fit is ruled out by counting them on one sample.
"""

import gc
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import torch

from utils.adapters import ModelAdapter, ModelSpec
from utils.runtime.errors import ConfigError, RunError
from utils.runtime.resources import (
    allocation_limit,
    best_device,
    device_name,
    format_bytes,
    is_out_of_memory,
    peak_of_block,
    resident_memory,
)
from utils.runtime.seeding import isolated_streams
from utils.training.config import AUTO, TrainingConfig
from utils.training.learning_rate_finder import ready
from utils.training.prepared_data import PreparedData
from utils.training.step_memory import (
    SPARE,
    activation_bytes,
    checkpoint_bytes,
    largest_batch,
    room,
    run_bytes,
    tensor_bytes,
)

STEPS = 2
"""Optimizer steps of a trial: the first one makes AdamW's averages, the second one runs beside them."""
COUNTED, RAN_OUT, TIGHT, FITS = "ruled out by counting", "ran out of memory", "leaves too little memory", "fits"


@dataclass(frozen=True)
class Trial:
    """One size that was looked at."""

    batch_size: int
    outcome: str
    """Whether it fits, ran out of memory, leaves too little of it, or was ruled out without a step."""
    memory: int | None
    """Bytes beyond what was held before, measured or counted; None when memory ran out."""


@dataclass(frozen=True, repr=False)
class BatchSizeSuggestion:
    """The batch that fits; shows itself in a notebook."""

    batch_size: int
    """Samples per forward pass."""
    accumulate: int
    """Forward passes per optimizer step, so that the step takes the samples that were asked for."""
    trials: tuple[Trial, ...]
    """What was tried, the largest first."""
    memory_there: int
    """Bytes that were free."""
    device: str
    """Where it was tried."""

    @property
    def samples_per_step(self) -> int:
        """Samples of an optimizer step on one device."""
        return self.batch_size * self.accumulate

    def applied(self, config: TrainingConfig) -> TrainingConfig:
        """Return settings with this batch."""
        return config.with_changes(batch_size=self.batch_size, accumulate=self.accumulate, step_samples=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "trials": [asdict(trial) for trial in self.trials]}

    def rows(self) -> list[tuple[str, str]]:
        """Return what was tried, as pairs of size and outcome."""
        return [
            (
                f"{trial.batch_size}",
                trial.outcome + ("" if trial.memory is None else f", {format_bytes(trial.memory)}"),
            )
            for trial in self.trials
        ]

    def text(self) -> str:
        """Return the suggestion with what it rests on."""
        passes = f"{self.accumulate} passes of it make" if self.accumulate > 1 else "it is"
        return (
            f"batch size {self.batch_size}: {passes} a step of {self.samples_per_step} samples; "
            f"{format_bytes(self.trials[-1].memory or 0)} of {format_bytes(self.memory_there)} free on {self.device}"
        )

    __repr__ = text

    def _repr_html_(self) -> str:
        """Show the trials in a notebook."""
        cells = "".join(
            f"<tr><th style='text-align:right'>{escape(size)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
            for size, text in self.rows()
        )
        return f"<p><b>{escape(self.text())}</b></p><table>{cells}</table>"


def find_batch_size(
    model: "ModelAdapter | Any",
    data: Any = "builtin:python-docs",
    config: TrainingConfig | None = None,
    *,
    samples: int | None = None,
    spec: ModelSpec | None = None,
) -> BatchSizeSuggestion:
    """Find the largest batch with which forward pass, backward pass and optimizer step fit into memory.

    Example:
        >>> find_batch_size("example:gpt", samples=512)  # doctest: +SKIP

    Args:
        model: A loaded model, a reference for it, an adapter or a module. It is left as it is.
        data: A data reference, or prepared data; the longest samples are the ones that are tried.
        config: How the run is to train.
        samples: Samples of a step on one device, of which the batch is a part; None takes those of `config`.
        spec: Facts about the model that override detection.

    Returns:
        The batch size, with the number of passes that keeps the samples of a step.

    Raises:
        RunError: Not even the smallest batch fits.
        SeedbedError: The model, the data or the settings cannot be used.
    """
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ConfigError(f"samples is {samples!r}.", "Expected a whole number above 0: the samples of a step.")
    adapter, prepared, config = ready(model, data, config, spec)
    asked = samples or config.samples_per_step // config.devices
    config = config.with_changes(
        devices=1, strategy="auto", compile=False, batch_size=1, accumulate=1, step_samples=None
    )
    if config.learning_rate == AUTO:
        # Any rate takes the same memory.
        config = config.with_changes(learning_rate=TrainingConfig.learning_rate)
    device, trials = best_device(), list[Trial]()
    there, held = room(device), run_bytes(adapter, config, device)
    with isolated_streams(config.seed, "batch size"):
        each = activation_bytes(adapter, prepared, config)
        for size in (size for size in range(asked, 0, -1) if asked % size == 0):
            counted = held + size * each
            if counted * SPARE > there:
                trials.append(Trial(size, COUNTED, counted))
                continue
            part = config.with_changes(batch_size=size, accumulate=min(2, asked // size))
            taken = _taken(adapter, prepared, part, device)
            outcome = RAN_OUT if taken is None else TIGHT if taken * SPARE > there else FITS
            trials.append(Trial(size, outcome, taken))
            if outcome == FITS:
                return BatchSizeSuggestion(size, asked // size, tuple(trials), there, device_name(device))
    raise RunError(
        f"No batch fits: one sample {trials[-1].outcome}, with {format_bytes(there)} free on {device_name(device)}.",
        f"Expected room for one sample beside {format_bytes(held)} of gradients, optimizer and copies.",
        "Shorten the samples with context_length, set gradient_checkpointing=True, or take a smaller model.",
    )


def _taken(adapter: ModelAdapter, data: PreparedData, config: TrainingConfig, device: torch.device) -> int | None:
    """Take a few steps with batches of one size; return the bytes that a run takes, None if there are too few."""
    from utils.training.trial_steps import run_steps

    # Learning is not the point, and weights that run away would end the steps.
    config = config.with_changes(learning_rate=1e-9, weight_decay=0.0)
    weights = tensor_bytes(adapter.module)
    average = weights if config.ema_decay is not None else 0
    fits, taken = True, 0
    try:
        batches = [largest_batch(data, config.batch_size)]
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run_steps(adapter, data, config, STEPS, batches=batches)
            taken = torch.cuda.max_memory_allocated(device) - before + average
        else:
            before = resident_memory()
            with allocation_limit(), peak_of_block() as peak:
                run_steps(adapter, data, config, STEPS, batches=batches)
            # There is no second model in a run, but the copy that a checkpoint takes.
            grown = max(0, (peak[0] if peak else resident_memory()) - before - weights)
            taken = grown + average + checkpoint_bytes(adapter, config)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    # After the exception is gone, and with it the frames that held the tensors.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return taken if fits else None
