"""What a run will cost, measured before it starts: a few real steps of this model, on this data, on this machine.

The steps run on a copy of the model, so that nothing is trained and nothing is changed. What cannot work (too little
memory, disk or time) is said with the reason and with what would fit.
"""

import copy
import math
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.runtime.errors import RunError
from utils.runtime.resources import (
    allocation_limit,
    available_memory,
    best_device,
    device_name,
    format_bytes,
    is_out_of_memory,
    peak_of_block,
    resident_memory,
)
from utils.runtime.seeding import isolated_streams
from utils.training.batch_size_finder import find_batch_size
from utils.training.batching import LENGTHS
from utils.training.clean_stop import MARGIN_MINUTES
from utils.training.config import AUTO, TrainingConfig
from utils.training.evaluation import evaluate, objective
from utils.training.learning_rate_finder import STEPS as RANGE_STEPS
from utils.training.prepared_data import PreparedData
from utils.training.recomputation import recomputed_blocks
from utils.training.schedules import make_optimizer
from utils.training.step_memory import SPARE, activation_bytes, checkpoint_bytes, tensor_bytes, trained_bytes
from utils.training.text_stream import open_stream
from utils.ui.estimate_view import Estimate, duration

__all__ = ["Estimate", "duration", "estimate_run", "tokens_per_sample"]

MEASURED_SECONDS = 4.0
"""About how long is measured; at least `LEAST_STEPS` steps are."""
LEAST_STEPS, MOST_STEPS = 2, 30
HELD_OUT_BATCHES = 4
"""Batches of the held-out data that are measured; the rest is taken to be like them."""


def estimate_run(
    model: Any,
    data: PreparedData,
    config: TrainingConfig,
    run_dir: str | Path,
    *,
    mirror: str | Path | None = None,
    limit_minutes: float | None = None,
    done: int = 0,
    seconds: float = MEASURED_SECONDS,
) -> Estimate:
    """Run a few steps of a copy of the model and say what the whole run takes.

    Args:
        model: The model: an adapter, a loaded model or a module. It is left as it is.
        data: What it is to be trained on.
        config: How.
        run_dir: Where the run is to be kept.
        mirror: Where its second copy is to be kept.
        limit_minutes: How long the whole run may take; None for as long as it needs.
        done: Steps that need not be done again.
        seconds: How long to measure.
    """
    adapter = model if isinstance(model, ModelAdapter) else ModelAdapter(model)
    device, rate_steps = best_device(), RANGE_STEPS if config.learning_rate == AUTO else 0
    config, failure, found = _without_auto(adapter, data, config)
    measured = None
    if not failure:
        measured, failure = _measure(adapter, data, config, device, seconds)
    planned = config.total_steps(data.pass_samples)
    steps = max(0, planned - done)
    weights, checkpoint = tensor_bytes(adapter.module), checkpoint_bytes(adapter, config)
    place, there = _room(Path(run_dir))
    disk = _disk(config, planned, weights, checkpoint, data)
    problems: list[str] = []
    if disk > there:
        problems.append(
            f"The run needs {format_bytes(disk)} on disk ({_kept(config, planned)} checkpoints of "
            f"{format_bytes(checkpoint)} and the data), and {place} has {format_bytes(there)} free."
        )
    if mirror is not None:
        other, room = _room(Path(mirror))
        if disk > room:
            problems.append(f"The second copy needs {format_bytes(disk)}, and {other} has {format_bytes(room)} free.")
    if failure:
        return Estimate(
            _where(device), steps, 0, math.nan, math.nan, math.nan, math.nan, None, 0, _memory_there(device), failure,
            checkpoint, disk, there, problems=(failure, *problems),
        )  # fmt: skip
    assert measured is not None
    step = statistics.median(measured.steps)
    measurements = steps // config.val_every_steps + (steps % config.val_every_steps > 0)
    total = (steps + (0 if done else rate_steps)) * step + measurements * measured.evaluation
    per_step = config.batch_size * config.accumulate
    tokens = tokens_per_sample(data)
    if measured.memory * SPARE > measured.memory_there:
        problems.append(
            f"The run holds {format_bytes(measured.memory)} of memory at its peak, and there are "
            f"{format_bytes(measured.memory_there)}. "
            + _smaller(config, SPARE * measured.memory / measured.memory_there)
        )
    if limit_minutes is not None and total > 60 * limit_minutes:
        fitting = max(0, int((60 * limit_minutes / total) * steps))
        problems.append(
            f"{steps:,} steps take about {duration(total)}, and the whole run may take {duration(60 * limit_minutes)}. "
            f"About {fitting:,} steps would fit."
        )
    session = _session_seconds(config)
    return Estimate(
        _where(device),
        steps,
        len(measured.steps),
        step,
        max(measured.steps),
        total,
        per_step / step,
        per_step / step * tokens if tokens is not None else None,
        measured.memory,
        measured.memory_there,
        measured.memory_reason,
        checkpoint,
        disk,
        there,
        math.ceil(total / session) if session else 1,
        tuple(problems),
        (*found, *_notes(config)),
    )


def tokens_per_sample(data: PreparedData) -> float | None:
    """Return the tokens of a training sample, what fills up shorter texts not included; None where there are none."""
    if "input_ids" not in data.train:
        return None
    counted = [data.train[name].double().mean() for name in LENGTHS if name in data.train]
    return float(sum(counted)) if counted else float(data.train["input_ids"].shape[1])


def _without_auto(
    adapter: ModelAdapter, data: PreparedData, config: TrainingConfig
) -> tuple[TrainingConfig, str, tuple[str, ...]]:
    """Return settings in numbers, why there are none, and what was found; any learning rate costs the same."""
    notes, failure = [], ""
    if config.batch_size == AUTO:
        try:
            batch = find_batch_size(adapter, data, config)
            config = batch.applied(config)
            notes.append(batch.text())
        except RunError as error:
            failure = str(error)
            samples = config.samples_per_step // config.devices
            config = config.with_changes(batch_size=1, accumulate=samples, step_samples=None)
    if config.learning_rate == AUTO:
        config = config.with_changes(learning_rate=TrainingConfig.learning_rate)
        notes.append(f"the learning rate is found at the start, in about {RANGE_STEPS} steps that are counted here")
    return config, failure, tuple(notes)


@dataclass
class _Measured:
    """What the steps showed."""

    steps: list[float]
    evaluation: float
    memory: int
    memory_there: int
    memory_reason: str


def _measure(
    adapter: ModelAdapter, data: PreparedData, config: TrainingConfig, device: torch.device, seconds: float
) -> tuple[_Measured | None, str]:
    """Run some steps; return what they showed, or why there is none."""
    weights = tensor_bytes(adapter.module)
    least = weights + 3 * trained_bytes(adapter.module)
    there = _memory_there(device)
    if least > there:
        return None, (
            f"Weights, gradients and AdamW's averages take {format_bytes(least)} of memory, and there are "
            f"{format_bytes(there)}: no batch size can change that."
        )
    try:
        with isolated_streams(config.seed, "estimate"):
            kept = least + config.batch_size * activation_bytes(adapter, data, config)
            if kept > there:
                return None, (
                    f"A step keeps about {format_bytes(kept)} in memory with batches of {config.batch_size} (counted "
                    f"on one sample), and there are {format_bytes(there)}. {_smaller(config, kept / there)}"
                )
            if device.type == "cuda":
                return _measure_on_gpu(adapter, data, config, device, seconds), ""
            return _measure_on_cpu(adapter, data, config, device, seconds, least, weights, kept), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, (
            f"Memory ran out in the first steps, with batches of {config.batch_size}; there are "
            f"{format_bytes(there)}. {_smaller(config)}"
        )


def _measure_on_gpu(
    adapter: ModelAdapter, data: PreparedData, config: TrainingConfig, device: torch.device, seconds: float
) -> _Measured:
    """Measure with the GPU's own count of its memory."""
    there = _memory_there(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        steps, evaluation = _run_steps(adapter, data, config, device, seconds)
        peak = torch.cuda.max_memory_allocated(device) - held
    finally:
        torch.cuda.empty_cache()
    if config.ema_decay is not None:
        peak += tensor_bytes(adapter.module)
    return _Measured(steps, evaluation, peak, there, "measured by the GPU")


def _measure_on_cpu(
    adapter: ModelAdapter,
    data: PreparedData,
    config: TrainingConfig,
    device: torch.device,
    seconds: float,
    least: int,
    weights: int,
    kept: int,
) -> _Measured:
    """Measure with what the system says that this process holds."""
    before = resident_memory()
    there = available_memory() + before
    with allocation_limit(), peak_of_block() as peak:
        steps, evaluation = _run_steps(adapter, data, config, device, seconds)
    # In the run there is no second model, but a checkpoint is copied beside the training before it is written.
    extra = least - weights + (weights if config.ema_decay is not None else 0)
    if peak:
        memory, reason = peak[0] - weights + least, "measured in this process, with room for a checkpoint's copy"
    else:
        memory, reason = before + least + kept, "counted, not measured: this system does not tell the peak of a block"
    return _Measured(steps, evaluation, max(memory, before + extra), there, reason)


def _run_steps(
    adapter: ModelAdapter, data: PreparedData, config: TrainingConfig, device: torch.device, seconds: float
) -> tuple[list[float], float]:
    """Train a copy of the model for a few steps; return the seconds of each, and of one look at the held-out data."""
    trial = copy.copy(adapter)
    trial.module = copy.deepcopy(adapter.module).to(device)
    with recomputed_blocks(trial.module) if config.gradient_checkpointing else nullcontext():
        return _timed(trial, data, config, device, seconds)


def _timed(
    trial: ModelAdapter, data: PreparedData, config: TrainingConfig, device: torch.device, seconds: float
) -> tuple[list[float], float]:
    """Train a model for a few steps; return the seconds of each, and of one look at the held-out data."""
    optimizer = make_optimizer(trial.module, config)
    parameters = [p for p in trial.module.parameters() if p.requires_grad]
    context = _precision(config, device)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    source = open_stream(data, config).batches((MOST_STEPS + 1) * config.accumulate)
    taken: list[float] = []
    trial.module.train()
    begun = time.monotonic()
    for number in range(MOST_STEPS + 1):
        started = time.monotonic()
        for _ in range(config.accumulate):
            batch: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in next(source).items()}
            with context():
                loss = objective(trial, data, batch, number, config.label_smoothing)[0]
            (loss / config.accumulate).backward()
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        taken.append(time.monotonic() - started)
        if number >= LEAST_STEPS and time.monotonic() - begun > seconds:
            break
    held = data.validation_samples
    share = min(1.0, HELD_OUT_BATCHES * config.batch_size / held)
    few = {name: tensor[: max(1, round(share * held))] for name, tensor in data.validation.items()}
    some = PreparedData(data.reference, data.task, data.train, few, data.tokenizer, data.facts)
    started = time.monotonic()
    evaluate(trial, some, config.batch_size, config.seed, context)
    wait()
    # The first step also pays for what is set up once.
    return taken[1:], (time.monotonic() - started) / share


def _precision(config: TrainingConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return the context in which the run's forward passes happen."""
    precision = config.resolved_precision
    if precision == "32-true":
        return nullcontext
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    return lambda: torch.autocast(device.type, dtype)


def _room(path: Path) -> tuple[Path, int]:
    """Return the nearest folder that exists and the bytes that are free there."""
    path = path.absolute()
    place = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return place, shutil.disk_usage(place).free


def _kept(config: TrainingConfig, steps: int) -> int:
    """Return how many checkpoints there are at most at one time, the one that is being written included."""
    kept = config.keep_checkpoints + config.keep_best + 1
    return kept + (steps // config.keep_every_steps if config.keep_every_steps else 0)


def _disk(config: TrainingConfig, steps: int, weights: int, checkpoint: int, data: PreparedData) -> int:
    """Return the bytes of the whole run."""
    tensors = [*data.validation.values(), *(data.train.values() if data.tokens is None else ())]
    samples = sum(t.nbytes if t.is_floating_point() else t.numel() * 4 for t in tensors)
    if data.tokens is not None:
        samples += data.tokens.path.stat().st_size
    return weights + _kept(config, steps) * checkpoint + samples


def _memory_there(device: torch.device) -> int:
    """Return the bytes of memory that a run may take: what is free, and on a CPU what this process holds already."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return available_memory() + resident_memory()


def _smaller(config: TrainingConfig, excess: float = 2.0) -> str:
    """Say which settings train the same in less memory, when `excess` times what there is would be needed."""
    if config.batch_size == 1:
        return "Shorten the samples with context_length, or set gradient_checkpointing to true."
    parts = min(2 ** max(1, math.ceil(math.log2(max(excess, 1.0)))), config.batch_size)
    part, passes = math.ceil(config.batch_size / parts), config.accumulate * parts
    return (
        f"Less takes batch_size={part} with accumulate={passes} (as many samples in each step, in more passes), a "
        "shorter context_length, or gradient_checkpointing=true."
    )


def _session_seconds(config: TrainingConfig) -> float | None:
    """Return how long one session may last."""
    limits = [] if config.time_budget_minutes is None else [config.time_budget_minutes]
    if config.session_limit_minutes is not None:
        limits.append(config.session_limit_minutes - MARGIN_MINUTES)
    return 60 * min(limits) if limits else None


def _where(device: torch.device) -> str:
    return f"this machine: {device_name(device)}"


def _notes(config: TrainingConfig) -> tuple[str, ...]:
    """Return what the numbers leave out."""
    notes = ["measured here and now; another machine, or other work on this one, makes it faster or slower"]
    if config.compile:
        notes.append("measured without torch.compile, which takes minutes at first and then makes steps faster")
    if config.devices > 1:
        notes.append(f"measured on one of the {config.devices} devices; exchanging gradients comes on top")
    return tuple(notes)
