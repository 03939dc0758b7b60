"""How much of its width does a layer use? Effective rank and units that never vary, measured in one forward pass.

Measured are the hidden units of every feed-forward pair, where widening would add some, and the outputs of the blocks,
which is what a wider residual stream would carry.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from utils.adapters import ModelAdapter
from utils.adapters.capture import first_tensor, observe
from utils.adapters.structure import Structure, structure
from utils.adapters.wiring import FeedForward, Projection

MOST_VECTORS = 4096
"""Vectors per layer that are looked at, evenly spaced: the rank of few thousand shows what there is to see."""
DEAD = 0.01
"""A unit is dead when its deviation over the vectors is at most this share of the layer's (root mean square)."""
CallObserver = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class LayerCapacity:
    """How much of its width one layer uses."""

    where: str
    """The feed-forward pair or the block; see `kind`."""
    kind: str
    """``"feed_forward"`` for hidden units, ``"block"`` for what a block returns."""
    width: int
    """Units."""
    effective_rank: float
    """Of the units' values without their means; from 0, when nothing varies, to `width`."""
    share: float
    """`effective_rank` as a share of the largest that there can be: `width`, or the number of vectors less one."""
    dead: float
    """Share of the units whose value hardly depends on the input."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values."""
        return asdict(self)


class ProductCalls(TorchFunctionMode):
    """Hands on what is multiplied by certain weights, and the product, wherever in a model's code that is written."""

    def __init__(self, weights: Mapping[str, nn.Parameter], observer: CallObserver) -> None:
        """Watch products of vectors with weights.

        Args:
            weights: Matrices by a name of the caller's; both orders of their axes are recognised by size.
            observer: Gets the name, the vectors ``(..., inputs)`` and the product ``(..., outputs)`` after each call.
        """
        super().__init__()
        self.names: dict[int, list[str]] = {}
        for name, weight in weights.items():
            self.names.setdefault(id(weight), []).append(name)
        self.observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call; hand it on when it is a product with one of the weights."""
        result = func(*args, **(kwargs or {}))
        given = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        # A transposed weight is a view of it.
        found = next((t for t in given if id(t) in self.names or id(t._base) in self.names), None)
        if found is None or not isinstance(result, Tensor) or found.dim() != 2:
            return result
        names = self.names.get(id(found)) or self.names[id(found._base)]
        for vectors in given:
            sizes = {(vectors.shape[-1], result.shape[-1])} if vectors.dim() > 1 and result.dim() > 1 else set()
            fits = sizes & {tuple(found.shape), tuple(found.shape[::-1])}
            if vectors is not found and fits and vectors.shape[:-1] == result.shape[:-1]:
                for name in names:
                    self.observer(name, vectors, result)
                break
        return result


def weight_of(adapter: ModelAdapter, projection: Projection) -> nn.Parameter | None:
    """Return the weight of a projection where it is a matrix with real numbers."""
    weight = adapter.module.get_parameter(projection.weight) if projection.weight else None
    return weight if weight is not None and weight.dim() == 2 and weight.is_floating_point() else None


def effective_rank(activations: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007, eq. 3).

    Args:
        activations: ``(n, d)``, one vector per row, taken as they are: subtract their mean where it should not count.

    Returns:
        From 1, when all rows are multiples of one vector, to ``min(n, d)``; 0 when all are zero, and not a number when
        some are not finite.

    Raises:
        ValueError: There are not two axes.
    """
    if activations.dim() != 2:
        raise ValueError(f"The activations have the shape {tuple(activations.shape)}; expected (n, d).")
    rows = activations.detach().double().cpu()
    if not bool(torch.isfinite(rows).all()):
        return math.nan
    # Eigenvalues of the smaller product are the squared singular values, at a fraction of the cost of an SVD.
    products = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    eigenvalues = torch.linalg.eigvalsh(products) if products.numel() else products.new_zeros(0)
    # What rounding leaves of a zero is about this much of the largest; its root would count as a direction.
    floor = max(products.shape) * torch.finfo(torch.float64).eps * eigenvalues.max().clamp_min(0) if len(rows) else 0.0
    singular = torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()
    share = singular[singular > 0] / singular.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def dead_units(activations: Tensor) -> float:
    """Return the share of units, columns of ``(n, d)``, that hardly vary: see `DEAD`.

    A rectifier that never opens gives zero always. A smooth one that is closed gives nearly zero, which is why the
    bound is relative to the layer, and a unit that is always the same says no more than a bias.
    """
    deviations = activations.detach().double().std(dim=0, unbiased=False)
    typical = deviations.square().mean().sqrt()
    return float((deviations <= DEAD * typical).double().mean())


def layer_vectors(tensor: Tensor, channels_first: bool = False) -> Tensor:
    """Return activations as ``(n, width)``: a vector per token, or per place of an image, at most `MOST_VECTORS`."""
    rows = (tensor.movedim(1, -1) if channels_first else tensor).detach()
    rows = rows.reshape(-1, rows.shape[-1])
    # A copy: the code that follows may add to the tensor in place.
    return rows[:: max(1, -(-len(rows) // MOST_VECTORS))].clone()


def is_image(tensor: Tensor) -> bool:
    """Tell whether a block's output has its channels before its places, as convolutions make them."""
    return tensor.dim() == 4


def capacity(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], found: Structure | None = None
) -> list[LayerCapacity]:
    """Measure how much of its width each layer uses, in one forward pass in eval mode; the model stays as it was.

    Args:
        adapter: The model.
        inputs: A real batch, as `ModelAdapter.logits` takes it; some hundred tokens or images say more than few.
        found: The model's structure where the caller has it already.

    Returns:
        The hidden units of the feed-forward pairs in order of execution, then the blocks' outputs. Layers that the
        batch does not reach are left out, and so are those that it gives fewer than two vectors.

    Raises:
        AdapterError: No forward pass succeeds.
    """
    found = found or structure(adapter)
    pairs = pairs_of(found)
    kept: dict[tuple[str, str], list[Tensor]] = {}
    weights = {name: weight for name, pair in pairs.items() if (weight := weight_of(adapter, pair.down)) is not None}
    members = set(found.blocks.value)

    def hidden(name: str, vectors: Tensor, product: Tensor) -> None:
        kept.setdefault((name, "feed_forward"), []).append(layer_vectors(vectors))

    def returned(name: str, child: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output) if name in members else None
        if tensor is not None and tensor.dim() > 1 and tensor.is_floating_point():
            kept.setdefault((name, "block"), []).append(layer_vectors(tensor, is_image(tensor)))

    with adapter.isolated(), observe(adapter.module, returned), ProductCalls(weights, hidden):
        adapter.logits(inputs)
    order = [(name, "feed_forward") for name in pairs] + [(name, "block") for name in found.blocks.value]
    return [_measured(*place, torch.cat(kept[place])) for place in order if sum(map(len, kept.get(place, []))) > 1]


def _measured(where: str, kind: str, rows: Tensor) -> LayerCapacity:
    """Measure one layer's vectors ``(n, width)``."""
    rows = rows.double()
    count, width = rows.shape
    rank = effective_rank(rows - rows.mean(dim=0))
    return LayerCapacity(where, kind, width, rank, rank / max(1, min(width, count - 1)), dead_units(rows))


def pairs_of(found: Structure) -> dict[str, FeedForward]:
    """Return the feed-forward pairs by a name of their own: that of the narrowing layer where one holds several."""
    names = [pair.name for pair in found.feed_forwards.value]
    return {
        (pair.name if pair.name and names.count(pair.name) == 1 else pair.down.module or pair.name): pair
        for pair in found.feed_forwards.value
    }
