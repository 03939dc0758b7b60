"""The first steps of a run, taken by a copy of its model to find something out: the run's own path, and no trace of it.

Losses, masking, precision, clipping, accumulation and parameter groups are those of the run, because the steps are done
by `utils.training.training_module.TrainingModule` under Lightning, as in the run itself.
"""

import copy
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from utils.adapters import ModelAdapter
from utils.runtime.errors import RunError
from utils.runtime.seeding import isolated_streams
from utils.training.clean_stop import CleanStop, interruptible
from utils.training.config import TrainingConfig
from utils.training.diagnosis import NotFiniteError
from utils.training.prepared_data import PreparedData
from utils.training.processes import adapted, rank_and_world
from utils.training.recomputation import recomputed_blocks
from utils.training.schedules import make_optimizer
from utils.training.text_stream import open_stream
from utils.training.training_core import quiet_lightning
from utils.training.training_module import TrainingModule


def run_steps(
    adapter: ModelAdapter,
    data: PreparedData,
    config: TrainingConfig,
    steps: int,
    *,
    share: Callable[[int], float] = lambda step: 1.0,
    batches: Sequence[dict[str, Tensor]] | None = None,
    after: Callable[[float], bool] = lambda loss: False,
) -> bool:
    """Train a copy of a model for some steps; the model and the random streams are left as they are.

    On one device, which takes the samples of all. Not compiled: that would take longer than the steps.

    Args:
        adapter: The model.
        data: What to train on.
        config: How; its peak learning rate stays for all steps but for `share`.
        steps: How many optimizer steps.
        share: The learning rate of a step, as a share of the config's.
        batches: What to train on instead of the run's first batches, in turns.
        after: Takes the mean loss of each step, before its update, and says whether to stop.

    Returns:
        Whether all went well; false when a loss or a gradient was not finite.

    Raises:
        RunError: The model cannot be copied, or several processes train together.
        KeyboardInterrupt: Someone interrupted.
    """
    config = adapted(config, 1)
    module = _Module(_twin(adapter), data, config, steps, share)
    watch = _Watch(module, after)
    count = steps * config.accumulate
    with ExitStack() as stack:
        stack.enter_context(isolated_streams(config.seed, "trial"))
        stack.enter_context(quiet_lightning())
        stack.enter_context(watch.stop.listening())
        stack.enter_context(interruptible())
        if config.gradient_checkpointing:
            stack.enter_context(recomputed_blocks(module.model))
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=1,
            precision=config.resolved_precision,  # type: ignore[arg-type]
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        module.train()
        source = open_stream(data, config) if batches is None else None
        try:
            trainer.fit(module, _Batches(count, watch, source.batches(count) if source else _turns(batches or [])))
        except NotFiniteError:
            return False
    if watch.stop.reason == "terminated":
        signal.raise_signal(signal.SIGTERM)
    if watch.stop.reason is not None:
        raise KeyboardInterrupt
    return True


def _twin(adapter: ModelAdapter) -> ModelAdapter:
    """Return an adapter for a copy of the model."""
    if rank_and_world()[1] > 1:
        raise RunError(
            "A setting is 'auto', and several processes train together.",
            "Expected one process: what each of them found would differ.",
            "Start the run with utils.train in a single process, which starts the others.",
        )
    trial = copy.copy(adapter)
    try:
        trial.module = copy.deepcopy(adapter.module)
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise RunError(
            f"{adapter.name} cannot be copied ({type(error).__name__}: {error}).",
            "Expected a model that copy.deepcopy copies: settings are found by training a copy.",
            "Set learning_rate and batch_size to numbers.",
        ) from error
    return trial


def _turns(batches: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield some batches again and again."""
    while True:
        yield from batches


class _Module(TrainingModule):
    """The run's module with another schedule."""

    def __init__(
        self,
        adapter: ModelAdapter,
        data: PreparedData,
        config: TrainingConfig,
        steps: int,
        share: Callable[[int], float],
    ) -> None:
        super().__init__(adapter, data, config, steps)
        self.share = share

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.model, self.config)
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, self.share)}


class _Watch(pl.Callback):
    """Tells the losses, and stops when it is asked to."""

    def __init__(self, module: TrainingModule, after: Callable[[float], bool]) -> None:
        self.module, self.after = module, after
        self.stop, self.stopped = CleanStop(), False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.module.stepped or self.stopped:
            return
        self.module.check_finite()
        assert self.module.mean.loss is not None
        loss = float(self.module.mean.loss)
        self.stop.look()
        self.stopped = self.after(loss) or self.stop.reason is not None


class _Batches:
    """Batches as an iterable of known length, which ends early when the steps are to stop."""

    def __init__(self, count: int, watch: _Watch, source: Iterator[dict[str, Tensor]]) -> None:
        self.count, self.watch, self.source = count, watch, source

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.count):
            if self.watch.stopped:
                return
            yield next(self.source)
