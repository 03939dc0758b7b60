"""What happens around the steps of a run: count, log, measure, save, stop.

Nothing is logged from inside ``training_step``: losses stay tensors and are read every few steps.
"""

import math
import time
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor

from utils.runtime.errors import RunError
from utils.runtime.progress import ProgressBar
from utils.training.background import CheckpointWriter
from utils.training.checkpoint_manager import take_snapshot
from utils.training.clean_stop import MARGIN_MINUTES, CleanStop, session_minutes
from utils.training.evaluation import evaluate
from utils.training.metrics import MetricsLog
from utils.training.module_memory import ModuleMemory
from utils.training.parts import LightningPart, Progress
from utils.training.run import METRICS, Run
from utils.training.state import RunState, StatefulPart
from utils.training.stream import SampleStream
from utils.training.training_module import TrainingModule
from utils.training.weight_average import WeightAverage


class Observer(Protocol):
    """Something that follows a run: a picture in a notebook, an outside tracker. What it raises is its own fault."""

    def start(self, run: Run) -> None:
        """Get ready; the run's earlier rows are in ``run.metrics``."""

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Take note of the metrics so far; called after every row."""

    def close(self, rows: list[dict[str, Any]]) -> None:
        """Take note of all metrics of the run; the session has ended."""


class SessionCallback(pl.Callback):
    """Counts, logs, measures, saves and stops."""

    def __init__(
        self,
        run: Run,
        module: TrainingModule,
        stream: SampleStream,
        resumed: dict[str, Any] | None,
        observers: list[Observer],
        mirror: Path | None,
        extra_parts: dict[str, StatefulPart] | None = None,
    ) -> None:
        """Drive a run.

        Args:
            run: The run.
            module: Its model with loss and optimizer.
            stream: Its training data.
            resumed: States of all parts from a checkpoint; None or without progress at the very beginning.
            observers: What follows the metrics; only in the first process.
            mirror: Where a second copy of the run is kept.
            extra_parts: Parts of the state that layers above training bring, by name.
        """
        self.run, self.module, self.stream, self.resumed = run, module, stream, resumed or {}
        self.config, self.observers = run.config, observers
        self.progress = Progress()
        first = stream.rank == 0
        self.history = MetricsLog(run.directory / METRICS if first else None)
        memory = ModuleMemory(run.model)
        self.parts = RunState({"progress": self.progress, "stream": stream, "metrics": self.history, "memory": memory})
        for name, part in (extra_parts or {}).items():
            self.parts.add(name, part)
        self.average: WeightAverage | None = None
        self.writer = CheckpointWriter(run.checkpoints, run.directory, mirror) if first else None
        self.bar: ProgressBar | None = None
        self.stop = CleanStop()
        self.stopped = False
        self.session_start = self.last_save = self.row_start = time.monotonic()
        self.minutes_before, self.seconds_before = 0.0, 0.0
        self.row_samples = 0
        self.begun_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the state of a checkpoint, before the first batch is fetched."""
        self.stop.listen()
        self.optimizer = trainer.optimizers[0]
        self.parts.add("optimizer", LightningPart("optimizer", self.optimizer))
        self.parts.add("schedule", LightningPart("schedule", trainer.lr_scheduler_configs[0].scheduler))
        if self.config.ema_decay is not None:
            self.average = WeightAverage(self.run.model, self.config.ema_decay)
            self.parts.add("average", self.average)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.parts.add("scaler", LightningPart("gradient scaler", scaler))
        if "progress" not in self.resumed:
            self.history.load_state_dict({"rows": 0})
        else:
            states = dict(self.resumed)
            if scaler is None:
                # A run that began on a GPU with a gradient scaler continues on a machine that needs none.
                states.pop("scaler", None)
            elif "scaler" not in states:
                states["scaler"] = scaler.state_dict()
            self.parts.load_state_dict(states)
            self.begun_step = self.progress.step
            if self.writer is not None:
                self.writer.saved_step = self.progress.step
        # A checkpoint ends a step; on another number of devices a step may have another number of batches.
        self.progress.batches = self.progress.step * self.config.accumulate
        self.progress.sessions += 1
        self.run.sessions = self.progress.sessions
        self.minutes_before, self.seconds_before = session_minutes(), self.progress.seconds
        self.module.batch_number = self.progress.batches
        self.session_start = self.last_save = self.row_start = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at the end of an optimizer step log, measure, save and stop as the settings say."""
        progress, config = self.progress, self.config
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if trainer.world_size > 1:
            # At once, not when a row is due: the first process alone remembers what is pending over a kill.
            loss = trainer.strategy.reduce(loss, reduce_op="mean")
        progress.pending.append(loss)
        progress.batches += 1
        self.row_samples += config.batch_size * self.stream.world
        self.stream.advance()
        if not self.module.stepped:
            return
        progress.step += 1
        step, total = progress.step, self.run.total_steps
        self.run.step = step
        if self.average is not None:
            self.average.update()
        assert self.bar is not None
        self.bar.update(1)
        last = step == total
        if last or step % config.log_every_steps == 0:
            self._log_training(trainer, batch)
        if last or step % config.val_every_steps == 0:
            self._measure(trainer)
        self.stopped = not last and self._must_stop(trainer)
        if last or self.stopped or self._save_is_due():
            self.save(wait=last or self.stopped)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let the checkpoint that is being written become whole; it was good when it was begun."""
        if self.writer is not None:
            self.writer.finish(copy=False)

    def _must_stop(self, trainer: pl.Trainer) -> bool:
        """Tell whether the session ends after this step, the same in all processes."""
        self.stop.look()
        config, reason = self.config, self.stop.reason or self.run.stop_requested
        patience = config.early_stopping_patience
        if reason is None and patience is not None and self.progress.since_best >= patience:
            reason = "finished early"
        minutes = (time.monotonic() - self.session_start) / 60
        limit = config.session_limit_minutes
        if reason is None and limit is not None and self.minutes_before + minutes >= limit - MARGIN_MINUTES:
            reason = "stopped before the end of the machine's session"
        if reason is None and config.time_budget_minutes is not None and minutes >= config.time_budget_minutes:
            reason = "stopped by its time budget"
        if trainer.world_size > 1:
            flag = torch.tensor(float(reason is not None), device=self.module.adapter.device)
            stop = bool(trainer.strategy.reduce(flag, reduce_op="sum"))
            reason = (reason or "stopped by another process") if stop else None
        self.stop.reason = reason
        return reason is not None

    def _save_is_due(self) -> bool:
        """Tell whether a checkpoint should be begun now; while one is being written, a few steps later."""
        step, config = self.progress.step, self.config
        if self.writer is None:
            return False
        if config.keep_every_steps is not None and step % config.keep_every_steps == 0:
            return True
        if self.writer.busy:
            return False
        every = config.checkpoint_every_steps
        better = config.keep_best > 0 and self.progress.loss_now is not None and self.progress.since_best == 0
        late = (time.monotonic() - self.last_save) / 60 >= config.checkpoint_every_minutes
        return better or late or step // every > self.begun_step // every

    def _log_training(self, trainer: pl.Trainer, batch: dict[str, Tensor]) -> None:
        """Write one row: the mean loss since the last row, as it was during these steps."""
        self.module.check_gradient()
        loss = self._mean_loss()
        self.progress.pending.clear()
        now = time.monotonic()
        seconds = max(now - self.row_start, 1e-9)
        norm = self.module.gradient_norm
        self._row(
            {
                "split": "train",
                "loss": loss,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "gradient_norm": float(norm) if norm is not None else math.nan,
                "samples_per_second": self.row_samples / seconds,
            }
        )
        self.row_start, self.row_samples = now, 0
        assert self.bar is not None
        self.bar.set_postfix_str(f"loss {loss:.3f}")

    def _mean_loss(self) -> float:
        """Return the mean loss since the last row, over all processes.

        Raises:
            RunError: It is not finite; nothing that came after the last good checkpoint is saved.
        """
        loss = float(torch.stack([value.float() for value in self.progress.pending]).mean())
        if not math.isfinite(loss):
            raise RunError(
                f"The training loss is {loss} in the steps up to {self.progress.step}.",
                f"Expected a finite number; the last good state is kept in {self.run.checkpoints.directory}.",
                "Lower the learning rate, and run utils.validate on the model.",
            )
        return loss

    def _measure(self, trainer: pl.Trainer) -> None:
        """Write one row of held-out metrics, of the averaged weights when there are some."""
        started = time.monotonic()
        context = trainer.precision_plugin.forward_context
        arguments = (self.run.adapter, self.run.data, self.config.batch_size, self.config.seed, context)
        if self.average is not None:
            with self.average.applied():
                measured = evaluate(*arguments)
        else:
            measured = evaluate(*arguments)
        self.progress.note_measurement(measured["loss"])
        self._row({"split": "validation", **measured})
        self.row_start += time.monotonic() - started

    def _row(self, values: dict[str, Any]) -> None:
        self.progress.seconds = self.seconds_before + time.monotonic() - self.session_start
        self.history.append({"step": self.progress.step, **values, "seconds": self.progress.seconds})
        self.run.metrics = self.history.rows
        for observer in self.observers:
            observer.update(self.history.rows)

    @property
    def saved(self) -> bool:
        """Whether the present state is on disk."""
        return self.writer is None or self.writer.saved_step == self.progress.step

    def save(self, wait: bool = False) -> None:
        """Begin a checkpoint; what goes wrong with it is told later: the earlier ones are whole.

        Args:
            wait: Return when everything is written, the second copy included.
        """
        if self.writer is None:
            return
        if wait:
            self.writer.finish(copy=False)
        if self.begun_step != self.progress.step or (wait and not self.saved):
            self.writer.make_room()
            self.module.check_gradient()
            self.progress.seconds = self.seconds_before + time.monotonic() - self.session_start
            states = self.parts.state_dict()
            self.writer.write(take_snapshot(self.progress.step, self.run.model, states, self.progress.loss_now))
            self.begun_step, self.last_save = self.progress.step, time.monotonic()
        if wait:
            self.writer.copy()
            self.writer.finish()
        self.writer.report()
        self.run.lost_checkpoints = self.writer.lost
