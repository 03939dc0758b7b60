"""Growth that no schedule asks for: watch, decide, choose a place, stay within the budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from utils.adapters import ModelAdapter
from utils.adapters.structure import Structure, structure
from utils.growth.benefit import LayerBenefit, Place, benefit, where_to_grow
from utils.growth.budget import Budget, BudgetError, ModelSize, model_size
from utils.growth.capacity import LayerCapacity, capacity, pairs_of
from utils.growth.config import GrowthConfig
from utils.growth.edits import Plan
from utils.growth.request import Request
from utils.growth.surgery import Surgery
from utils.growth.triggers import Arbiter, Decision, Observation, Trigger, make_triggers, predictive_entropy
from utils.training.batch_inputs import model_inputs
from utils.training.evaluation import masked, masking_seed
from utils.training.processes import agreed
from utils.training.step_memory import room


@dataclass(frozen=True)
class Wanted:
    """Growth that the triggers ask for."""

    request: Request
    """What, and where."""
    decision: Decision
    """Why."""

    @property
    def why(self) -> str:
        """The reason in a sentence."""
        return self.decision.why

    @property
    def signals(self) -> tuple[dict[str, Any], ...]:
        """What every trigger said."""
        return tuple(signal.to_dict() for signal in self.decision.signals)


class Controller:
    """Watches a run and says when and where its model should grow.

    Attributes:
        arbiter: Weighs what the triggers say.
        triggers: What watches.
        budget: Limits that no event exceeds.
        first: What the model cost when it was first measured; None before that.
    """

    def __init__(self, config: GrowthConfig) -> None:
        """Start with nothing seen."""
        self.config = config
        self.arbiter = Arbiter(config.needed, config.cooldown_steps, config.hysteresis)
        self.triggers: list[Trigger] = make_triggers(config)
        self.budget = Budget.from_config(config)
        self.first: ModelSize | None = None
        self._parts: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the next decision depends on."""
        return {
            "arbiter": self.arbiter.state_dict(),
            "triggers": {trigger.name: trigger.state_dict() for trigger in self.triggers},
            "first": None if self.first is None else self.first.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.arbiter.load_state_dict(state["arbiter"])
        for trigger in self.triggers:
            trigger.load_state_dict(state["triggers"][trigger.name])
        self.first = None if state["first"] is None else ModelSize(**state["first"])

    def reset(self) -> None:
        """Forget what was measured of the model before it grew."""
        self._parts = None
        for trigger in self.triggers:
            trigger.reset()

    def note(self, wanted: Wanted, grew: bool) -> None:
        """Take in what came of a wish."""
        self.arbiter.note(wanted.decision, grew)

    def decide(self, session: Any, batch: Mapping[str, Tensor]) -> Wanted | None:
        """Look at a run after a step; return what should grow now, if anything.

        Args:
            session: The run's `SessionCallback`.
            batch: The batch that was just trained on.
        """
        if not self.config.automatic:
            return None
        step, module = session.progress.step, session.module
        rate = module.learning_rate / session.config.learning_rate
        for trigger in self.triggers:
            trigger.observe(Observation(step, float(module.mean.loss), rate))
        if step % self.config.check_every_steps:
            return None
        adapter, data = session.run.adapter, session.run.data
        seed = masking_seed(session.config.seed, session.progress.batches, session.stream.rank)
        shown = masked(data, dict(batch), seed)
        inputs = model_inputs(adapter, shown, data)
        self._parts = self._parts or structure(adapter)
        with adapter.isolated():
            entropy = predictive_entropy(data.task, adapter.logits(inputs), shown["labels"])
        layers = capacity(adapter, inputs, self._parts)
        benefits = benefit(adapter, inputs, shown["labels"], None, self._parts)
        for trigger in self.triggers:
            trigger.observe(Observation(step, entropy=entropy, capacity=layers, benefit=benefits))
        decision = self.arbiter.decide(step, [trigger.fires() for trigger in self.triggers])
        return Wanted(self._best(adapter, benefits, layers), decision) if decision.grow else None

    def _best(
        self, adapter: ModelAdapter, benefits: Sequence[LayerBenefit], layers: Sequence[LayerCapacity]
    ) -> Request:
        """Return the request that promises most: a gradient step gains the square of its norm, here per new weight."""
        found: Structure = self._parts
        ranked: list[tuple[float, Request]] = []
        for operator in self.config.operators:
            places = where_to_grow(operator, benefits, layers)
            request, share = self._request(operator, found, places[0] if places else None)
            score = places[0].score if places else 0.0
            ranked.append((score**2 / max(share, 1e-12), request))
        return max(ranked, key=lambda item: item[0])[1]

    def _request(self, operator: str, found: Structure, place: Place | None) -> tuple[Request, float]:
        """Return a request for one operator, and by which share of the model's blocks it would add weights."""
        share = self.config.amount_share
        blocks = max(1, len(found.blocks.value))
        if operator == "depth":
            added = max(1, round(share * blocks))
            return Request(operator, added, where=place.where if place else None), added / blocks
        if operator == "feed_forward" and place is not None:
            pair = pairs_of(found)[place.where]
            return Request(operator, _rounded(share * pair.hidden), where=place.where), share / blocks
        sizes = {
            "heads": max((a.kv_heads for a in found.attentions.value), default=1),
            "residual": found.width.value or 1,
            "channels": max((stage.channels for stage in found.stages.value), default=1),
        }
        size = sizes.get(operator, 1)
        return Request(operator, max(1, round(share * size))), share

    def check_budget(self, session: Any, plan: Plan, events: int) -> None:
        """Refuse a plan with which the model would cost more than it may, or than the GPU has room for.

        All processes that train together ask at the same point, and refuse together.

        Raises:
            BudgetError: It would.
        """
        limits, run = self.budget, session.run
        device = run.adapter.device
        # A GPU that is full ends the run, whatever the limits; a CPU is asked where it is measured in any case.
        if limits == Budget() and device.type != "cuda":
            return
        inputs = run.adapter.example_inputs()
        before = model_size(run.adapter, inputs, run.config, run.data)
        self.first = self.first or before
        surgery = Surgery(run.adapter.module, plan)
        try:
            after = model_size(run.adapter, inputs, run.config, run.data)
        finally:
            surgery.undo()
        refused = limits.refusal(before, after, self.first, events, room(device))
        if agreed(refused is not None):
            raise refused or BudgetError(
                f"Another process has no room for {plan.describe()}.",
                "Expected room for the grown model in all processes.",
                "Let it grow by less, or use a smaller batch_size.",
            )


def _rounded(size: float) -> int:
    """Return a whole number of hidden units, in eights where there are as many: kernels work in such pieces."""
    return max(1, round(size)) if size < 16 else 8 * round(size / 8)
