"""The training loop, on Lightning, lean and exactly resumable.

What is unusual here:

- Every batch reseeds all random streams from (seed, "batch", number of the batch), so nothing random has to be
  remembered, and neither validation nor a checkpoint can move what training draws.
- Lightning sees one pass over a stream that starts where the run stands and ends at its last step; the position lives
  in `utils.training.stream.SampleStream`, not in Lightning's counters.
- A step that saves waits for a copy of the state in memory and for nothing else (`utils.training.background`).
- Several devices are several processes that each open the run directory (`utils.training.processes`): what a resume
  needs is all that a process needs.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from utils.runtime.errors import RunError
from utils.runtime.progress import progress_bar
from utils.runtime.resources import is_out_of_memory
from utils.runtime.seeding import isolated_streams
from utils.training.clean_stop import interruptible
from utils.training.extensions import Extension
from utils.training.out_of_memory import lost_worker, out_of_memory
from utils.training.processes import processes_here, rank_and_world
from utils.training.recomputation import recomputed_blocks
from utils.training.run import Run
from utils.training.session_callback import Observer, SessionCallback
from utils.training.sharding import Sharding, explained, is_sharded
from utils.training.shielding import Shielded
from utils.training.stream import SampleStream
from utils.training.text_stream import open_stream
from utils.training.training_module import TrainingModule
from utils.training.unused_parameters import leaves_some_out, unused_explained

LIGHTNING = ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
QUIET_WARNINGS = (
    ".*does not have many workers.*",
    ".*no `?val_dataloader`?.*",
    ".*isinstance.treespec.*",
    ".*LeafSpec.*",
    ".*lr_scheduler.step.*before.*optimizer.step.*",
    ".*Found .* module.s. in eval mode.*",
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice and device list out of the notebook; real warnings of the model pass."""
    loggers = [logging.getLogger(name) for name in LIGHTNING]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for pattern in QUIET_WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fit(
    run: Run,
    resumed: dict[str, Any] | None = None,
    progress: bool = True,
    observers: list[Observer] | None = None,
    mirror: Path | None = None,
    extensions: Mapping[str, Extension] | None = None,
) -> Run:
    """Train a run from where it stands to its end, its time budget or a signal.

    Args:
        run: The run; its model holds the weights to start from.
        resumed: States of all parts from a checkpoint; None or without progress at the very beginning.
        progress: Show a progress bar.
        observers: Follow the metrics while they come.
        mirror: Where a second copy of the run is kept, brought up to date after each checkpoint.
        extensions: What layers above training bring, by name.

    Returns:
        The same run.

    Raises:
        RunError: The loss is not finite, or memory ran out.
    """
    config = run.config
    rank, world = rank_and_world()
    run.total_steps = config.total_steps(run.data.pass_samples)
    own = (extension.open_stream(run) for extension in (extensions or {}).values())
    stream = next((each for each in own if each is not None), None) or open_stream(run.data, config, rank, world)
    done = 0
    if resumed and "progress" in resumed:
        done = resumed["progress"]["step"]
        stream.load_state_dict(resumed["stream"])
    sharding = Sharding(run.adapter, config) if world > 1 and is_sharded(config) else None
    spare = world > 1 and sharding is None and leaves_some_out(run.adapter, run.data, config)
    restarts = [place // config.samples_per_step for place in stream.restarts]
    module = TrainingModule(run.adapter, run.data, config, run.total_steps, sharding, restarts)
    watching: list[Observer] = [Shielded(observer) for observer in observers or []] if rank == 0 else []
    callback = SessionCallback(run, module, stream, resumed, watching, mirror, extensions)
    remaining = (run.total_steps - done) * config.accumulate
    run.step = done
    with ExitStack() as stack:
        stack.enter_context(isolated_streams(config.seed, "fit"))
        stack.enter_context(quiet_lightning())
        stack.enter_context(callback.stop.listening())
        stack.enter_context(interruptible())
        if config.gradient_checkpointing:
            stack.enter_context(recomputed_blocks(run.model))
        if config.compile:
            stack.enter_context(compiled(run.model))
        if sharding is not None:
            stack.enter_context(explained(run.adapter))
        elif world > 1:
            stack.enter_context(unused_explained(run.adapter))
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=processes_here(),
            num_nodes=world // processes_here(),
            strategy=_strategy(sharding, world, spare),
            precision=config.resolved_precision,  # type: ignore[arg-type]
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(run.directory),
        )
        module.train()
        for observer in watching:
            observer.start(run)
        shown = progress and rank == 0
        with progress_bar(run.total_steps, f"Training {run.adapter.name}", shown, initial=done) as bar:
            callback.bar = bar
            trouble = None
            try:
                trainer.fit(module, batches(stream, remaining, callback))
            except Exception as error:
                if (lost := lost_worker(callback, error)) is not None:
                    raise lost from error
                if not is_out_of_memory(error):
                    raise
                trouble = next(iter(str(error).splitlines()), type(error).__name__)
            if trouble is not None:
                raise out_of_memory(callback, trouble)
            callback.save(wait=True)
            if sharding is not None:
                sharding.undo()
    run.adapter.module.eval()
    run.status = "finished" if run.step == run.total_steps else callback.stop.reason or "stopped"
    if not callback.saved:
        run.status += ", but not saved"
    for observer in watching:
        observer.close(run.metrics)
    return run


def _strategy(sharding: Sharding | None, world: int, spare: bool) -> Any:
    """Return how Lightning connects the processes; `spare` says that a step may leave parameters out."""
    if world == 1:
        return "auto"
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

    if sharding is not None:
        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    # Looking for them in every step takes time, and DDP, which waits for each gradient, fails without.
    return DDPStrategy(find_unused_parameters=spare)


@contextmanager
def compiled(module: nn.Module) -> Iterator[None]:
    """Compile a model's calls while the block runs; its class, names and weights stay as they are.

    Raises:
        RunError: The compiler cannot handle it, or the machine has none.
    """
    module.compile()
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = str(error).strip().splitlines()
        raise RunError(
            f"torch.compile cannot handle {type(module).__name__}: {lines[0] if lines else type(error).__name__}",
            "Expected a model that TorchDynamo traces, and a compiler on this machine.",
            "Set compile to false.",
        ) from error
    finally:
        module._compiled_call_impl = None


def batches(stream: SampleStream, count: int, callback: SessionCallback) -> Any:
    """Return the rest of a run's batches, prepared here or in worker processes."""
    workers = callback.config.workers
    if not workers or stream.sequential:
        # A text that is read while training is read in its order, by this process alone.
        return Batches(stream, count, callback)
    loader = DataLoader(
        Positions(stream, count), batch_size=None, num_workers=workers, multiprocessing_context="fork",
        generator=torch.Generator(), persistent_workers=False,
    )  # fmt: skip
    return Batches(stream, count, callback, loader)


class Positions(Dataset[dict[str, Tensor]]):
    """The batches of a stream by number: what a worker prepares depends on nothing but the number."""

    def __init__(self, stream: SampleStream, count: int) -> None:
        """Number the next `count` batches, from the stream's present position."""
        self.stream, self.count, self.start = stream, count, stream.consumed

    def __len__(self) -> int:
        """Return how many there are."""
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return one batch."""
        stream = self.stream
        return stream.batch_at(self.start + (number * stream.world + stream.rank) * stream.batch_size)


class Batches:
    """The rest of a run's batches, as an iterable of known length that ends early when the run is to stop."""

    def __init__(self, stream: SampleStream, count: int, callback: SessionCallback, source: Any = None) -> None:
        """Take the next `count` batches of a stream, or of a `source` that yields just these."""
        self.stream, self.count, self.callback, self.source = stream, count, callback, source

    def __len__(self) -> int:
        """Return how many batches there are."""
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Start at the stream's present position."""
        for batch in self.source or self.stream.batches(self.count):
            if self.callback.stopped:
                return
            yield batch
