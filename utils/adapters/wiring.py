"""Which linear layers make an attention's queries, keys and values, and which two make a feed-forward pair.

Rows of a weight are matched to heads by value: at the first position, where rotary embeddings turn nothing, queries,
keys and values are a selection of what their layers return.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from utils.adapters.attention import four_axes, operand
from utils.adapters.detection import Detection
from utils.adapters.traces import Contraction, Layer, Softmax, Trace


@dataclass(frozen=True)
class Projection:
    """A linear layer's weight and the axis along which it can grow or shrink."""

    module: str
    """The module that applies it."""
    weight: str
    """Name of its weight."""
    bias: str | None
    """Name of the bias that belongs to `axis`; None if there is none, or if `axis` is the input's."""
    axis: int
    """Axis of the weight that `groups` indexes."""
    groups: tuple[tuple[int, ...], ...]
    """Indices along `axis`: one tuple per head, or a single one with all hidden units."""
    exact: bool = True
    """The indices were matched by value; else their order is the usual one, head after head."""


@dataclass(frozen=True)
class AttentionModule:
    """One attention with its layers."""

    name: str
    """The module whose own code computes it."""
    block: str | None
    """The repeated block that it is in."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Features per head of queries and keys."""
    query: Projection | None
    """Makes queries; None if no linear layer was seen to."""
    key: Projection | None
    """Makes keys."""
    value: Projection | None
    """Makes values."""
    out: Projection | None
    """Takes the heads' results; its `axis` is that of its inputs."""
    reason: str
    """How it was found."""


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers with an activation between, or three with a gate, that lead back to the same width."""

    name: str
    """The innermost module that holds all of them."""
    block: str | None
    """The repeated block that it is in."""
    hidden: int
    """Units between the two."""
    width: int
    """Features outside."""
    up: Projection
    """The widening layer; its `axis` is that of its outputs. Two groups when a gate is the other half of one weight."""
    gate: Projection | None
    """The layer whose activation multiplies the widening one's output."""
    down: Projection
    """The narrowing layer; its `axis` is that of its inputs."""
    reason: str
    """How it was found."""


class Wiring:
    """Collects layers and attentions of one traced forward pass."""

    def __init__(self, module: nn.Module, blocks: list[str], batch_size: int) -> None:
        """Prepare names.

        Args:
            module: The model.
            blocks: Names of its repeated blocks.
            batch_size: Samples in the forward pass.
        """
        self.module, self.blocks, self.batch_size = module, blocks, batch_size
        self._names = {id(p): name for name, p in reversed(list(module.named_parameters(remove_duplicate=False)))}
        self._attentions: dict[tuple[str, int], AttentionModule] = {}
        self._open: WeakKeyDictionary[Softmax, tuple[str, int]] = WeakKeyDictionary()
        self._pairs: dict[int, FeedForward] = {}

    def attentions(self) -> Detection[list[AttentionModule]]:
        """Return the attentions seen, in order."""
        found = list(self._attentions.values())
        return Detection(found, f"{len(found)} softmaxes of a product of activations weight values")

    def feed_forwards(self) -> Detection[list[FeedForward]]:
        """Return the feed-forward pairs seen, in order."""
        found = list(self._pairs.values())
        return Detection(found, f"{len(found)} times linear layers lead through an activation back to the same width")

    def contraction(self, contraction: Contraction) -> None:
        """Take in values weighted by a softmax."""
        softmax, product = contraction.softmax, contraction.softmax.scores.product
        if product is None or softmax in self._open:
            return
        query, key = (operand(product.factors, left, self.batch_size) for left in (True, False))
        if query is None or key is None:
            return
        heads, head_dim = query.shape[1], query.shape[-1]
        factors = (1.0, product.factor, abs(product.factor) ** 0.5)
        first, second = product.layers
        values = contraction.values
        value = None if values is None or values.dim() < 2 else four_axes(values.float(), self.batch_size)
        made_q = self._heads(first, query, heads, head_dim, factors)
        made_k = self._heads(second, key, heads, head_dim, factors)
        made_v = None if value is None else self._heads(contraction.values_layer, value, heads, value.shape[-1], (1.0,))
        kv_heads = len(made_k.groups) if made_k is not None else key.shape[1]
        ids = id(first.weight) if first is not None else 0
        place = (softmax.where, ids)
        self._open[softmax] = place
        self._attentions.setdefault(place, AttentionModule(
            softmax.where, self._block(softmax.where), heads, kv_heads, head_dim, made_q, made_k, made_v, None,
            f"{softmax.kind} of a product of activations of width {head_dim}",
        ))  # fmt: skip

    def layer(self, layer: Layer, given: Trace) -> None:
        """Take in a call of a linear layer."""
        if given.mixed is not None and (place := self._open.get(given.mixed)) is not None:
            known = self._attentions[place]
            size = layer.weight.shape[_in_axis(layer)]
            if known.out is None and size % known.heads == 0:
                each = size // known.heads
                rows = tuple(tuple(range(head * each, (head + 1) * each)) for head in range(known.heads))
                out = Projection(layer.where, self._name(layer.weight), None, _in_axis(layer), rows, exact=False)
                self._attentions[place] = AttentionModule(**{**vars(known), "out": out})
            return
        self._feed_forward(layer, given)

    def _feed_forward(self, down: Layer, given: Trace) -> None:
        """Recognise a pair by sizes and by the activation between."""
        sources = sorted(given.last, key=lambda source: source.where)
        activated = given.layer is None or len(sources) == 2
        if id(down.weight) in self._pairs or not 1 <= len(sources) <= 2 or not activated:
            return
        hidden, width = down.weight.shape[_in_axis(down)], down.weight.shape[down.out_axis]
        if any(source.weight.shape[_in_axis(source)] != width or source.weight is down.weight for source in sources):
            return
        sizes = {source.weight.shape[source.out_axis] for source in sources}
        halves = sizes == {2 * hidden} and len(sources) == 1
        if sizes != {hidden} and not halves:
            return
        whole = tuple(range(hidden))
        groups = (whole, tuple(range(hidden, 2 * hidden))) if halves else (whole,)
        made = [self._projection(source, groups, True) for source in sources]
        # The activation is applied to the gate, and which layer that is shows in the trace: it lost its linear trail.
        up, gate = (made[0], None) if len(made) == 1 else self._ordered(made, given)
        where = _common([up.module, down.where, *([gate.module] if gate else [])])
        kind = "gated" if gate or halves else "plain"
        self._pairs[id(down.weight)] = FeedForward(
            where, self._block(where), hidden, width, up, gate,
            Projection(down.where, self._name(down.weight), None, _in_axis(down), (whole,)),
            f"{kind}: {width} to {hidden} and back, with an activation between",
        )  # fmt: skip

    def _ordered(self, made: list[Projection], given: Trace) -> tuple[Projection, Projection]:
        """Return the widening layer and the gate: the product's factor that is still linear is no gate."""
        linear = given.straight
        if linear is not None and made[0].weight == self._name(linear.weight):
            return made[0], made[1]
        return made[1], made[0]

    def _heads(
        self, layer: Layer | None, vectors: Tensor, heads: int, width: int, factors: tuple[float, ...]
    ) -> Projection | None:
        """Match the vectors of the first position to a layer's outputs."""
        if layer is None:
            return None
        outputs = layer.output.float().reshape(-1, layer.output.shape[-1])[0]
        wanted = vectors[0, :, 0, :]
        if len(wanted) <= heads:
            for factor in factors:
                rows = _match(wanted / factor if factor else wanted, outputs)
                if rows is not None:
                    groups = tuple(dict.fromkeys(tuple(layer.start + i for i in row) for row in rows))
                    return self._projection(layer, groups, True)
        count = layer.output.shape[-1] // width
        if count * width != layer.output.shape[-1] or count > heads:
            return None
        usual = tuple(tuple(range(layer.start + h * width, layer.start + (h + 1) * width)) for h in range(count))
        return self._projection(layer, usual, False)

    def _projection(self, layer: Layer, groups: tuple[tuple[int, ...], ...], exact: bool) -> Projection:
        """Name a layer's parts by the axis of its outputs."""
        weight = self._name(layer.weight)
        owner, _, leaf = weight.rpartition(".")
        bias = f"{owner}.{leaf.replace('weight', 'bias')}".lstrip(".")
        named = dict(self.module.named_parameters(remove_duplicate=False))
        return Projection(
            layer.where, weight, bias if bias in named and bias != weight else None, layer.out_axis, groups, exact
        )

    def _name(self, parameter: nn.Parameter) -> str:
        return self._names.get(id(parameter), "")

    def _block(self, where: str) -> str | None:
        """Return the block that a module is in."""
        inside = [name for name in self.blocks if where == name or where.startswith(f"{name}.")]
        return max(inside, key=len, default=None)


def _in_axis(layer: Layer) -> int:
    """Return the axis of a weight's inputs."""
    last = layer.weight.dim() - 1
    return last if layer.out_axis != last else last - 1


def _match(wanted: Tensor, outputs: Tensor) -> list[list[int]] | None:
    """Return for each row of numbers the places where `outputs` holds them; None if some are missing or ambiguous."""
    distance = (wanted.unsqueeze(-1) - outputs).abs()
    nearest, places = distance.min(dim=-1)
    if float(nearest.max()) > 1e-5 * max(float(outputs.abs().max()), 1e-30):
        return None
    rows: list[list[int]] = places.tolist()
    return rows if all(len(set(row)) == len(row) for row in rows) else None


def _common(names: list[str]) -> str:
    """Return the longest dotted prefix that all names share, without the last part of any."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
