"""Growth as a part of a run: what the settings ask for happens at its step, and everything that remembers follows.

An event comes at the end of an optimizer step: gradients are used up, so none is half accumulated. Whatever decides
about it is in the checkpoint (`GrowthExtension.state_dict`) or derived from (seed, step), so a run that is killed
before, at or after an event repeats it bit for bit.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.growth.certificate import SAMPLES
from utils.growth.config import FULL, GrowthConfig, ScheduledGrowth
from utils.growth.controller import Controller
from utils.growth.distillation import Lesson, distil
from utils.growth.edits import GrowthError, GrowthRefusedError, LineageError
from utils.growth.lineage import GrowthEvent, lineage_of, rebuild, remember, save_lineage
from utils.growth.lineage_view import save_lineage_figure
from utils.growth.opening import Openings, is_closed
from utils.growth.planning import begin_with, forget_sizes, plan_growth
from utils.growth.probe import probe
from utils.growth.request import Request
from utils.growth.transaction import Grown, grow_by
from utils.loading import LoadedModel
from utils.runtime.errors import ConfigError, MissingPackageError, SeedbedError
from utils.runtime.resources import is_out_of_memory
from utils.training.batch_inputs import model_inputs
from utils.training.config import TrainingConfig
from utils.training.evaluation import masked, masking_seed, objective
from utils.training.extensions import Extension
from utils.training.grown_config import layout
from utils.training.growth_rows import LINEAGE
from utils.training.processes import agreed
from utils.training.sharding import is_sharded
from utils.training.state import ModelChange, Undo


class GrowthExtension(Extension):
    """Lets a run's model grow.

    Attributes:
        config: When, where and how.
        events: The lineage so far.
        refusals: What was asked for and could not be: step, operator and why.
        controller: Decides about growth that no schedule asks for.
        openings: Lets new experts in, a little at each step.
        older: Events that the model had been through when the run began with it.
    """

    def __init__(self, config: GrowthConfig) -> None:
        """Start with a model that never grew."""
        self.config = config
        self.events: list[GrowthEvent] = []
        self.refusals: list[dict[str, Any]] = []
        self.controller = Controller(config)
        self.openings = Openings()
        self.older = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the lineage and what the decisions depend on."""
        return {
            "events": [event.to_dict() for event in self.events],
            "refusals": [dict(refusal) for refusal in self.refusals],
            "controller": self.controller.state_dict(),
            "openings": self.openings.state_dict(),
            "older": self.older,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the model has grown through it already."""
        self.events = [GrowthEvent.from_dict(values) for values in state["events"]]
        self.refusals = [dict(refusal) for refusal in state["refusals"]]
        self.controller.load_state_dict(state["controller"])
        self.openings.load_state_dict(state["openings"])
        self.older = state["older"]

    def migrate(self, change: ModelChange) -> Undo:
        """Follow the names; the lineage is written, and triggers begin anew, when the event has been certified."""
        return self.openings.follow(change)

    def restore(self, adapter: ModelAdapter, state: Mapping[str, Any], as_it_began: Callable[[], None]) -> None:
        """Let a model that was just built from its source grow through a checkpoint's lineage.

        Raises:
            LineageError: The state holds no lineage, or one of another model.
        """
        try:
            events, older = [GrowthEvent.from_dict(values) for values in state["events"]], int(state["older"])
        except (KeyError, TypeError, ValueError) as error:
            raise LineageError(
                f"The state of growth in the checkpoint cannot be read ({type(error).__name__}: {error}).",
                "Expected the lineage that this version of Seedbed writes.",
                "Restore the run's folder from a copy.",
            ) from error
        rebuild(adapter.module, events[:older] if len(lineage_of(adapter.module)) <= older else events)
        if len(lineage_of(adapter.module)) == older:
            as_it_began()
        rebuild(adapter.module, events)
        forget_sizes(adapter)

    def begin(self, adapter: ModelAdapter, total_steps: int) -> Undo | None:
        """Take over what a model grew through before this run, and let it begin with fewer blocks if it is to.

        Raises:
            ConfigError: An event is planned for a step at which nothing can grow.
            GrowthError: It cannot begin so.
        """
        for wish in self.config.schedule:
            if wish.step(total_steps) >= total_steps:
                raise ConfigError(
                    f"Growth in {wish.operator} is planned for step {wish.step(total_steps)} (at={wish.at!r}), and the "
                    f"run has {total_steps}.",
                    "Expected a step before the last: what grows then is never trained.",
                    "Let it grow earlier, or train for longer.",
                )
        before = lineage_of(adapter.module)
        self.events = list(before)
        undo = None
        if self.config.begin_blocks is not None:
            event, undo = begin_with(adapter, self.config.begin_blocks)
            self.events.append(event)
            remember(adapter.module, self.events)
        self.older = len(self.events)
        for event in before:
            if event.plan.operator == "expert" and is_closed(adapter.module, event.plan):
                self.openings.begin(adapter, event.plan)

        def undone() -> None:
            if undo is not None:
                undo()
                remember(adapter.module, before)

        return undone

    def start(self, session: Any) -> None:
        """Note what the run begins with."""
        # A run that was killed soon after its first event may go on from before it.
        known = self.events or (session.run.directory / LINEAGE).exists()
        if known:
            self._save(session)

    def after_step(self, session: Any, batch: Mapping[str, Tensor]) -> None:
        """Make the events that are due after this step."""
        step, total = session.progress.step, session.run.total_steps
        self.openings.step(session.run.model, None if session.average is None else session.average.average)
        if step == total:
            return
        for wish in self.config.schedule:
            if wish.step(total) == step:
                grown = self.grow(session, batch, self._request(wish), f"scheduled for step {step}")
                if grown is not None:
                    self.controller.arbiter.scheduled(step)
        wanted = self.controller.decide(session, batch)
        if wanted is not None:
            grown = self.grow(session, batch, wanted.request, wanted.why, wanted.signals)
            self.controller.note(wanted, grew=grown is not None)

    def end(self, session: Any) -> None:
        """Draw the lineage; a picture that cannot be drawn or written ends no run."""
        if not self.events or session.writer is None:
            return
        try:
            save_lineage_figure(session.run.directory)
        except (OSError, MissingPackageError, LineageError) as error:
            warnings.warn(f"The picture of the model's growth cannot be made: {error}", stacklevel=2)

    def grow(
        self,
        session: Any,
        batch: Mapping[str, Tensor],
        request: Request,
        why: str,
        signals: tuple[dict[str, Any], ...] = (),
    ) -> Grown | None:
        """Make one event; None when it was refused or taken back, and the run goes on as it is.

        Args:
            session: The run's `SessionCallback`.
            batch: The batch that was just trained on.
            request: What is wanted.
            why: For the lineage.
            signals: What the triggers said.
        """
        run, step = session.run, session.progress.step
        seed = masking_seed(run.config.seed, session.progress.batches, session.stream.rank)

        # A few samples show what an event does; more would make it cost more steps of training.
        few = {name: value[:SAMPLES] for name, value in batch.items()}

        def loss() -> float:
            return float(objective(run.adapter, run.data, few, seed)[0])

        def teach(teacher: ModelAdapter) -> Lesson:
            batches = [
                model_inputs(run.adapter, masked(run.data, one, seed), run.data) for one in ahead(session, batch)
            ]
            return distil(
                teacher, run.adapter, batches, lambda one: float(objective(one, run.data, dict(batch), seed)[0]),
                self.config.distill_steps, plan.outputs,
            )  # fmt: skip

        try:
            plan = plan_growth(run.adapter, replace(request, approximate=self.config.approximate))
            self.controller.check_budget(session, plan, len(self.events) - self.older)
            if signals and self.config.probe_steps:
                tried = probe(session, plan, self.config.probe_steps, number=len(self.events))
                if not tried.pays:
                    raise GrowthRefusedError(
                        f"The probe rejected {plan.describe()}: {tried.why}.",
                        "Expected the loss to fall by more per FLOP with growth than without.",
                        "The next look at the triggers may find otherwise; probe_steps=0 grows without asking.",
                    )
                why = f"{why} The probe kept it: {tried.why}."
            grown = grow_by(
                run.adapter, plan, model_inputs(run.adapter, few, run.data), loss, session.migrate,
                run.config.seed, step, self.config.new_second_moment == "mean",
                self._tolerance(run.adapter), why, signals, agreed, teach,
                number=len(self.events),
            )  # fmt: skip
        except Exception as error:
            if not isinstance(error, SeedbedError) and not is_out_of_memory(error):
                raise
            self._refused(session, request, error)
            return None
        self.events.append(grown.event)
        remember(run.model, self.events)
        self.openings.begin(run.adapter, plan)
        self.controller.reset()
        if plan.outputs is not None or plan.promise == "approximate":
            # What was measured before is not the loss of the weights that a checkpoint holds now.
            session.progress.measured_step = -1
        self._save(session)
        return grown

    def _save(self, session: Any) -> None:
        """Write the lineage for people; what a resume reads is in the checkpoints."""
        if session.writer is None:
            return
        try:
            save_lineage(session.run.directory, self.events)
        except OSError as error:
            warnings.warn(
                f"{LINEAGE} cannot be written ({error.strerror or error}); training goes on, and the checkpoints hold "
                "the lineage too.",
                stacklevel=2,
            )

    def _request(self, wish: ScheduledGrowth) -> Request:
        """Return a scheduled event as a request; the full depth is what a run that began with fewer blocks had."""
        beginnings = [event.plan.before for event in self.events if event.certificate is None]
        to = beginnings[-1] if wish.to == FULL else wish.to
        assert not isinstance(to, str)
        return Request(wish.operator, wish.amount, to, wish.where)

    def _tolerance(self, adapter: ModelAdapter) -> float | None:
        """Return the bound of the settings, which is one for float32."""
        return self.config.tolerance if adapter.real_dtype == torch.float32 else None

    def _refused(self, session: Any, request: Request, error: Exception) -> None:
        """Remember that a wish could not be met, and say so once."""
        step = session.progress.step
        self.refusals.append({"step": step, "operator": request.operator, "why": str(error)})
        if session.writer is None:
            return
        said = f"At step {step} the model did not grow in {request.operator}: {error}"
        session.run.notes.append(said)
        if self.config.on_refusal == "stop":
            session.run.stop_requested = f"stopped, because growth in {request.operator} was refused at step {step}"
            said += " The run stops, as on_refusal says; resumed, it goes on without this event."
        else:
            said += " The run goes on as it is."
        warnings.warn(said, stacklevel=2)


def ahead(session: Any, batch: Mapping[str, Tensor], count: int = 8) -> list[dict[str, Tensor]]:
    """Return a batch and those that come next, where they are known."""
    found = [dict(batch)]
    stream = session.stream
    for number in range(0 if stream.sequential else count - 1):
        place = stream.consumed + (number * stream.world + stream.rank) * stream.batch_size
        device = session.run.adapter.device
        found.append({name: value.to(device) for name, value in stream.batch_at(place).items()})
    return found


def has_grown(module: nn.Module) -> bool:
    """Tell whether a model is another than the one that its source builds, so that a run has to keep its lineage."""
    return bool(lineage_of(module))


def leave_behind(module: nn.Module, directory: Path) -> bool:
    """Write the lineage of a model beside its weights, if it has one."""
    events = lineage_of(module)
    if events:
        save_lineage(directory, events)
    return bool(events)


def check_source(adapter: ModelAdapter) -> None:
    """Make sure that a run could build its model again.

    Raises:
        GrowthError: It is a copy of one that grew, and copies know nothing of the lineage.
    """
    source = adapter.origin
    if has_grown(adapter.module) or not isinstance(source, LoadedModel) or not source.can_rebuild:
        return
    if layout(source.factory()) != layout(adapter.module):
        raise GrowthError(
            f"The weights of this {adapter.name} have other shapes than those that its source builds.",
            "Expected the model that grew itself: a copy of it does not know what it grew through.",
            "Train the model on which utils.grow was called, or call utils.grow on one that was just loaded.",
        )


def make_extension(config: TrainingConfig) -> GrowthExtension:
    """Return growth as the settings of a run ask for it.

    Raises:
        ConfigError: The settings of growth are wrong, or contradict others.
    """
    settings = config.growth
    growth = settings if isinstance(settings, GrowthConfig) else GrowthConfig.from_dict(settings or {})
    grows = growth.schedule or growth.automatic or growth.begin_blocks is not None
    if config.devices > 1 and is_sharded(config) and grows:
        raise ConfigError(
            f"TrainingConfig.growth is set and strategy is {config.strategy!r}.",
            "Expected ddp, or one device: weights that are divided among devices cannot grow.",
            "Set strategy to ddp, or leave growth at None.",
        )
    if config.devices > 1 and growth.approximate:
        raise ConfigError(
            f"GrowthConfig.approximate is True and TrainingConfig.devices is {config.devices}.",
            "Expected exact growth on several devices: distillation would teach each process another lesson.",
            "Set approximate to False, or train on one device.",
        )
    if config.devices > 1 and growth.automatic:
        raise ConfigError(
            f"GrowthConfig.operators is {', '.join(growth.operators)} and TrainingConfig.devices is {config.devices}.",
            "Expected a schedule on several devices: triggers look at the batches of one process only.",
            "Say with schedule when to grow, or train on one device.",
        )
    return GrowthExtension(growth)
