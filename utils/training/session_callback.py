"""What happens around the steps of a run: count, log, measure, save, stop.

Nothing is logged from inside ``training_step``: losses stay tensors and are read every few steps.
"""

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor

from utils.runtime.progress import ProgressBar
from utils.training.background import CheckpointWriter
from utils.training.checkpoint_manager import take_snapshot
from utils.training.clean_stop import MARGIN_MINUTES, CleanStop, session_minutes
from utils.training.diagnosis import culprit, held_out_culprit, not_finite
from utils.training.evaluation import evaluate
from utils.training.extensions import Extension
from utils.training.metrics import MetricsLog
from utils.training.module_memory import ModuleMemory
from utils.training.parts import LightningPart, Progress
from utils.training.processes import agreed
from utils.training.run import METRICS, Run
from utils.training.schedules import parameter_groups
from utils.training.sharding import whole
from utils.training.state import ModelChange, RunState, Undo
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
        extensions: Mapping[str, Extension] | None = None,
    ) -> None:
        """Drive a run.

        Args:
            run: The run.
            module: Its model with loss and optimizer.
            stream: Its training data.
            resumed: States of all parts from a checkpoint; None or without progress at the very beginning.
            observers: What follows the metrics; only in the first process.
            mirror: Where a second copy of the run is kept.
            extensions: What layers above training bring, by name.
        """
        self.run, self.module, self.stream, self.resumed = run, module, stream, resumed or {}
        self.config, self.observers = run.config, observers
        self.progress = Progress()
        first = stream.rank == 0
        self.history = MetricsLog(run.directory / METRICS if first else None)
        self.memory = memory = ModuleMemory(run.model)
        self.prints: dict[str, Any] | None = None
        self.looked = 0
        self.parts = RunState({"progress": self.progress, "stream": stream, "metrics": self.history, "memory": memory})
        self.extensions = dict(extensions or {})
        for name, part in self.extensions.items():
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
        self.explained = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the state of a checkpoint, before the first batch is fetched."""
        self.stop.listen()
        self.optimizer = trainer.optimizers[0]
        self.parts.add("optimizer", LightningPart("optimizer", self.optimizer, self._groups))
        self.parts.add("schedule", LightningPart("schedule", trainer.lr_scheduler_configs[0].scheduler))
        if self.config.ema_decay is not None:
            self.average = WeightAverage(self.run.model, self.config.ema_decay)
            self.parts.add("average", self.average)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.parts.add("scaler", LightningPart("gradient scaler", scaler))
        if "progress" not in self.resumed:
            self.history.load_state_dict({"rows": 0})
            for name in self.extensions.keys() & self.resumed.keys():
                self.extensions[name].load_state_dict(self.resumed[name])
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
        device = self.module.adapter.device
        self.progress.pending = [loss.to(device) for loss in self.progress.pending]
        # A checkpoint ends a step; on another number of devices a step may have another number of batches.
        self.progress.batches = self.progress.step * self.config.accumulate
        self.progress.sessions += 1
        self.run.sessions = self.progress.sessions
        self.minutes_before, self.seconds_before = session_minutes(), self.progress.seconds
        self.module.batch_number = self.progress.batches
        for extension in self.extensions.values():
            extension.start(self)
        self.session_start = self.last_save = self.row_start = time.monotonic()

    def migrate(self, change: ModelChange) -> Undo:
        """Let everything that holds something about the model follow a change of it, or nothing.

        Returns:
            What puts everything back.

        Raises:
            MigrationError: A part cannot follow.
        """
        undo_parts = self.parts.migrate(change)
        self.module.follow_model()

        def undo() -> None:
            undo_parts()
            self.module.follow_model()

        return undo

    def _groups(self) -> list[dict[str, Any]]:
        """Return the groups that a new optimizer of the present model would have."""
        return parameter_groups(self.run.model, self.config.weight_decay)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at the end of an optimizer step log, measure, save and stop as the settings say."""
        progress, config = self.progress, self.config
        progress.batches += 1
        self.row_samples += config.batch_size * self.stream.world
        self.stream.advance()
        if not self.module.stepped:
            return
        progress.step += 1
        assert self.module.mean.loss is not None
        progress.pending.append(self.module.mean.loss)
        step, total = progress.step, self.run.total_steps
        self.run.step = step
        for extension in self.extensions.values():
            extension.weights_changed(self)
        if self.average is not None:
            self.average.update()
        if self.looked < 2:
            self._look_at_memory()
        assert self.bar is not None
        self.bar.update(1)
        last = step == total
        if last or step % config.log_every_steps == 0:
            self._log_training(trainer, batch)
        if last or step % config.val_every_steps == 0:
            self._measure(trainer)
        for extension in self.extensions.values():
            extension.after_step(self, batch)
        self.stopped = not last and self._must_stop(trainer)
        if last or self.stopped or self._is_agreed(self._save_is_due()):
            self.save(wait=last or self.stopped)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the extensions end their session too."""
        for extension in self.extensions.values():
            extension.end(self)
            extension.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let the checkpoint that is being written become whole; it was good when it was begun."""
        for extension in self.extensions.values():
            extension.release()
        if self.writer is not None:
            self.writer.finish(copy=False)

    def _look_at_memory(self) -> None:
        """Say, after the second step of a session, what the model changes in every step and no checkpoint holds."""
        self.looked += 1
        if self.looked == 1:
            self.prints = self.memory.prints()
            return
        assert self.prints is not None
        names, self.prints = self.memory.changing(self.prints), None
        if names and self.writer is not None:
            warnings.warn(
                f"{self.run.adapter.name} keeps in {', '.join(names[:5])} something that changes while it trains and "
                "that no checkpoint holds. If what it computes depends on that, a run that is resumed does not repeat "
                "one that is not. Keep tensors in buffers, numbers and lists of numbers in attributes, and draw from a "
                "torch.Generator or torch's own stream.",
                stacklevel=2,
            )

    def _must_stop(self, trainer: pl.Trainer) -> bool:
        """Tell whether the session ends after this step, the same in all processes."""
        self.stop.look()
        config, reason = self.config, self.stop.reason or self.run.stop_requested
        patience = config.early_stopping_patience
        # What the first process has measured counts: buffers, and with them losses, may differ between processes.
        first = self.stream.rank == 0
        if reason is None and first and patience is not None and self.progress.since_best >= patience:
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
            if stop and reason is None:
                # What asked another process to stop may have come since this one looked.
                self.stop.look()
                reason = self.stop.reason or "stopped by another process"
        self.stop.reason = reason
        return reason is not None

    def _is_agreed(self, flag: bool) -> bool:
        """Return what the first process says about saving, for which parts of weights need all of them."""
        return flag if self.module.sharding is None else agreed(flag)

    def _save_is_due(self) -> bool:
        """Tell whether a checkpoint should be begun now; while one is being written, a few steps later."""
        step, config = self.progress.step, self.config
        if self.writer is None:
            return False
        better = config.keep_best > 0 and self.progress.loss_now is not None and self.progress.since_best == 0
        if better or (config.keep_every_steps is not None and step % config.keep_every_steps == 0):
            return True
        if self.writer.busy:
            return False
        every = config.checkpoint_every_steps
        late = (time.monotonic() - self.last_save) / 60 >= config.checkpoint_every_minutes
        return late or step // every > self.begun_step // every

    def _log_training(self, trainer: pl.Trainer, batch: dict[str, Tensor]) -> None:
        """Write one row: the mean loss since the last row, as it was during these steps."""
        loss = self._mean_loss()
        self.progress.pending.clear()
        now = time.monotonic()
        seconds = max(now - self.row_start, 1e-9)
        norm = self.module.gradient_norm
        self._row(
            {
                "split": "train",
                "loss": loss,
                "learning_rate": self.module.learning_rate,
                "gradient_norm": float(norm) if norm is not None else math.nan,
                "samples_per_second": self.row_samples / seconds,
            }
        )
        self.row_start, self.row_samples = now, 0
        assert self.bar is not None
        self.bar.set_postfix_str(f"loss {loss:.3f}")

    def _mean_loss(self) -> float:
        """Return the mean of the steps' losses since the last row.

        Raises:
            NotFiniteError: It is not finite; nothing that came after the last good checkpoint is saved.
        """
        self._check_finite()
        return float(torch.stack([value.float() for value in self.progress.pending]).mean())

    def _check_finite(self) -> None:
        """Stop when a gradient or a loss since the last row is not finite; on a GPU this waits for the device."""
        module, pending = self.module, self.progress.pending
        module.check_finite(self._blame)
        losses = torch.stack([value.float() for value in pending]).tolist() if pending else []
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.progress.step - len(losses) + 1 + number
                batches = module.batches_of(step * self.config.accumulate - 1)
                raise not_finite(module, "training loss", loss, batches, self._blame(batches))

    def _blame(self, numbers: Iterable[int]) -> str:
        """Say which module is to blame for what batches of the past gave; empty where they cannot be made again."""
        stream, module = self.stream, self.module
        for number in () if stream.sequential else numbers:
            back = (self.progress.batches - number) * stream.world - stream.rank
            place = stream.consumed - back * stream.batch_size
            if place < 0:
                continue
            batch = {name: value.to(module.adapter.device) for name, value in stream.batch_at(place).items()}
            with module.trainer.precision_plugin.forward_context():
                said = culprit(module, batch, number)
            if said:
                return said
        return ""

    def _measure(self, trainer: pl.Trainer) -> None:
        """Write one row of held-out metrics, of the averaged weights when there are some."""
        started = time.monotonic()
        own = (extension.measure(self) for extension in self.extensions.values())
        if (found := next((each for each in own if each is not None), None)) is not None:
            self._row({"split": "validation", **found})
            self.row_start += time.monotonic() - started
            return
        context = trainer.precision_plugin.forward_context
        arguments = (self.run.adapter, self.run.data, self.config.batch_size, self.config.seed, context)
        if self.average is not None:
            with self.average.applied():
                measured = evaluate(*arguments)
        else:
            measured = evaluate(*arguments)
        self.progress.note_measurement(measured["loss"])
        if not self.explained and self._is_agreed(not math.isfinite(measured["loss"])):
            self.explained = True
            self._explain(measured["loss"], arguments)
        self._row({"split": "validation", **measured})
        self.row_start += time.monotonic() - started

    def _explain(self, loss: float, arguments: tuple[Any, Any, int, int, Any]) -> None:
        """Say, once in a session, why the held-out loss is not finite although that of training is."""
        # When training has failed too, that is the fault to tell.
        self._check_finite()
        if self.writer is None and self.module.sharding is None:
            return
        why = held_out_culprit(*arguments, nullcontext if self.average is None else self.average.applied)
        if self.writer is not None:
            said = f"The held-out loss is {loss} at step {self.progress.step}, and training goes on: {why}."
            self.run.notes.append(said)
            warnings.warn(
                f"{said} A checkpoint with such a loss never counts as the best. Look at what differs between training "
                "and eval mode there (running statistics, branches on self.training), and run utils.validate.",
                stacklevel=2,
            )

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
        sharding = self.module.sharding
        if self.writer is None and sharding is None:
            return
        if wait and self.writer is not None:
            self.writer.finish(copy=False)
        if self._is_agreed(self.begun_step != self.progress.step or (wait and not self.saved)):
            if self.writer is not None:
                self.writer.make_room(self.progress.loss_now)
            self._check_finite()
            self.progress.seconds = self.seconds_before + time.monotonic() - self.session_start
            weights: Any = self.run.model
            states = self.parts.state_dict()
            if sharding is not None:
                first = self.writer is not None
                weights, states = sharding.weights(keep=first), whole(states, keep=first)
            if self.writer is not None:
                self.writer.write(take_snapshot(self.progress.step, weights, states, self.progress.loss_now))
            self.begun_step, self.last_save = self.progress.step, time.monotonic()
        if self.writer is None:
            return
        if wait:
            self.writer.copy()
            self.writer.finish()
        self.writer.report()
        self.run.lost_checkpoints = self.writer.lost
