"""Growth for a Lightning Trainer of your own: `trainer = pl.Trainer(callbacks=[GrowthCallback(...)])`.

Checkpoints that Lightning writes carry the lineage; a fit that continues from one (``ckpt_path``) lets the model grow
through it before the weights are loaded.
"""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.config import FULL, GrowthConfig
from utils.growth.edits import GrowthError
from utils.growth.lineage import GrowthEvent, lineage_of, rebuild, remember
from utils.growth.planning import plan_growth
from utils.growth.request import Request
from utils.growth.transaction import grow_by
from utils.runtime.errors import ConfigError
from utils.training.optimizer_migration import migrate_optimizer
from utils.training.state import ModelChange, Undo


class GrowthCallback(pl.Callback):
    """Lets a model inside a LightningModule grow at fixed steps, its optimizers following.

    Attributes:
        events: The lineage.
        refusals: What could not be done: step, operator and why.
    """

    def __init__(self, config: GrowthConfig | Mapping[str, Any], model: str = "model", spec: ModelSpec | None = None):
        """Say when and what.

        Args:
            config: The schedule; triggers need `utils.train`, which owns the batches that they look at.
            model: Attribute of the LightningModule that holds the model; empty when it is the model itself.
            spec: Facts about the model that override detection, such as ``example_inputs``.

        Raises:
            ConfigError: The settings are wrong, or ask for what only `utils.train` can do.
        """
        self.config = config if isinstance(config, GrowthConfig) else GrowthConfig.from_dict(config)
        self.model, self.spec = model, spec
        self.events: list[GrowthEvent] = []
        self.refusals: list[dict[str, Any]] = []
        if self.config.automatic or self.config.begin_blocks is not None:
            raise ConfigError(
                "GrowthCallback was given operators for triggers, or begin_blocks.",
                "Expected a schedule only.",
                "Train with utils.train(..., config=TrainingConfig(growth=...)) for growth that decides by itself.",
            )
        self._done = -1

    def state_dict(self) -> dict[str, Any]:
        """Return the lineage."""
        return {"events": [event.to_dict() for event in self.events], "refusals": list(self.refusals)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the lineage; `setup` has let the model grow through it."""
        self.events = [GrowthEvent.from_dict(values) for values in state_dict["events"]]
        self.refusals = list(state_dict["refusals"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the model grow through the lineage of a checkpoint before its weights are loaded."""
        module = self._module(pl_module)
        self.events = list(lineage_of(module))
        loading = pl_module.on_load_checkpoint

        def grown_first(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None:
                rebuild(module, [GrowthEvent.from_dict(values) for values in state["events"]])
            loading(checkpoint)

        # Lightning tells callbacks of a checkpoint only after it has loaded the weights.
        object.__setattr__(pl_module, "on_load_checkpoint", grown_first)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make the events that are due, at the end of an optimizer step."""
        step = trainer.global_step
        if step == self._done or step == 0:
            return
        self._done = step
        total = int(trainer.estimated_stepping_batches)
        for wish in self.config.schedule:
            if wish.step(total) == step and wish.to != FULL:
                assert not isinstance(wish.to, str)
                self._grow(trainer, pl_module, Request(wish.operator, wish.amount, wish.to, wish.where), step)

    def _module(self, pl_module: pl.LightningModule) -> nn.Module:
        """Return the model.

        Raises:
            ConfigError: There is none under this name.
        """
        found = pl_module if not self.model else getattr(pl_module, self.model, None)
        if isinstance(found, nn.Module):
            return found
        raise ConfigError(
            f"{type(pl_module).__name__} has no module `{self.model}`.",
            "Expected the attribute that holds the model.",
            "Name it: GrowthCallback(config, model='net').",
        )

    def _grow(self, trainer: pl.Trainer, pl_module: pl.LightningModule, request: Request, step: int) -> None:
        """Make one event, or remember why not."""
        module = self._module(pl_module)
        try:
            if trainer.world_size > 1:
                raise GrowthError(
                    f"{trainer.world_size} processes train together.",
                    "Expected one: this callback cannot make Lightning's wrappers anew.",
                    "Use utils.train, which can.",
                )
            adapter = ModelAdapter(module, spec=self.spec)
            plan = plan_growth(adapter, request)
            mean = self.config.new_second_moment == "mean"
            bound = self.config.tolerance if adapter.real_dtype == torch.float32 else None
            grown = grow_by(
                adapter, plan, adapter.example_inputs(4), None, lambda change: _followed(trainer, change), 0, step,
                mean, bound, f"scheduled for step {step}",
            )  # fmt: skip
        except GrowthError as error:
            self.refusals.append({"step": step, "operator": request.operator, "why": str(error)})
            if self.config.on_refusal == "stop":
                raise
            pl.utilities.rank_zero_warn(f"At step {step} the model did not grow in {request.operator}: {error}")
            return
        self.events.append(grown.event)
        remember(module, self.events)


def _followed(trainer: pl.Trainer, change: ModelChange) -> Undo:
    """Let all optimizers of a trainer follow; they may know parameters beside the model's."""
    undos: list[Undo] = []

    def undo() -> None:
        while undos:
            undos.pop()()

    try:
        for optimizer in trainer.optimizers:
            others: dict[str, Tensor] = {}
            known = {id(parameter) for parameter in change.before.values()}
            for number, group in enumerate(optimizer.param_groups):
                others |= {f"group {number}, {i}": p for i, p in enumerate(group["params"]) if id(p) not in known}
            whole = ModelChange(
                change.kind, change.step, {**change.parameters, **others}, change.buffers, change.changes,
                {**change.before, **others}, change.mean,
            )  # fmt: skip
            undos.append(migrate_optimizer(optimizer, whole))
    except BaseException:
        undo()
        raise
    return undo
