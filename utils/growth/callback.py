"""Growth for a Lightning Trainer of your own: `trainer = pl.Trainer(callbacks=[GrowthCallback(...)])`.

Checkpoints that Lightning writes carry the lineage; a fit that continues from one (``ckpt_path``) lets the model grow
through it before the weights are loaded.
"""

import math
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.detection import LABEL_INPUTS
from utils.growth.certificate import SAMPLES
from utils.growth.config import GrowthConfig, ScheduledGrowth
from utils.growth.edits import GrowthError, GrowthRefusedError
from utils.growth.lineage import GrowthEvent, lineage_of, rebuild, remember
from utils.growth.opening import Openings, is_closed
from utils.growth.operators.expert import opening
from utils.growth.planning import plan_growth
from utils.growth.request import Request
from utils.growth.transaction import grow_by
from utils.runtime.errors import ConfigError, SeedbedError
from utils.training.optimizer_migration import is_unplaced, migrate_optimizer
from utils.training.state import MigrationError, ModelChange, Undo

LIMITS = ("max_parameters", "max_flops_share", "max_memory_gb", "max_events", "probe_steps", "approximate")
"""Settings that only `utils.train` can keep."""


class GrowthCallback(pl.Callback):
    """Lets a model inside a LightningModule grow at fixed steps, its optimizers following.

    Attributes:
        events: The lineage.
        refusals: What could not be done: step, operator and why.
        openings: Lets new experts in, a little at each step.
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
        self.openings = Openings()
        if self.config.automatic or self.config.begin_blocks is not None:
            raise ConfigError(
                "GrowthCallback was given operators for triggers, or begin_blocks.",
                "Expected a schedule only.",
                "Train with utils.train(..., config=TrainingConfig(growth=...)) for growth that decides by itself.",
            )
        limits = {name: value for name in LIMITS if (value := getattr(self.config, name)) not in (None, 0, False)}
        if limits:
            raise ConfigError(
                f"GrowthCallback was given {', '.join(f'{name}={value}' for name, value in limits.items())}.",
                "Expected a schedule without limits, probes or distillation: they need a run's data and settings.",
                "Train with utils.train(..., config=TrainingConfig(growth=...)).",
            )
        # Optimizer steps up to which the schedule was looked at, and the events of it that were made or refused.
        self._looked = self._step = 0
        self._loaded: float | None = None
        self._past: list[ScheduledGrowth] = []
        # Refusals of what this fit does not reach; a longer one may.
        self._late: list[dict[str, Any]] = []
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._opened: weakref.ref[nn.Module] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the lineage, what of the schedule is past, and the experts that are being let in."""
        return {
            "events": [event.to_dict() for event in self.events],
            "refusals": [dict(refusal) for refusal in self.refusals],
            "looked": self._looked,
            "past": [wish.to_dict() for wish in self._past],
            "late": [dict(refusal) for refusal in self._late],
            "openings": self.openings.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; `setup` has let the model grow through it.

        A state without what is past, as written before this was kept, counts all steps that were made as looked at.
        """
        self.events = [GrowthEvent.from_dict(values) for values in state_dict["events"]]
        self.refusals = [dict(refusal) for refusal in state_dict["refusals"]]
        self._loaded = state_dict.get("looked", math.inf)
        self._past = [ScheduledGrowth.from_dict(wish) for wish in state_dict.get("past", [])]
        self._late = [dict(refusal) for refusal in state_dict.get("late", [])]
        self.openings.load_state_dict(state_dict.get("openings", {"rising": []}))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the model grow through the lineage of a checkpoint before its weights are loaded."""
        module = self._module(pl_module)
        self.events = list(lineage_of(module))
        if self._opened is None or self._opened() is not module:
            self._opened, self.openings = weakref.ref(module), Openings()
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out where the run goes on, tell which events it will not reach, and let closed experts in.

        Raises:
            GrowthRefusedError: An event is planned for a step at which nothing can grow, and ``on_refusal`` is stop.
        """
        self._step = trainer.global_step
        if self._loaded is not None:
            self._looked, self._loaded = int(min(self._loaded, self._step)), None
        elif self._trainer is None or self._trainer() is not trainer:
            self._looked, self._past = self._step, []
        self._trainer = weakref.ref(trainer)
        module, total = self._module(pl_module), _total(trainer)
        rising = {entry["name"] for entry in self.openings.rising}
        for event in self.events:
            if is_closed(module, event.plan) and not rising & {name for name, _ in opening(event.plan)}:
                self.openings.begin(ModelAdapter(module, spec=self.spec), event.plan)
        self.refusals = [refusal for refusal in self.refusals if refusal not in self._late]
        self._late = []
        for wish in self._ahead():
            step = _step_of(wish, total)
            if step is None or (total is not None and step >= total):
                error = GrowthRefusedError(
                    f"Growth in {wish.operator} is planned for at={wish.at!r}, and the run has "
                    f"{'no known end' if total is None else f'{total} steps'}.",
                    "Expected a step before the last: what grows then is never trained.",
                    "Let it grow earlier, or train for longer; a share of the run needs max_steps or max_epochs.",
                )
                self._late.append({"step": step, "operator": wish.operator, "why": str(error)})
                self._refused(self._late[-1], error, str(error))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make the events that have become due, if an optimizer step was just made."""
        step, total = trainer.global_step, _total(trainer)
        if step == self._step:
            return
        self._step = step
        self.openings.step(self._module(pl_module))
        if total is not None and step >= total:
            # Longer training goes on from here and makes what is still due.
            return
        before, self._looked = self._looked, step
        for wish in self._ahead():
            at = _step_of(wish, total)
            if at is not None and before < at <= step:
                self._past.append(wish)
                assert not isinstance(wish.to, str)
                self._grow(trainer, pl_module, Request(wish.operator, wish.amount, wish.to, wish.where), step, batch)

    def _ahead(self) -> list[ScheduledGrowth]:
        """Return the events of the schedule that were neither made nor refused when they were due."""
        past, ahead = Counter(self._past), []
        for wish in self.config.schedule:
            past[wish] -= 1
            if past[wish] < 0:
                ahead.append(wish)
        return ahead

    def _refused(self, refusal: dict[str, Any], error: SeedbedError, said: str) -> None:
        """Remember why an event is not made, and say so or stop."""
        self.refusals.append(refusal)
        if self.config.on_refusal == "stop":
            raise error
        pl.utilities.rank_zero_warn(said)

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

    def _grow(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, request: Request, step: int, batch: Any
    ) -> None:
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
            given = _inputs(adapter, batch)
            measured = "the batch just trained on" if given is not None else "made-up inputs"
            grown = grow_by(
                adapter, plan, given or adapter.example_inputs(SAMPLES), None,
                lambda change: self._followed(trainer, change), 0, step, mean, bound,
                f"scheduled for step {step}; compared on {measured}",
            )  # fmt: skip
        except SeedbedError as error:
            refusal = {"step": step, "operator": request.operator, "why": str(error)}
            self._refused(refusal, error, f"At step {step} the model did not grow in {request.operator}: {error}")
            return
        self.events.append(grown.event)
        remember(module, self.events)
        self.openings.begin(adapter, plan)

    def _followed(self, trainer: pl.Trainer, change: ModelChange) -> Undo:
        """Let all optimizers of a trainer follow; they may know parameters beside the model's."""
        undos = [self.openings.follow(change)]

        def undo() -> None:
            while undos:
                undos.pop()()

        try:
            known = {id(parameter) for parameter in change.before.values()}
            concerned = [
                optimizer
                for optimizer in trainer.optimizers
                if any(id(p) in known for group in optimizer.param_groups for p in group["params"])
            ]
            free = [name for name, parameter in change.parameters.items() if is_unplaced(change, name, parameter)]
            if free and len(concerned) != 1:
                raise MigrationError(
                    f"{len(concerned)} optimizers train the model, and nothing says which one trains the new parameter "
                    f"{free[0]}.",
                    "Expected one, or a new parameter modelled on one that is trained.",
                    "Train the model with one optimizer, or grow another part.",
                )
            for optimizer in concerned:
                others: dict[str, Tensor] = {}
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


def _total(trainer: pl.Trainer) -> int | None:
    """Return how many optimizer steps a fit has at most, over all optimizers as Lightning counts; None when unknown."""
    batches = trainer.estimated_stepping_batches
    if not math.isfinite(batches):
        return None
    # Epochs are counted in batches, in each of which every optimizer may make a step.
    steps = int(batches) * max(1, len(trainer.optimizers))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def _step_of(wish: ScheduledGrowth, total: int | None) -> int | None:
    """Return the step at which an event is due; None for a share of an unknown total."""
    if total is None:
        return wish.at if isinstance(wish.at, int) else None
    return wish.step(total)


def _inputs(adapter: ModelAdapter, batch: Any) -> dict[str, Any] | None:
    """Return some samples of a batch as forward takes them; None where the batch does not say how they are given.

    A tensor has to look like what the model's main input gets; the names of a mapping have to be arguments of forward.
    """
    example = adapter.example_inputs(1)
    if isinstance(batch, Tensor):
        batch = {adapter.main_input: batch}
    if not isinstance(batch, Mapping) or not set(example) <= set(batch) <= set(adapter.argument_names):
        return None
    few = {name: value[:SAMPLES] for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    alike = all(
        name in few and few[name].dim() == value.dim() and few[name].is_floating_point() == value.is_floating_point()
        for name, value in example.items()
    )
    if not alike or not _readable(adapter, few[adapter.main_input]):
        return None
    given = {name: value for name, value in few.items() if name in example or name not in LABEL_INPUTS}
    try:
        with adapter.isolated():
            adapter.logits(given)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
        # What training_step gives the model is made from the batch in a way of its own, such as with one token less.
        return None
    return given


def _readable(adapter: ModelAdapter, content: Tensor) -> bool:
    """Tell whether a model of tokens has rows for all ids and places; on a GPU one without ends the process."""
    if adapter.modality != "tokens" or content.is_floating_point() or not content.numel():
        return content.numel() > 0
    longest = adapter.max_length.value
    within = int(content.min()) >= 0 and int(content.max()) < adapter.readable_ids()
    return within and (longest is None or content.dim() < 2 or content.shape[1] <= longest)
