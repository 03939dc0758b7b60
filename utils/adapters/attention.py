"""Every attention that a model computes, captured without touching the model.

Fused calls keep no weights, so these are recomputed from their arguments; eager code is recognised by what it does: a
product of two activations, a softmax, and a product with values. What is no attention in this sense (routers, losses,
output distributions, sigmoid or linear attention) yields nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from utils.adapters.contractions import Factors
from utils.adapters.provenance import traced
from utils.adapters.traces import Contraction, Softmax


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention of one forward pass."""

    where: str
    """Qualified name of the innermost module whose own code computes it; empty for the model's own forward."""
    kind: str
    """``"scaled_dot_product_attention"`` (fused) or ``"softmax"`` (eager)."""
    weights: Tensor
    """``(batch, heads, query, key)``, float32, detached: what multiplies the values."""
    query: Tensor | None
    """``(batch, heads, query, dim)`` as it entered the product, if known."""
    key: Tensor | None
    """``(batch, heads, key, dim)`` as it entered the product, key heads repeated for grouped queries, if known."""
    scale: float | None
    """The constant factor on q k^T since both left their layers, wherever in the code it is applied."""
    late_scale: float | None
    """The part of it that is applied after the product, or by the fused call."""
    head_dim: int | None
    """Length of the vectors that are multiplied."""
    bounded: bool
    """Queries or keys are normalised, or the scores pass a bounded function, or a temperature is learned."""
    projected: bool
    """Queries and keys are both outputs of linear layers."""
    biased: bool
    """Something learned or computed is added to the scores, such as a relative position bias."""
    upcast: bool
    """Queries and keys are cast to float32 for the product."""
    causal: bool
    """No query gives weight to a later key; always false when the lengths differ."""

    @property
    def scores(self) -> Tensor | None:
        """``(batch, heads, query, key)``: scaled products before bias, mask and softmax, if all are known."""
        if self.query is None or self.key is None or self.late_scale is None:
            return None
        return (self.query @ self.key.transpose(-2, -1)) * self.late_scale


def record_attention(
    module: nn.Module, call: Callable[[], Any], keep: Callable[[AttentionCall], None] | None = None
) -> list[AttentionCall]:
    """Run `call`, a forward pass of `module`, and describe every attention inside it, in execution order.

    Args:
        module: The model; hooks tell which of its modules is running, and are removed afterwards.
        call: Runs it, for example ``lambda: adapter.logits(inputs)``.
        keep: Gets each attention as soon as it is computed, so that nothing large needs to be kept.

    Returns:
        All of them when `keep` is None, else nothing.
    """
    found: list[AttentionCall] = []
    seen: WeakSet[Softmax] = WeakSet()
    take = found.append if keep is None else keep

    def report(contraction: Contraction) -> None:
        softmax = contraction.softmax
        if softmax in seen:
            return
        seen.add(softmax)
        if (described := describe_attention(softmax, tracer.batch_size)) is not None:
            take(described)

    with traced(module, report) as tracer:
        call()
    return found


def describe_attention(softmax: Softmax, batch_size: int) -> AttentionCall | None:
    """Bring one attention into the usual layout; None for a softmax that is not of a product of two activations.

    Args:
        softmax: A softmax whose result multiplies values.
        batch_size: Samples in this forward pass, which tells samples from heads where both are one axis.
    """
    places, product = softmax.scores.axes, softmax.scores.product
    weights = softmax.weights.float()
    if product is None or weights.dim() < 2:
        return None
    if places is None:
        places = (-2, -1) if softmax.dim == -1 else (-1, softmax.dim)
    swapped = softmax.dim == places[0]
    row, column = (places[1], places[0]) if swapped else places
    weights = four_axes(weights.movedim((row, column), (-2, -1)), batch_size)
    query, key = (operand(product.factors, left, batch_size) for left in (not swapped, swapped))
    lengths = weights.shape[-2:]
    if query is None or key is None or (query.shape[-2], key.shape[-2]) != lengths:
        query = key = None
    contracted = product.factors.labels.contracted
    left, letters = product.factors.left, product.factors.labels.left
    late = softmax.scores.factor
    factor = product.factor * late
    square = lengths[0] == lengths[1] > 1
    return AttentionCall(
        where=softmax.where,
        kind=softmax.kind,
        weights=weights,
        query=query,
        key=key,
        scale=factor if math.isfinite(factor) else None,
        late_scale=late if math.isfinite(late) else None,
        head_dim=left.shape[letters.index(contracted)] if len(contracted) == 1 else None,
        bounded=product.bounded or softmax.scores.bounded,
        projected=product.projected,
        biased=softmax.scores.biased,
        upcast=product.upcast,
        causal=square and not bool(weights.triu(1).any()),
    )


def four_axes(tensor: Tensor, batch_size: int) -> Tensor:
    """Give a tensor four axes: leading ones become batch and heads; three are ``(batch * heads, rows, columns)``."""
    if tensor.dim() == 3 and tensor.shape[0] % batch_size == 0:
        return tensor.unflatten(0, (batch_size, -1))
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(-3)
    return tensor.flatten(1, -3)


def operand(factors: Factors, left: bool, batch_size: int) -> Tensor | None:
    """Return one factor as ``(batch, heads, length, dim)``; None if it has no length of its own."""
    labels = factors.labels
    tensor, letters = (factors.left, labels.left) if left else (factors.right, labels.right)
    mine, other = labels.own(left), labels.own(not left)
    if not mine or not other:
        return None
    leading = [letter for letter in labels.out if letter not in (mine[-1], other[-1])]
    for letter in leading:
        if letter not in letters:
            tensor, letters = tensor.unsqueeze(0), letter + letters
    order = [*leading, mine[-1], *labels.contracted]
    if sorted(order) != sorted(letters):
        return None
    arranged = tensor.permute(*(letters.index(letter) for letter in order)).flatten(len(leading) + 1)
    return four_axes(arranged.float(), batch_size)
