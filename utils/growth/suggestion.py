"""What growth to try first with a model one does not know."""

from dataclasses import dataclass
from html import escape
from typing import Any

from utils.adapters import ModelAdapter, ModelSpec
from utils.adapters.structure import structure
from utils.growth.config import GrowthConfig, ScheduledGrowth
from utils.growth.edits import GrowthError
from utils.growth.operators.depth import plan_beginning, plan_depth
from utils.growth.planning import plan_growth
from utils.growth.request import Request
from utils.growth.scratch import Scratch
from utils.growth.surgery import Surgery

WIDER = 0.5
"""Share by which a hidden layer is widened."""


@dataclass(frozen=True)
class Suggestion:
    """Settings of growth that fit a model, and why."""

    config: GrowthConfig
    """The settings; without any event where nothing fits."""
    why: str
    """What was found."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as `TrainingConfig.growth` takes them."""
        return self.config.to_dict()

    def __str__(self) -> str:
        """Say it in a sentence."""
        return self.why

    def _repr_html_(self) -> str:
        """Show the sentence in a notebook."""
        return f"<p>{escape(self.why)}</p>"


def suggested_growth(model: Any, at: float = 0.5, spec: ModelSpec | None = None) -> Suggestion:
    """Look for growth that a model takes, the most useful first: from one block to all, or wider hidden layers.

    Args:
        model: A loaded model, an adapter or a module; it stays as it is.
        at: The share of the run at which it grows.
        spec: Facts about the model that override detection.
    """
    adapter = ModelAdapter(model, spec=spec)
    found = structure(adapter)
    refusals = []
    try:
        _try_depth(adapter)
        blocks = len(found.blocks.value)
        return Suggestion(
            GrowthConfig.progressive(1, at),
            f"Begin with one of the {blocks} blocks and grow to all of them after {at:.0%} of the steps: the model "
            "runs so, and the new blocks begin as the identity.",
        )
    except GrowthError as error:
        refusals.append(str(error.found))
    hidden = max((pair.hidden for pair in found.feed_forwards.value), default=0)
    for operator, size in (("feed_forward", hidden), ("channels", 8)):
        amount = max(1, round(WIDER * size))
        try:
            plan = plan_growth(adapter, Request(operator, amount), found)
        except GrowthError as error:
            refusals.append(str(error.found))
            continue
        config = GrowthConfig(schedule=(ScheduledGrowth(at, operator, amount=amount),))
        return Suggestion(config, f"{plan.describe()}, after {at:.0%} of the steps. Depth: {refusals[0]}")
    return Suggestion(GrowthConfig(), "This model cannot grow by itself: " + " ".join(dict.fromkeys(refusals)))


def _try_depth(adapter: ModelAdapter) -> None:
    """Try on copies to leave all blocks but one out, and to bring them back.

    Raises:
        GrowthError: That does not work.
    """
    scratch = Scratch(adapter)
    plan = plan_beginning(scratch, structure(adapter), 1)
    Surgery(scratch.module, plan)
    shallow = Scratch(scratch.adapter)
    plan_depth(shallow, structure(shallow.adapter), Request("depth", to=plan.before))
