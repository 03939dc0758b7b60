"""A concept read off a model: a direction on one layer's representation, and how sure the model is of a sample."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from utils.adapters import ModelAdapter
from utils.adapters.activations import representations
from utils.concepts.content import read_content
from utils.concepts.examples import Examples, example_batches
from utils.runtime.errors import ConfigError

RIDGE = 1.0
"""Half of it times the squared norm is added to the sum of the losses of a readout on standardised features."""


@dataclass(frozen=True, eq=False)
class ConceptReadout:
    """Reads a concept off a model; the model keeps its outputs."""

    adapter: ModelAdapter
    """The model."""
    layer: str
    """Qualified name of the layer."""
    side: str
    """Its ``"output"`` or ``"input"``."""
    pool: str
    """What becomes of the positions of a sample: ``"mean"`` or ``"last"``, or ``"flat"``."""
    vector: Tensor
    """float32 ``(width,)`` on the CPU."""
    bias: float
    """Added to what the vector reads: above zero the concept is likelier there than not."""
    channels: int | None = None
    """The axis of features, where the layer's shape leaves it open."""

    def score(self, inputs: Any, tokenizer: Any = None) -> Tensor:
        """Return log odds of the concept for each sample, float32 ``(n,)`` on the CPU; the model stays as it is.

        Args:
            inputs: Texts, a tensor of main inputs, a mapping of all inputs, or `Examples`.
            tokenizer: For texts.

        Raises:
            ConfigError: The inputs do not fit, or the layer is of another width now.
            DataError: There are none, or texts have no tokenizer.
        """
        if not isinstance(inputs, Examples):
            inputs = example_batches(self.adapter, read_content(inputs).given, tokenizer)
        made = representations(
            self.adapter, inputs.batches, self.layer, self.pool, side=self.side, channels=self.channels
        )
        if made.values.shape[1] != len(self.vector):
            raise ConfigError(
                f"`{self.layer}` of {self.adapter.name} is {made.values.shape[1]} wide, and the concept's readout "
                f"{len(self.vector)}.",
                "Expected the model and the layer that it was made for.",
                "Make the readout anew.",
            )
        scores: Tensor = inputs.restored(made.values @ self.vector + self.bias)
        return scores

    def probability(self, inputs: Any, tokenizer: Any = None) -> Tensor:
        """Return how likely each sample has the concept, ``(n,)`` from 0 to 1; see `score`."""
        return self.score(inputs, tokenizer).sigmoid()

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model as plain values that JSON can hold."""
        named = {name: getattr(self, name) for name in ("layer", "side", "pool", "bias", "channels")}
        return {"model": self.adapter.name, **named, "vector": self.vector.tolist()}

    def __str__(self) -> str:
        return f"Reads a concept off the {self.side} of `{self.layer}` of {self.adapter.name}"

    def _repr_html_(self) -> str:
        """Show where it reads."""
        from utils.concepts.concept_view import told_html

        return told_html(
            str(self),
            {"positions": self.pool, "width": len(self.vector), "length of the vector": f"{self.vector.norm():.3g}",
             "bias": f"{self.bias:.3g}"},
        )  # fmt: skip


def fit_readout(features: Tensor, targets: Tensor, ridge: float = RIDGE) -> tuple[Tensor, float]:
    """Return the vector and the bias whose sigmoid is closest to targets, which may be soft.

    Logistic regression with a ridge penalty on standardised features: convex, so there is one answer.

    Args:
        features: ``(n, width)``.
        targets: ``(n,)``, from 0 to 1.
        ridge: Weight of half the squared norm beside the sum of the losses.
    """
    rows, wanted = features.detach().double().cpu(), targets.detach().double().cpu()
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    # A feature that does not vary, up to rounding, stays out.
    spread = torch.where(spread > 1e-6 * rows.abs().amax(0), spread, torch.inf)
    weights = _least(
        (rows - mean) / spread,
        lambda logits, own: (
            functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
            + ridge / 2 * own.square().sum()
        ),
    )
    vector = weights[:-1] / spread
    return vector.float(), float(weights[-1] - mean @ vector)


def calibration(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the scale and the offset that turn scores into log odds (Platt, 1999).

    The targets are Platt's, a little inside 0 and 1, so that scores that separate the sides have an answer too. Scores
    that are rather higher without the concept say nothing: their scale is 0, and the offset how frequent the sides are.

    Args:
        scores: ``(n,)`` of samples that the scoring was not fitted to.
        labels: bool ``(n,)``, both values present.
    """
    positives, negatives = int(labels.sum()), int((~labels).sum())
    wanted = torch.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2)).double()
    values = scores.double()
    mean, spread = values.mean(), values.std(correction=0).clamp_min(1e-12)
    weights = _least(
        ((values - mean) / spread)[:, None],
        lambda logits, _: functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"),
    )
    scale = float(weights[0] / spread)
    if scale <= 0:
        return 0.0, math.log((positives + 1) / (negatives + 1))
    return scale, float(weights[1]) - scale * float(mean)


def _least(features: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return weights and intercept ``(width + 1,)`` of the least loss, a convex function of logits and weights."""
    weights = torch.zeros(features.shape[1] + 1, dtype=features.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-7, tolerance_change=1e-11, line_search_fn="strong_wolfe"
    )

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss(features @ weights[:-1] + weights[-1], weights[:-1])
        value.backward()
        return value

    step: Callable[..., Any] = optimizer.step
    with torch.enable_grad():
        step(evaluate)
    return weights.detach()
