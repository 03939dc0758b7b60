"""Growth in one call, for a model in your hands."""

import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from utils.adapters import ModelAdapter, ModelSpec
from utils.growth.config import SECOND_MOMENTS
from utils.growth.lineage import GrowthEvent, lineage_of, remember
from utils.growth.operators.expert import opening
from utils.growth.planning import plan_growth
from utils.growth.request import Request
from utils.growth.transaction import grow_by
from utils.runtime.errors import ConfigError
from utils.training.optimizer_migration import migrate_optimizer
from utils.training.state import ModelChange, Undo


def grow(
    model: Any,
    operator: str,
    amount: int | None = None,
    to: int | None = None,
    where: str | int | None = None,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    labels: Tensor | None = None,
    optimizer: Any = None,
    seed: int = 0,
    tolerance: float | None = None,
    new_second_moment: str = "mean",
    spec: ModelSpec | None = None,
) -> GrowthEvent:
    """Make a model bigger where it stands, with a certificate; when that is not possible, it is as it was.

    Example:
        >>> model = utils.load_model("example:gpt")
        >>> print(utils.grow(model, "depth", amount=2).describe())

    Args:
        model: A loaded model, an adapter or a module. It stays the same object. A run that is started with it keeps its
            lineage.
        operator: depth, feed_forward, heads, residual, vocabulary, classes, expert or channels.
        amount: How much is added: blocks, hidden units, heads, lanes, rows, experts or channels.
        to: The size to reach instead.
        where: A block or module by name, or a block by number; None lets the operator choose.
        inputs: A real batch, as keyword arguments of forward; None makes inputs up.
        labels: Its labels, for the loss before and after.
        optimizer: An optimizer that trains the model and is to follow.
        seed: Seed of what is drawn.
        tolerance: Largest change of an answer as a share of their size; None takes that of the model's precision.
        new_second_moment: The optimizer's second moments of new weights: "mean", that of the tensor or of the one it is
            modelled on, or "zero".
        spec: Facts about the model that override detection.

    Returns:
        What was done, with its certificate.

    Raises:
        ConfigError: There is no such second moment.
        GrowthRefusedError: The model cannot grow so; the message says why.
        GrowthUndoneError: It grew, did not keep its function or could not be followed, and was taken back.

    Warns:
        UserWarning: A new expert gets no tokens before training opens it.
    """
    if new_second_moment not in SECOND_MOMENTS:
        near = get_close_matches(str(new_second_moment), SECOND_MOMENTS, n=1)
        raise ConfigError(
            f"new_second_moment is {new_second_moment!r}.",
            f"Expected one of {', '.join(SECOND_MOMENTS)}.",
            f"Did you mean {near[0]!r}?" if near else "Leave it out for the mean, as in a run.",
        )
    adapter = ModelAdapter(model, spec=spec)
    module: nn.Module = adapter.module
    plan = plan_growth(adapter, Request(operator, amount, to, where))
    given = adapter.example_inputs(4) if inputs is None else inputs
    loss: Callable[[], float] | None = None
    if labels is not None:
        wanted = labels

        def loss() -> float:
            return float(adapter.loss(adapter.logits(given), wanted))

    def migrate(change: ModelChange) -> Undo:
        return migrate_optimizer(optimizer, change)

    event = grow_by(
        adapter, plan, given, loss, None if optimizer is None else migrate, seed, len(lineage_of(module)),
        new_second_moment == "mean", tolerance,
    ).event  # fmt: skip
    remember(module, (*lineage_of(module), event))
    if held := [f"{name}[{first}:]" for name, first in opening(plan)]:
        warnings.warn(
            f"The new expert gets no tokens: {', '.join(held)} holds it back until training with utils.train or "
            "GrowthCallback raises it.",
            UserWarning,
            stacklevel=2,
        )
    return event
