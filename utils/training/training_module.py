"""A model with its loss and optimizer, as Lightning drives it.

Optimization is manual: Lightning's automatic loop wraps each step in closures and counters that cost more than the
step of a small model, and a gradient that is not finite must be noticed before it reaches the weights.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.objectives import IGNORED, REAL_VALUED
from utils.runtime.seeding import seed_streams
from utils.training.config import TrainingConfig
from utils.training.diagnosis import NotFiniteError, culprit, not_finite
from utils.training.evaluation import CLASSIFIERS, masking_seed, objective
from utils.training.extensions import Shaping
from utils.training.gradients import StepMean, clip, gradient_norm, gradients_of
from utils.training.prepared_data import PreparedData
from utils.training.schedules import make_optimizer, make_schedule
from utils.training.sharding import Sharding

PLAIN = frozenset(
    ("_current_fx_name", "batch_number", "stepped", "phase", "gradient_norm", "learning_rate", "failed", "left_out")
)
"""Attributes that are neither parameters nor modules; Lightning sets the first before and after each hook."""
MOST_LEFT_OUT = 32
"""A gradient scaler halves its scale with every step that it leaves out: after so many in a row it is not the scale."""


class TrainingModule(pl.LightningModule):
    """A model with its loss, optimizer and learning-rate schedule, in the form that Lightning drives.

    Attributes:
        batch_number: Number of the batch that comes next, over all sessions; seeds what the batch may draw.
        stepped: Whether the last batch ended an optimizer step.
        phase: Where it stands: ``between`` batches, in the ``passes`` of one, or in the ``update`` of the weights.
        mean: The mean loss of the last step, and how the passes of a step add up to it.
        shaping: What changes the loss or the gradient of every step; None is nothing.
        learning_rate: The rate of the last step.
        gradient_norm: Norm of the last gradient before clipping.
        failed: On a GPU the number of the batch that ended the first step whose gradient is not finite, on the device;
            -1 when there is none.
        left_out: With a gradient scaler the steps that it has left out in a row, on the device.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        data: PreparedData,
        config: TrainingConfig,
        total_steps: int,
        sharding: Sharding | None = None,
        restarts: Sequence[int] = (),
    ) -> None:
        """Wrap a model; see `utils.training.config.TrainingConfig` for the settings.

        Args:
            adapter: The model.
            data: What it is trained on.
            config: How.
            total_steps: Optimizer steps of the run.
            sharding: Cuts it in parts.
            restarts: Steps at which the learning rate's schedule begins anew.
        """
        super().__init__()
        self.automatic_optimization = False
        self.model = adapter.module
        self.adapter, self.data, self.config, self.total_steps = adapter, data, config, total_steps
        self.sharding, self.restarts = sharding, tuple(restarts)
        self.batch_number = 0
        self.stepped = False
        self.phase = "between"
        self.learning_rate = math.nan
        self.gradient_norm: Tensor | None = None
        self.failed: Tensor | None = None
        self.left_out: Tensor | None = None
        self.shaping: Shaping | None = None
        self.mean = StepMean(config.accumulate)
        self.trained: list[nn.Parameter] = []

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what changes in every step without torch's search for parameters, which costs as much as a hook."""
        if name in PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def configure_model(self) -> None:
        """Cut the model in parts, if it is to be; Lightning has just connected the processes."""
        if self.sharding is not None:
            assert self.device_mesh is not None
            self.sharding.apply(self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule; `training_step` drives both."""
        optimizer = make_optimizer(self.model, self.config)
        return {
            "optimizer": optimizer,
            "lr_scheduler": make_schedule(optimizer, self.total_steps, self.config, self.restarts),
        }

    def on_train_start(self) -> None:
        """Look up, once, what every step needs."""
        self._look_up_trained()
        self.optimizer: Any = self.trainer.optimizers[0]
        self.schedule: Any = self.trainer.lr_scheduler_configs[0].scheduler
        self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # One process without a scaler needs nothing of what Lightning does around a backward pass.
        self.alone = self.scaler is None and self.trainer.world_size == 1 and self.sharding is None
        device = self.trained[0].device
        self.on_cpu = device.type == "cpu"
        self.failed = torch.full((), -1, device=device)
        self.left_out = torch.zeros((), dtype=torch.long, device=device)
        self.mean = StepMean(
            self.config.accumulate,
            self.trainer.world_size,
            # Of these tasks every sample has as many answers as any other.
            even=self.data.task in (*CLASSIFIERS, *REAL_VALUED),
            summed=self._summed,
        )

    def _look_up_trained(self) -> None:
        """Note the parameters that a step clips and measures, in the order of the model."""
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def follow_model(self) -> None:
        """Go on with the parameters that the model has now, in all that wraps it."""
        self._look_up_trained()
        if self.config.compile:
            # What was compiled holds the old parameters.
            torch._dynamo.reset()
            self.model.compile()
        strategy: Any = self.trainer.strategy
        if self.trainer.world_size > 1 and self.sharding is None:
            # The wrapper exchanges the gradients of the parameters that it was made with, and of no others.
            strategy.model = strategy._setup_model(self)
            strategy._register_ddp_hooks()

    def _summed(self, value: Tensor) -> Tensor:
        """Add a tensor up over all processes."""
        if self.trainer.world_size == 1:
            return value
        strategy: Any = self.trainer.strategy
        return cast(Tensor, strategy.reduce(value, reduce_op="sum"))

    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Tensor]:
        """Move a batch; on a CPU it is there already."""
        return batch if self.on_cpu else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Run one batch forward and backward, with an optimizer step at the end of an accumulation.

        Returns:
            The mean loss of the batch in nats, detached.

        Raises:
            NotFiniteError: Loss or gradient is not finite; the weights are as they were before this step. On a GPU
                `check_finite` tells, which waits for the device.
        """
        # Whatever a batch draws depends on its number alone: nothing random has to be remembered over a kill.
        seed_streams(self.config.seed, "batch", self.batch_number, self.global_rank)
        self.stepped, self.phase = (self.batch_number + 1) % self.config.accumulate == 0, "passes"
        if self.sharding is not None:
            self.sharding.share_buffers()
        # Gradients in parts are exchanged after every pass: to wait with it would keep them whole on each device.
        if self.stepped or self.sharding is not None:
            loss = self._backward(batch)
            if self.stepped:
                self._step(batch)
        else:
            strategy: Any = self.trainer.strategy
            with strategy.block_backward_sync() if self.trainer.world_size > 1 else nullcontext():
                loss = self._backward(batch)
        self.batch_number += 1
        self.phase = "between"
        return loss

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        seed = masking_seed(self.config.seed, self.batch_number, self.global_rank)
        if self.shaping is not None:
            self.shaping.new_batch(batch)
        loss, logits, labels = objective(self.adapter, self.data, batch, seed, self.config.label_smoothing)
        if self.on_cpu and self.alone and not math.isfinite(float(loss.detach())):
            # Now, because after the last pass of the step nobody could tell which one it was.
            raise not_finite(self, "training loss", float(loss.detach()), (self.batch_number,), culprit(self, batch))
        extra = None if self.shaping is None else self.shaping.extra_loss(batch, logits, labels)
        part = self.mean.add(loss, lambda: (labels != IGNORED).sum(), extra)
        if self.alone:
            part.backward()
        else:
            self.manual_backward(part)
        return loss.detach()

    def _step(self, batch: dict[str, Tensor]) -> None:
        """Look, clip and step."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self.mean.end(gradients_of(self.trained))
        if self.shaping is not None:
            self.shaping.change_gradient()
        gradients = gradients_of(self.trained)
        norm = gradient_norm(self.trained)
        self.gradient_norm, self.phase = norm, "update"
        self.learning_rate = self.optimizer.param_groups[0]["lr"]
        if self.scaler is not None:
            # The scaler leaves out a step whose gradient overflowed, and lowers its scale: a fault only if it goes on.
            assert self.left_out is not None
            self.left_out = torch.where(torch.isfinite(norm), 0, self.left_out + 1)
            clip(gradients, norm, self.config.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            if self.on_cpu:
                self._check_now(float(norm), batch)
            else:
                self._note(norm)
            clip(gradients, norm, self.config.clip_norm)
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _check_now(self, norm: float, batch: dict[str, Tensor]) -> None:
        """Stop before the weights change when the gradient is not finite."""
        if not math.isfinite(norm):
            raise not_finite(self, "gradient's norm", norm, self.batches_of(self.batch_number), culprit(self, batch))

    def _note(self, norm: Tensor) -> None:
        """Decide on the device, without waiting for it, whether this step and all that follow are left out."""
        assert self.failed is not None
        bad = ~torch.isfinite(norm) & (self.failed < 0)
        self.failed = torch.where(bad, self.batch_number, self.failed)
        # The fused AdamW leaves a step out when this says so; the weights stay those that made the gradient.
        self.optimizer.found_inf = (self.failed >= 0).float()

    def batches_of(self, last: int) -> range:
        """Return the numbers of the batches of the step that a batch ends."""
        return range(last + 1 - self.config.accumulate, last + 1)

    def check_finite(self, blame: Callable[[Iterable[int]], str] = lambda numbers: "") -> None:
        """Stop when the gradient of a step was not finite; on a GPU this waits for the device.

        Args:
            blame: Says which module is to blame, given the numbers of the batches that made such a gradient.

        Raises:
            NotFiniteError: It was not; no step has changed the weights since.
        """
        if self.failed is None or self.left_out is None:
            return
        last = int(self.failed)
        if last >= 0:
            numbers = self.batches_of(last)
            raise not_finite(self, "gradient's norm", None, numbers, blame(numbers))
        skipped = int(self.left_out)
        if skipped >= MOST_LEFT_OUT:
            raise NotFiniteError(
                f"The gradient has not been finite in {skipped} steps in a row, up to step "
                f"{self.batch_number // self.config.accumulate}, whatever its scale"
                f"{blame(self.batches_of(self.batch_number - 1))}.",
                "Expected float16 gradients that are finite at a smaller scale; the last good state is kept.",
                "Set precision to bf16-mixed or 32-true, lower the learning rate, and run utils.validate on the model.",
            )


# Lightning reads the signature before every step; found here, it is not worked out anew.
TrainingModule.training_step.__signature__ = inspect.signature(TrainingModule.training_step)  # type: ignore[attr-defined]
