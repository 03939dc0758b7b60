"""A model with its loss and optimizer, as Lightning drives it.

Optimization is manual: Lightning's automatic loop wraps each step in closures and counters that cost more than the
step of a small model, and a gradient that is not finite must be noticed before it reaches the weights.
"""

import math
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.runtime.errors import RunError
from utils.runtime.seeding import derive_seed, seed_streams
from utils.training.config import TrainingConfig
from utils.training.diagnosis import culprit
from utils.training.evaluation import objective
from utils.training.prepared_data import PreparedData
from utils.training.schedules import make_optimizer, make_schedule


class TrainingModule(pl.LightningModule):
    """A model with its loss, optimizer and learning-rate schedule, in the form that Lightning drives.

    Attributes:
        batch_number: Number of the batch that comes next, over all sessions; seeds what the batch may draw.
        stepped: Whether the last batch ended an optimizer step.
        gradient_norm: Norm of the last gradient before clipping.
    """

    def __init__(self, adapter: ModelAdapter, data: PreparedData, config: TrainingConfig, total_steps: int) -> None:
        """Wrap a model; see `utils.training.config.TrainingConfig` for the settings."""
        super().__init__()
        self.automatic_optimization = False
        self.model = adapter.module
        self.adapter, self.data, self.config, self.total_steps = adapter, data, config, total_steps
        self.batch_number = 0
        self.stepped = False
        self.gradient_norm: Tensor | None = None
        self.trained: list[nn.Parameter] = []

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule; `training_step` drives both."""
        optimizer = make_optimizer(self.model, self.config)
        return {"optimizer": optimizer, "lr_scheduler": make_schedule(optimizer, self.total_steps, self.config)}

    def on_train_start(self) -> None:
        """Look up, once, what every step needs."""
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: Any = self.trainer.optimizers[0]
        self.schedule: Any = self.trainer.lr_scheduler_configs[0].scheduler
        self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.on_cpu = self.trained[0].device.type == "cpu"

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Run one batch forward and backward, with an optimizer step at the end of an accumulation.

        Returns:
            The mean loss of the batch in nats, detached.

        Raises:
            RunError: Loss or gradient is not finite; the weights are as they were before this step.
        """
        # Whatever a batch draws depends on its number alone: nothing random has to be remembered over a kill.
        seed_streams(self.config.seed, "batch", self.batch_number, self.global_rank)
        self.stepped = (self.batch_number + 1) % self.config.accumulate == 0
        if self.stepped:
            loss = self._backward(batch)
            self._step(batch)
        else:
            strategy: Any = self.trainer.strategy
            with strategy.block_backward_sync() if self.trainer.world_size > 1 else nullcontext():
                loss = self._backward(batch)
        self.batch_number += 1
        return loss

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        seed = derive_seed(self.config.seed, "masking", self.batch_number, self.global_rank)
        loss = objective(self.adapter, self.data, batch, seed, self.config.label_smoothing)[0]
        self.manual_backward(loss / self.config.accumulate)
        return loss.detach()

    def _step(self, batch: dict[str, Tensor]) -> None:
        """Clip, look, and step."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.clip_norm)
        self.gradient_norm = norm
        if self.scaler is not None:
            # The scaler leaves out a step whose gradient overflowed, and lowers its scale: no fault.
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            if self.on_cpu:
                self.check_gradient(batch)
            else:
                # Decided on the device, without waiting for it: the fused AdamW leaves such a step out.
                self.optimizer.found_inf = (~torch.isfinite(norm)).float()
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check_gradient(self, batch: dict[str, Tensor] | None = None) -> None:
        """Stop when the last gradient is not finite; on a GPU this waits for the device.

        Raises:
            RunError: It is not; the weights are as they were before the step.
        """
        if self.scaler is not None or self.gradient_norm is None:
            return
        norm = float(self.gradient_norm)
        if math.isfinite(norm):
            return
        where = culprit(self, batch) if batch is not None else ""
        raise RunError(
            f"The gradient's norm is {norm} in batch {self.batch_number}, which ends step "
            f"{(self.batch_number + 1) // self.config.accumulate}{where}.",
            "Expected a finite number; the weights were not changed, and the last good state is kept.",
            "Lower the learning rate, and run utils.validate on the model.",
        )
