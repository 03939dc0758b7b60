"""Would it pay? A grown copy and one that stays as it is train on the next batches, and only then the model decides.

Both copies take the batches, seeds and learning rates that the run will take next, with their own copies of the
optimizer's state; both are thrown away, so the run's own course does not depend on whether it was asked.
"""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from utils.adapters import ModelAdapter
from utils.growth.budget import forward_flops
from utils.growth.config import GrowthConfig
from utils.growth.edits import GrowthRefusedError, Plan
from utils.growth.planning import forget_sizes
from utils.growth.surgery import Surgery
from utils.runtime.seeding import isolated_streams, seed_streams
from utils.training.evaluation import masking_seed, objective
from utils.training.optimizer_migration import migrate_optimizer
from utils.training.schedules import learning_rate_share, make_optimizer, parameter_groups

JUDGES = 4
"""Batches behind those of the probe on which both copies are measured."""


@dataclass(frozen=True)
class Probe:
    """What the two copies reached."""

    steps: int
    """Steps that each of them took."""
    before: float
    """Loss before, in nats, on batches that neither was trained on."""
    ungrown: float
    """Loss of the copy that stayed as it is."""
    grown: float
    """Loss of the copy that grew."""
    cost: float
    """FLOPs of a step of the grown copy over those of the other."""

    @property
    def pays(self) -> bool:
        """Whether the grown copy's loss fell by more per FLOP."""
        return (self.before - self.grown) / self.cost > self.before - self.ungrown

    @property
    def why(self) -> str:
        """The numbers in words."""
        return (
            f"in {self.steps} steps the loss went from {self.before:.4f} to {self.grown:.4f} with growth, at "
            f"{self.cost:.2f} times the FLOPs, and to {self.ungrown:.4f} without"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "pays": self.pays}


def probe(session: Any, plan: Plan, steps: int, number: int = 0) -> Probe:
    """Try a plan for some steps.

    Args:
        session: The run's `SessionCallback`, after an optimizer step.
        plan: What would be done.
        steps: Optimizer steps of each copy.
        number: Of the event in the lineage, so that the copy draws what the event would.

    Raises:
        GrowthRefusedError: The run reads its data while it trains, so the next batches are not known; or the plan is
            approximate, and the copy would have to be distilled first.
    """
    if plan.promise == "approximate":
        raise GrowthRefusedError(
            f"probe_steps is set, and {plan.describe()} would change the function.",
            "Expected growth that keeps the function: a copy that was not distilled says nothing of one that was.",
            "Set probe_steps to 0, or approximate to False.",
        )
    run, stream = session.run, session.stream
    if stream.sequential:
        raise GrowthRefusedError(
            "probe_steps is set, and the data is read while it is trained on.",
            "Expected data whose next batches can be looked at.",
            "Set probe_steps to 0, or prepare the data without ?stream=true.",
        )
    copies = [_copied(session, None), _copied(session, plan, number)]
    with isolated_streams(run.config.seed, "probe", session.progress.step):
        before = _measured(session, copies[0][0], steps)
        reached = []
        for adapter, optimizer in copies:
            _train(session, adapter, optimizer, steps)
            reached.append(_measured(session, adapter, steps))
        inputs = run.adapter.example_inputs()
        flops = [forward_flops(adapter, inputs) for adapter, _ in copies]
    return Probe(steps, before, reached[0], reached[1], flops[1] / max(1, flops[0]))


def _copied(session: Any, plan: Plan | None, number: int = 0) -> tuple[ModelAdapter, torch.optim.Optimizer]:
    """Return an adapter of a copy of the model, grown or not, and an optimizer that goes on from the run's."""
    run = session.run
    adapter = copy.copy(run.adapter)
    adapter.module = copy.deepcopy(run.model)
    optimizer = make_optimizer(adapter.module, run.config)
    optimizer.load_state_dict(copy.deepcopy(session.optimizer.state_dict()))
    if plan is not None:
        mean = GrowthConfig.from_dict(run.config.growth or {}).new_second_moment == "mean"
        surgery = Surgery(adapter.module, plan, run.config.seed, session.progress.step, mean, number)
        migrate_optimizer(optimizer, surgery.change, parameter_groups(adapter.module, run.config.weight_decay))
    forget_sizes(adapter)
    return adapter, optimizer


def _train(session: Any, adapter: ModelAdapter, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train a copy as the run would go on."""
    config, progress = session.config, session.progress
    adapter.module.train()
    for number in range(steps):
        rate = config.learning_rate * learning_rate_share(progress.step + number, session.run.total_steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        for part in range(config.accumulate):
            ahead = number * config.accumulate + part
            seed_streams(config.seed, "batch", progress.batches + ahead, session.stream.rank)
            loss = _loss(session, adapter, ahead, config.label_smoothing)
            (loss / config.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(adapter.module.parameters(), config.clip_norm)
        optimizer.step()
    adapter.module.zero_grad(set_to_none=True)


@torch.no_grad()
def _measured(session: Any, adapter: ModelAdapter, steps: int) -> float:
    """Return the mean loss on batches behind those of the probe."""
    adapter.module.eval()
    first = steps * session.config.accumulate
    losses = [float(_loss(session, adapter, first + number)) for number in range(JUDGES)]
    return sum(losses) / len(losses)


def _loss(session: Any, adapter: ModelAdapter, ahead: int, smoothing: float = 0.0) -> Tensor:
    """Return the loss of a batch of the future, by its distance from the next one."""
    config, run = session.config, session.run
    batch = {name: value.to(run.adapter.device) for name, value in _ahead(session, ahead).items()}
    seed = masking_seed(config.seed, session.progress.batches + ahead, session.stream.rank)
    with session.module.trainer.precision_plugin.forward_context():
        return objective(adapter, run.data, batch, seed, smoothing)[0]


def _ahead(session: Any, number: int) -> dict[str, Tensor]:
    stream = session.stream
    place = stream.consumed + (number * stream.world + stream.rank) * stream.batch_size
    batch: dict[str, Tensor] = stream.batch_at(place)
    return batch
