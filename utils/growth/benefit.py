"""What would new parts be worth? The largest gradient that new neurons or a new block could get, without training them.

GradMax (Evci et al., "GradMax: Growing Neural Networks using Gradient Information", ICLR 2022, arXiv:2201.05125,
equations 6 to 9): k new neurons between two layers, whose incoming weights (or outgoing ones) are zero so that the
model computes what it did. Let x be the input of the first layer, d the gradient of the loss with respect to the output
of the second, and M the sum over samples and positions of the outer products d x^T. Outgoing weights V of orthonormal
columns give the incoming weights the gradient V^T M times the slope of the activation at zero, and incoming weights U
give the outgoing weights M U where the activation is linear. In either case the largest Frobenius norm over all
orthonormal choices is the root of the sum of the k largest squared singular values of M.

The slope is taken as one, as it is for a tanh; for GELU and SiLU the gradient at zero is half the score. Where a gate
multiplies the hidden units, a new one passes as much as its gate is open, and the score is multiplied by how much the
present units pass: the root mean square of what leaves the gate over that of what enters it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.adapters import ModelAdapter
from utils.adapters.capture import first_tensor, observe
from utils.adapters.structure import Structure, structure
from utils.adapters.wiring import FeedForward
from utils.growth.capacity import LayerCapacity, ProductCalls, is_image, pairs_of, weight_of
from utils.runtime.isolation import preserved
from utils.runtime.printing import captured_output


@dataclass(frozen=True)
class LayerBenefit:
    """What growing at one place would be worth."""

    where: str
    """The feed-forward pair that would get wider, or the block that a new one would follow; see `kind`."""
    kind: str
    """``"feed_forward"`` for new hidden units, ``"block"`` for a new block behind this one."""
    score: float
    """Largest gradient norm that the new neurons can have there, in nats per unit of weight."""
    present: float
    """Gradient norm of the pair's, or the block's, own weights."""

    @property
    def relative(self) -> float:
        """`score` as a multiple of `present`; 0 where nothing there has a gradient."""
        return self.score / self.present if self.present else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values."""
        return {**asdict(self), "relative": self.relative}


@dataclass(frozen=True)
class Place:
    """A place that could grow, as a report and a controller need it."""

    where: str
    """As in `LayerBenefit`."""
    score: float
    """Its gradient score."""
    share: float | None
    """Effective rank as a share of the width, where it was measured."""
    why: str
    """The numbers in words."""


def largest_gradient(directions: Tensor, k: int | None = None) -> float:
    """Return the root of the sum of the k largest squared singular values.

    Args:
        directions: ``(outputs, inputs)``, the sum of outer products of output gradients and inputs.
        k: New neurons, at least 1; None, and any number from that of the singular values on, takes all of them.

    Returns:
        The norm; not a number when the gradients are not finite.
    """
    if not bool(torch.isfinite(directions).all()):
        return math.nan
    directions = directions.detach().double()
    if k is None or k >= min(directions.shape):
        # All of them: their squares add up to those of the entries.
        return float(directions.norm())
    values = torch.linalg.svdvals(directions.cpu())
    return float(values[:k].square().sum().sqrt())


class _Sums:
    """Sums of outer products at each place: inputs come in the forward pass, gradients in the backward pass."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.products: dict[str, Tensor] = {}
        self.matched: dict[str, int] = {}

    def give(self, name: str, vectors: Tensor) -> None:
        """Take in the inputs ``(n, inputs)`` of one call; they are not copied, the backward pass keeps them anyway."""
        self.inputs.setdefault(name, []).append(vectors)

    def follow(self, name: str, output: Tensor, channels_first: bool = False) -> None:
        """Have the gradient of what one call returned multiplied by the inputs of the call of the same number."""
        number = self.matched.get(name, 0)
        self.matched[name] = number + 1
        calls = self.inputs.get(name, [])
        if not output.requires_grad or number >= len(calls):
            return
        vectors = calls[number]

        def add(gradient: Tensor) -> None:
            rows = _rows(gradient, channels_first)
            if len(rows) == len(vectors):
                product = rows.double().T @ vectors.double()
                self.products[name] = product + self.products[name] if name in self.products else product

        output.register_hook(add)


def benefit(
    adapter: ModelAdapter,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    k: int | None = None,
    found: Structure | None = None,
) -> list[LayerBenefit]:
    """Score every place that could grow, with one forward and one backward pass in eval mode.

    Feed-forward pairs are scored by GradMax. A new block behind an old one is scored as the pair that it would hold:
    x is the block's output divided by its root mean square, as the new block's norm would do, and d the gradient with
    respect to that output, to which the new block would add.

    Args:
        adapter: The model; it comes back as it was, gradients included.
        inputs: A real batch, as `ModelAdapter.logits` takes it.
        labels: Its labels, as `ModelAdapter.loss` takes them.
        k: New neurons at each place; None for as many as there are directions, which needs no decomposition and is what
            the threshold of the benefit trigger is meant for.
        found: The model's structure where the caller has it already.

    Returns:
        Feed-forward pairs in order of execution, then blocks. Left out are pairs and blocks that are frozen, and those
        that the batch does not reach.

    Raises:
        AdapterError: No forward pass succeeds.
        ValueError: `k` is below 1.
    """
    if k is not None and k < 1:
        raise ValueError(f"k is {k}; expected at least one new neuron.")
    found = found or structure(adapter)
    module = adapter.module
    pairs = {name: pair for name, pair in pairs_of(found).items() if _trains(_weights(adapter, pair))}
    gated = {name for name, pair in pairs.items() if pair.gate or len(pair.up.groups) > 1}
    ups = {f"in:{name}": weight for name, pair in pairs.items() if (weight := weight_of(adapter, pair.up)) is not None}
    downs = {f"out:{n}": weight for n, pair in pairs.items() if (weight := weight_of(adapter, pair.down)) is not None}
    members = [name for name in found.blocks.value if _trains(module.get_submodule(name).parameters())]
    wide, deep = _Sums(), _Sums()
    entered, left = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)

    def product(name: str, vectors: Tensor, result: Tensor) -> None:
        side, _, pair = name.partition(":")
        if side == "in":
            wide.give(pair, _rows(vectors))
            entered[pair] += float(result.detach().float().square().mean()) if pair in gated else 0.0
        else:
            wide.follow(pair, result)
            left[pair] += float(vectors.detach().float().square().mean()) if pair in gated else 0.0

    def returned(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output) if name in members else None
        if tensor is not None and tensor.dim() > 1 and tensor.is_floating_point():
            rows = _rows(tensor, is_image(tensor)).float()
            deep.give(name, rows / rows.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12))
            deep.follow(name, tensor, is_image(tensor))

    with captured_output(), preserved(module, "benefit"), torch.enable_grad():
        module.eval()
        with observe(module, returned), ProductCalls({**ups, **downs}, product):
            loss = adapter.loss(adapter.logits(inputs), labels)
        if loss.requires_grad:
            loss.backward()
        norms = {name: _norm(_weights(adapter, pair)) for name, pair in pairs.items()}
        block_norms = {name: _norm(module.get_submodule(name).parameters()) for name in members}
    for name in gated & set(wide.products):
        wide.products[name] *= math.sqrt(left[name] / entered[name]) if entered[name] else 0.0
    scored = [("feed_forward", name, wide.products[name], norms[name]) for name in pairs if name in wide.products]
    scored += [("block", n, deep.products[n], block_norms[n]) for n in members if n in deep.products]
    return [LayerBenefit(name, kind, largest_gradient(products, k), norm) for kind, name, products, norm in scored]


def total_benefit(benefits: Sequence[LayerBenefit], kind: str = "feed_forward") -> float | None:
    """Return the gradient norm of new neurons at all places of a kind as a multiple of that of the present weights.

    One number for a model: layers with a small gradient count for little, whatever their own ratio is.

    Returns:
        None when no place of that kind was scored or none has a gradient.
    """
    scores = math.sqrt(math.fsum(layer.score**2 for layer in benefits if layer.kind == kind))
    present = math.sqrt(math.fsum(layer.present**2 for layer in benefits if layer.kind == kind))
    return scores / present if present else None


def _rows(tensor: Tensor, channels_first: bool = False) -> Tensor:
    """Return ``(n, width)`` without a graph."""
    moved = (tensor.movedim(1, -1) if channels_first else tensor).detach()
    return moved.reshape(-1, moved.shape[-1])


def _weights(adapter: ModelAdapter, pair: FeedForward) -> list[nn.Parameter]:
    """Return the matrices of a feed-forward pair."""
    parts = [pair.up, pair.down, *([pair.gate] if pair.gate else [])]
    return [weight for part in parts if (weight := weight_of(adapter, part)) is not None]


def _trains(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell whether any of the parameters trains."""
    return any(p.requires_grad for p in parameters)


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    """Return the norm of the gradients of all parameters together."""
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))


def where_to_grow(
    operator: str, benefits: Sequence[LayerBenefit], capacities: Sequence[LayerCapacity] = ()
) -> list[Place]:
    """Rank the places where an operator could grow a model, the best first.

    New depth is ranked by the scores of the blocks that it would follow, everything else by those of the feed-forward
    pairs. The gradients are all of one loss, so scores compare across layers. Equal scores, such as those of a model
    that was not measured, are ranked by how much of its width the layer uses, then in order of execution.

    Args:
        operator: One of `utils.growth.config.OPERATORS`.
        benefits: What `benefit` returned.
        capacities: What `capacity` returned.
    """
    kind = "block" if operator == "depth" else "feed_forward"
    shares = {layer.where: layer.share for layer in capacities if layer.kind == kind}
    scores = {layer.where: layer.score for layer in benefits if layer.kind == kind}
    names = [*scores, *(name for name in shares if name not in scores)]
    places = [
        Place(
            name, scores.get(name, 0.0), shares.get(name),
            (f"gradient score {scores[name]:.3g}" if name in scores else "no gradient score")
            + (f", effective rank {shares[name]:.0%} of the width" if name in shares else ""),
        )
        for name in names
    ]  # fmt: skip
    return sorted(places, key=lambda place: (-place.score, -(place.share or 0.0)))
