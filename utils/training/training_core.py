"""The training loop, on Lightning, lean and exactly resumable.

What is unusual here:

- Every forward pass reseeds all random streams from (seed, "batch", number of the batch), so nothing random has to be
  remembered, and neither validation nor a checkpoint can move what training draws.
- Lightning sees one pass over a stream that starts where the run stands and ends at its last step; the position lives
  in `utils.training.stream.SampleStream`, not in Lightning's counters.
- Nothing is logged from inside ``training_step``; one callback reads the loss every few steps, measures, saves, stops.
"""

import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from utils.adapters import ModelAdapter
from utils.runtime.errors import CheckpointError, RunError
from utils.runtime.progress import ProgressBar, progress_bar
from utils.runtime.seeding import derive_seed, isolated_streams, seed_streams
from utils.training.config import TrainingConfig
from utils.training.evaluation import evaluate, objective
from utils.training.metrics import MetricsLog
from utils.training.mirror import mirror_run
from utils.training.module_memory import ModuleMemory
from utils.training.prepared_data import PreparedData
from utils.training.run import METRICS, Run
from utils.training.state import MigrationError, ModelChange, RunState
from utils.training.stream import SampleStream

QUIET_WARNINGS = (
    ".*does not have many workers.*",
    ".*no `?val_dataloader`?.*",
    ".*isinstance.treespec.*",
    ".*LeafSpec.*",
    ".*lr_scheduler.step.*before.*optimizer.step.*",
    ".*Found .* module.s. in eval mode.*",
)


class View(Protocol):
    """Something that shows a run while it trains."""

    zlib_bits_per_byte: float | None
    """Baseline of the held-out text, set before the first rows come."""

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Show the metrics so far, if it is time."""

    def close(self, rows: list[dict[str, Any]]) -> None:
        """Show all metrics of the session, which has ended."""


class TrainingModule(pl.LightningModule):
    """A model with its loss, optimizer and learning-rate schedule, in the form that Lightning drives."""

    def __init__(self, adapter: ModelAdapter, data: PreparedData, config: TrainingConfig, total_steps: int) -> None:
        """Wrap a model; see `utils.training.config.TrainingConfig` for the settings."""
        super().__init__()
        self.model = adapter.module
        self.adapter, self.data, self.config, self.total_steps = adapter, data, config, total_steps
        self.batch_number = 0
        self.gradient_norm: Tensor | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch in nats."""
        seed = derive_seed(self.config.seed, "masking", self.batch_number)
        return objective(self.adapter, self.data, batch, seed)[0]

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule: linear warm-up, then a cosine.

        Matrices decay, vectors do not (Loshchilov & Hutter, arXiv:1711.05101).
        """
        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [(name, p) for name, p in trainable if p.dim() >= 2], "weight_decay": self.config.weight_decay},
            {"params": [(name, p) for name, p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.config.learning_rate, betas=(0.9, 0.95)
        )
        schedule = LambdaLR(optimizer, lambda step: learning_rate_share(step, self.total_steps, self.config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the global norm and keep the norm, which Lightning's own clipping throws away."""
        self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)


def learning_rate_share(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step as a share of the peak: linear warm-up, then a cosine."""
    warmup = round(config.warmup_share * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    final = config.final_learning_rate_share
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class LightningPart:
    """The optimizer, its schedule or the gradient scaler as a part of the run's state."""

    def __init__(self, name: str, target: Any) -> None:
        """Wrap what has ``state_dict`` and ``load_state_dict``."""
        self.name, self.target = name, target

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        return dict(self.target.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over."""
        self.target.load_state_dict(state)

    def migrate(self, change: ModelChange) -> None:
        """Refuse: this version knows no operator that changes a model."""
        raise MigrationError(f"the {self.name} cannot follow a changed model in this version")


class Progress:
    """The counters of a run: steps, batches, sessions, and the losses since the last row of metrics."""

    def __init__(self) -> None:
        """Start at zero."""
        self.step, self.batches, self.sessions = 0, 0, 0
        self.seconds = 0.0
        self.pending: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        pending = (
            torch.stack([loss.detach().float().cpu() for loss in self.pending]) if self.pending else torch.zeros(0)
        )
        counts = {"step": self.step, "batches": self.batches, "sessions": self.sessions}
        return {**counts, "seconds": self.seconds, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting."""
        self.step, self.batches, self.sessions = state["step"], state["batches"], state["sessions"]
        self.seconds = state["seconds"]
        self.pending = list(state["pending"])

    def migrate(self, change: ModelChange) -> None:
        """A change of the model does not change what was counted."""


class RunCallback(pl.Callback):
    """Counts, seeds, logs, measures, saves and stops."""

    def __init__(
        self,
        run: Run,
        module: TrainingModule,
        stream: SampleStream,
        resumed: dict[str, Any] | None,
        view: View | None,
        mirror: Path | None,
    ) -> None:
        """Drive a run.

        Args:
            run: The run.
            module: Its model with loss and optimizer.
            stream: Its training data.
            resumed: States of all parts from a checkpoint; None or without progress at the very beginning.
            view: Shows the metrics while they come.
            mirror: Where a second copy of the run is kept.
        """
        self.run, self.module, self.stream, self.resumed, self.view = run, module, stream, resumed or {}, view
        self.mirror, self.mirror_fails = mirror, False
        self.config = run.config
        self.progress = Progress()
        self.history = MetricsLog(run.directory / METRICS)
        memory = ModuleMemory(run.model)
        self.parts = RunState({"progress": self.progress, "stream": stream, "metrics": self.history, "memory": memory})
        self.bar: ProgressBar | None = None
        self.stop = CleanStop()
        self.stopped = False
        self.session_start = self.last_save = self.row_start = time.monotonic()
        self.seconds_before = 0.0
        self.row_samples = 0
        self.saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the state of a checkpoint, before the first batch is fetched."""
        self.stop.listen()
        self.optimizer = trainer.optimizers[0]
        self.parts.add("optimizer", LightningPart("optimizer", self.optimizer))
        self.parts.add("schedule", LightningPart("schedule", trainer.lr_scheduler_configs[0].scheduler))
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
            self.saved_step = self.progress.step
        self.progress.sessions += 1
        self.run.sessions = self.progress.sessions
        self.seconds_before = self.progress.seconds
        self.module.batch_number = self.progress.batches
        self.session_start = self.last_save = self.row_start = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed everything that this batch may draw."""
        seed_streams(self.config.seed, "batch", self.progress.batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; at the end of an optimizer step log, measure, save and stop as the settings say."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        # Lightning hands the loss out divided by the number of accumulated batches.
        self.progress.pending.append(loss.detach() * self.config.accumulate)
        self.progress.batches += 1
        self.row_samples += self.config.batch_size
        self.stream.advance()
        self.module.batch_number = self.progress.batches
        if self.progress.batches % self.config.accumulate:
            return
        self.progress.step += 1
        step, total = self.progress.step, self.run.total_steps
        self.run.step = step
        assert self.bar is not None
        self.bar.update(1)
        last = step == total
        if last or step % self.config.log_every_steps == 0:
            self._log_training()
        if last or step % self.config.val_every_steps == 0:
            self._measure(trainer)
        minutes = (time.monotonic() - self.session_start) / 60
        if not last and self.config.time_budget_minutes is not None and minutes >= self.config.time_budget_minutes:
            self.stop.reason = self.stop.reason or "stopped by its time budget"
        self.stopped = self.stop.reason is not None
        since_save = (time.monotonic() - self.last_save) / 60
        due = step % self.config.checkpoint_every_steps == 0 or since_save >= self.config.checkpoint_every_minutes
        if last or self.stopped or due:
            self.save()

    def _copy(self) -> None:
        """Bring the second copy up to date; when that fails, warn once and try again after the next checkpoint."""
        if self.mirror is None:
            return
        try:
            mirror_run(self.run.directory, self.mirror)
            self.mirror_fails = False
        except (OSError, RunError) as error:
            if not self.mirror_fails:
                reason = getattr(error, "strerror", None) or error
                warnings.warn(
                    f"The copy in {self.mirror} cannot be written ({reason}). Training goes on with "
                    f"the run in {self.run.directory}; the copy is tried again after each checkpoint.",
                    stacklevel=2,
                )
            self.mirror_fails = True

    def _log_training(self) -> None:
        """Write one row: the mean loss since the last row, as it was during these steps."""
        loss = self._mean_loss()
        self.progress.pending.clear()
        now = time.monotonic()
        seconds = max(now - self.row_start, 1e-9)
        self._row(
            {
                "split": "train",
                "loss": loss,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "gradient_norm": float(self.module.gradient_norm)
                if self.module.gradient_norm is not None
                else math.nan,
                "samples_per_second": self.row_samples / seconds,
            }
        )
        self.row_start, self.row_samples = now, 0
        assert self.bar is not None
        self.bar.set_postfix_str(f"loss {loss:.3f}")

    def _mean_loss(self) -> float:
        """Return the mean loss since the last row.

        Raises:
            RunError: It is not finite; nothing that came after the last good checkpoint is saved.
        """
        loss = float(torch.stack([value.float().cpu() for value in self.progress.pending]).mean())
        if not math.isfinite(loss):
            raise RunError(
                f"The training loss is {loss} in the steps up to {self.progress.step}.",
                f"Expected a finite number; the last good state is kept in {self.run.checkpoints.directory}.",
                "Lower the learning rate, and run utils.validate on the model.",
            )
        return loss

    def _check_gradient(self) -> None:
        """Keep weights that a gradient without a finite norm has spoiled out of the checkpoints.

        Raises:
            RunError: The last gradient is not finite. A gradient scaler leaves such a step out by itself.
        """
        norm = self.module.gradient_norm
        if norm is not None and "scaler" not in list(self.parts) and not math.isfinite(float(norm)):
            raise RunError(
                f"The gradient's norm is {float(norm)} at step {self.progress.step}.",
                f"Expected a finite number; the last good state is kept in {self.run.checkpoints.directory}.",
                "Lower the learning rate, and run utils.validate on the model.",
            )

    def _measure(self, trainer: pl.Trainer) -> None:
        """Write one row of held-out metrics."""
        started = time.monotonic()
        context = trainer.precision_plugin.forward_context
        measured = evaluate(self.run.adapter, self.run.data, self.config.batch_size, self.config.seed, context)
        self._row({"split": "validation", **measured})
        self.row_start += time.monotonic() - started

    def _row(self, values: dict[str, Any]) -> None:
        self.progress.seconds = self.seconds_before + time.monotonic() - self.session_start
        self.history.append({"step": self.progress.step, **values, "seconds": self.progress.seconds})
        self.run.metrics = self.history.rows
        if self.view is not None:
            self.view.update(self.history.rows)

    @property
    def saved(self) -> bool:
        """Whether the present state is on disk."""
        return self.saved_step == self.progress.step

    def save(self) -> None:
        """Write a checkpoint; when that fails, warn and go on: the earlier ones are whole."""
        if self.saved:
            return
        if self.progress.pending:
            self._mean_loss()
        self._check_gradient()
        self.progress.seconds = self.seconds_before + time.monotonic() - self.session_start
        try:
            self.run.checkpoints.save(self.progress.step, self.run.model, self.parts.state_dict())
            self.saved_step = self.progress.step
        except CheckpointError as error:
            self.run.lost_checkpoints += 1
            warnings.warn(f"{error} Training goes on.", stacklevel=2)
        self._copy()
        self.last_save = time.monotonic()


class CleanStop:
    """Turns SIGTERM and the first interrupt into a stop at the end of the step; a second interrupt is immediate."""

    def __init__(self) -> None:
        """Nothing has asked to stop yet."""
        self.reason: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals while the block runs; outside the main thread nothing can be handled."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Install the handlers; again after Lightning has put its own in, which leave in the middle of a step."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = "interrupted" if number == signal.SIGINT else "terminated"


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice and device list out of the notebook; real warnings of the model pass."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning", "lightning.pytorch")]
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
    view: View | None = None,
    mirror: Path | None = None,
) -> Run:
    """Train a run from where it stands to its end, its time budget or a signal.

    Args:
        run: The run; its model holds the weights to start from.
        resumed: States of all parts from a checkpoint; None or without progress at the very beginning.
        progress: Show a progress bar.
        view: Shows the metrics while they come.
        mirror: Where a second copy of the run is kept, brought up to date after each checkpoint.

    Returns:
        The same run.

    Raises:
        RunError: The loss is not finite.
    """
    config = run.config
    stream = SampleStream(run.data.train, config.batch_size, config.seed)
    run.total_steps = config.total_steps(stream.samples)
    done = 0
    if resumed and "progress" in resumed:
        done = resumed["progress"]["step"]
        stream.load_state_dict(resumed["stream"])
    module = TrainingModule(run.adapter, run.data, config, run.total_steps)
    if view is not None:
        view.zlib_bits_per_byte = run.data.facts.get("zlib_bits_per_byte")
    callback = RunCallback(run, module, stream, resumed, view, mirror)
    remaining = (run.total_steps - done) * config.accumulate
    run.step = done
    with isolated_streams(config.seed, "fit"), quiet_lightning(), callback.stop.listening():
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=1,
            precision=config.resolved_precision,  # type: ignore[arg-type]
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip_norm,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(run.directory),
        )
        module.train()
        with progress_bar(run.total_steps, f"Training {run.adapter.name}", progress, initial=done) as bar:
            callback.bar = bar
            trainer.fit(module, Batches(stream, remaining, callback))
            if not callback.saved:
                callback.save()
    run.adapter.module.eval()
    run.status = "finished" if run.step == run.total_steps else callback.stop.reason or "stopped"
    if not callback.saved:
        run.status += ", but not saved"
    if view is not None:
        view.close(run.metrics)
    return run


class Batches:
    """The rest of a run's batches, as an iterable of known length that ends early when the run is to stop."""

    def __init__(self, stream: SampleStream, count: int, callback: RunCallback) -> None:
        """Take the next `count` batches of a stream."""
        self.stream, self.count, self.callback = stream, count, callback

    def __len__(self) -> int:
        """Return how many batches there are."""
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Start at the stream's present position."""
        for batch in self.stream.batches(self.count):
            if self.callback.stopped:
                return
            yield batch
