"""Running out of memory in the middle of a run: what was reached is saved, and what would fit is said.

A worker process that vanishes was most often ended by the system, for want of memory, and is told of here too.
"""

import gc
from typing import TYPE_CHECKING

import torch

from utils.runtime.errors import RunError
from utils.runtime.resources import is_out_of_memory
from utils.training.config import TrainingConfig

if TYPE_CHECKING:
    from utils.training.session_callback import SessionCallback


def in_batches_of(config: TrainingConfig, batch_size: int) -> TrainingConfig:
    """Return settings that take the same samples in each step in batches of another size.

    Raises:
        RunError: Such batches do not make up a step.
    """
    samples = config.batch_size * config.accumulate
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1 or samples % batch_size:
        raise RunError(
            f"The batch size is to be {batch_size!r}, and a step of this run takes {samples} samples on each device.",
            "Expected a number that divides them: another step would be another run.",
            f"Pass one of {', '.join(str(size) for size in range(1, samples + 1) if samples % size == 0)}.",
        )
    return config.with_changes(batch_size=batch_size, accumulate=samples // batch_size)


def smaller_batch(config: TrainingConfig, available: int | None = None) -> int:
    """Return the largest batch of at most half the size that makes up the same steps; 0 for single samples.

    Args:
        config: The settings whose batch is too large.
        available: Different samples that there are, which the batch shall not exceed.
    """
    samples, half = config.batch_size * config.accumulate, config.batch_size // 2
    largest = half if available is None else min(half, available)
    return next((size for size in range(largest, 0, -1) if samples % size == 0), 0)


def out_of_memory(callback: "SessionCallback", reason: str) -> RunError:
    """Save what can be saved and return the error that says what fits.

    Args:
        callback: Of the run whose step has failed; the exception must be gone, because it keeps the step's tensors.
        reason: What the allocator said.
    """
    run, config = callback.run, callback.config
    for parameter in run.model.parameters():
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _save(callback)
    saved = callback.writer.saved_step if callback.writer is not None else 0
    # Of a text that is read while training nobody knows how many samples it has.
    half = smaller_batch(config, None if callback.stream.sequential else callback.stream.samples)
    action = (
        f"Try utils.resume({str(run.directory)!r}, batch_size={half}): the same samples in each step, in "
        f"{config.batch_size * config.accumulate // half} passes."
        if half
        else "Shorten the samples with context_length, or set gradient_checkpointing=True, in a new run."
    )
    return RunError(
        f"Memory ran out in step {callback.progress.step + 1}, with batches of {config.batch_size} ({reason}).",
        f"Expected a step to fit; the state after step {saved} is saved.",
        action,
    )


def lost_worker(callback: "SessionCallback", error: Exception) -> RunError | None:
    """Return the error that says what to do when a process that prepares batches has died; None for other errors.

    Args:
        callback: Of the run.
        error: What training raised. PyTorch raises it wherever the process is at that moment, so that nothing is saved.
    """
    if not isinstance(error, RuntimeError) or "DataLoader worker (pid" not in str(error):
        return None
    run, config = callback.run, callback.config
    saved = callback.writer.saved_step if callback.writer is not None else 0
    return RunError(
        f"A worker process that prepares batches has died ({str(error).splitlines()[0]}).",
        f"Expected {config.workers} of them until the end; the state after step {saved} is saved.",
        f"Continue with utils.resume({str(run.directory)!r}); if it happens again, memory is short: use fewer workers "
        "in a new run.",
    )


def _save(callback: "SessionCallback") -> None:
    """Save the state after the last whole step, where what came after it has left no trace."""
    module, progress, stream, config = callback.module, callback.progress, callback.stream, callback.config
    # A failure while the weights change, or while they are measured, leaves a state that no other run would reach.
    if module.phase != "passes" or stream.world > 1:
        return
    begun = progress.batches - progress.step * config.accumulate
    if begun and stream.sequential:
        return
    if begun:
        progress.batches -= begun
        stream.consumed -= begun * config.batch_size
    try:
        callback.save(wait=True)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
