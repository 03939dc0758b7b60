"""Where the tensors of a forward pass come from: products of activations, softmaxes, and what they are multiplied with.

A torch function mode sees every operation of Python code and keeps a note per tensor, by weak reference. It never
changes a result. Operations it does not know end a trail, so what is reported was followed.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from utils.adapters.capture import named_tensors
from utils.adapters.contractions import Factors, factors, first_of_many, summed
from utils.adapters.operations import (
    ADDING,
    ALMOST_NOTHING,
    BOUNDED,
    CASTS,
    CUTTING,
    JOINING,
    MASKING,
    NORMALISING,
    OPENED_MULTI_HEAD,
    REARRANGING,
    constant,
    flat,
    fused_weights,
    is_function,
    moved,
    results,
)
from utils.adapters.traces import Contraction, Layer, Product, Softmax, Trace

Report = Callable[[Contraction], None]
LayerReport = Callable[[Layer, Trace], None]


class Tracer(TorchFunctionMode):
    """Follows one forward pass and reports every sum weighted by a softmax; use it through `traced`.

    Attributes:
        running: Names of the modules that are running, the innermost last.
        batch_size: First dimension of the model's first input.
        errors: What went wrong while notes were made; the model's results are none the worse for it.
        softmaxes: Module, axis counted from the end, and shape of every softmax of something that depends on the input.
    """

    def __init__(self, report: Report, layers: LayerReport | None = None) -> None:
        """Start without knowledge.

        Args:
            report: Gets each weighted sum as it happens.
            layers: Gets each call of a linear layer and what is known about its input; without it, calls of layers
                are not noted.
        """
        super().__init__()
        self.report, self.layers = report, layers
        self.running: list[str] = []
        self.batch_size = 1
        self.errors: list[Exception] = []
        self.softmaxes: list[tuple[str, int, tuple[int, ...]]] = []
        self._traces: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @property
    def where(self) -> str:
        """Name of the module whose own code is running."""
        return self.running[-1] if self.running else ""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark the model's inputs, except masks and positions, as what everything is followed from."""
        content = {key: value for key, value in kwargs.items() if "mask" not in key and "position" not in key}
        tensors = [tensor for _, tensor in named_tensors([args, content]) if tensor.dtype != torch.bool]
        for tensor in tensors:
            self._traces[tensor] = Trace(live=True)
        self.batch_size = next((len(tensor) for tensor in tensors if tensor.dim()), 1)

    def trace(self, value: Any) -> Trace | None:
        """Return what is known about a tensor; None for constants."""
        if not isinstance(value, Tensor):
            return None
        known: Trace | None = self._traces.get(value)
        return known or (Trace(parameter=value) if isinstance(value, nn.Parameter) else None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note what its result is."""
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            with self:
                return OPENED_MULTI_HEAD(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        known = [found for value in flat(args, kwargs) if (found := self.trace(value)) is not None]
        softmaxed, describe = None, None
        # In-place operations change what is known about their first argument, so it is read before.
        with self._guarded():
            if name == "scaled_dot_product_attention" and any(trace.live for trace in known):
                softmaxed = self._fused(args, kwargs)
            describe = self._describe(name, args, kwargs, known) if known else None
        result = func(*args, **kwargs)
        if softmaxed is not None:
            self._sum_fused(softmaxed, args, kwargs)
            self._note(result, Trace(live=True, mixed=softmaxed))
        elif describe is not None:
            with self._guarded():
                for tensor in results(result):
                    self._note(tensor, describe(tensor))
        return result

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """End a trail rather than the model's forward pass when notes cannot be made."""
        try:
            yield
        except Exception as error:
            self.errors.append(error)

    def _note(self, tensor: Tensor, trace: Trace | None) -> None:
        """Keep a note; of whole numbers only whether they come from the input, of truth values nothing."""
        if trace is None or tensor.dtype == torch.bool:
            return
        real = tensor.is_floating_point() or tensor.is_complex()
        if real or trace.live:
            self._traces[tensor] = trace if real else Trace(live=True)

    def _describe(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], known: list[Trace]
    ) -> Callable[[Tensor], Trace | None]:
        """Return what to note about each result of an operation on tensors of which something is known."""
        live = any(trace.live for trace in known)
        fresh = Trace(live=live)
        first = args[0] if args else kwargs.get("input")
        trace = self.trace(first)
        if name in REARRANGING and trace is not None and isinstance(first, Tensor):
            return self._rearranged(name, first, trace, args, kwargs)
        if name in CUTTING and live and trace is not None and not trace.live:
            # Rows of a parameter that the input chooses: a table of tokens without nn.Embedding.
            return lambda tensor: fresh
        if name in CUTTING and trace is not None and isinstance(first, Tensor):
            dims = first.dim()
            cut = replace(trace, exact=False, casts=0, upcast=False, pair=None, weighted=())
            return lambda tensor: cut if tensor.dim() == dims else replace(cut, axes=None)
        if name in JOINING and isinstance(first, (list, tuple)):
            parts = [part for item in first if (part := self.trace(item)) is not None]
            main = next((part for part in parts if part.product or part.softmax), parts[0] if parts else fresh)
            joined = replace(
                main, live=live, exact=False, casts=0, upcast=False, pair=None, weighted=(),
                projected=all(part.projected for part in parts), bounded=any(part.bounded for part in parts),
            )  # fmt: skip
            return lambda tensor: joined
        if name in ("softmax", "log_softmax") and trace is not None and isinstance(first, Tensor):
            return self._softmaxed(name, first, trace, args, kwargs)
        # A product of many tensors is followed as one of two after another.
        while name == "einsum" and (many := first_of_many(args)) is not None:
            equation, (one, two, *others), rest = many
            between = torch.einsum(equation, one.detach(), two.detach())
            if (pair := factors(name, (equation, one, two), {})) is not None:
                self._note(between, self._multiplied(name, pair, {}))
            args = (rest, between, *others)
        if (pair := factors(name, args, kwargs)) is not None:
            bias = first if name in ("addmm", "baddbmm") and isinstance(first, Tensor) else None
            multiplied = self._multiplied(name, pair, kwargs, bias=bias)
            return lambda tensor: multiplied
        if name == "linear":
            return self._linear(args, kwargs, trace, live)
        if name in ("conv1d", "conv2d", "conv3d"):
            return lambda tensor: fresh
        if name in NORMALISING and trace is not None:
            normed = Trace(live=live, bounded=True, projected=trace.projected, layer=trace.layer)
            return lambda tensor: normed
        if name in ("sum", "mean", "exp") and trace is not None and isinstance(first, Tensor):
            return self._reduced(name, first, trace, args, kwargs)
        elementwise = self._elementwise(name, args, kwargs, live)
        sources = [trace.last for trace in known if trace.live]
        last = frozenset[Layer]().union(*sources)
        # The sum of two branches belongs to neither; more than two factors are no gate.
        if len(last) > 2 or (name in ADDING and any(source != last for source in sources)):
            last = frozenset()
        straight = [trace.layer for trace in known if trace.live and trace.layer is not None]
        elementwise = replace(
            elementwise,
            last=last,
            mixed=next((trace.mixed for trace in known if trace.mixed), None),
            straight=straight[0] if len(straight) == 1 else None,
        )
        return lambda tensor: elementwise

    def _rearranged(
        self, name: str, first: Tensor, trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Tensor], Trace | None]:
        """Follow the axes of a product; count casts."""
        if name in CASTS:
            target = torch.float32 if name == "float" else next(
                (value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)), None
            )  # fmt: skip
            if target is not None or name in ("type_as", "half", "bfloat16", "double"):
                casts = trace.casts + 1
                trace = replace(trace, casts=casts, upcast=casts == 1 and target == torch.float32)
        shape, stride, place = first.shape, first.stride(), first.data_ptr() if not first.is_meta else None

        def describe(tensor: Tensor) -> Trace | None:
            axes = trace.axes
            if axes is not None and tensor is not first:
                shared = place is not None and tensor.data_ptr() == place
                places = [moved(axis, shape, stride, tensor, shared) for axis in axes]
                axes = (places[0], places[1]) if places[0] is not None and places[1] is not None else None
            weighted = trace.weighted if tensor.shape == shape else ()
            # Dropout that is active even now changes weights.
            exact = trace.exact and (name != "dropout" or tensor is first or torch.equal(tensor, first))
            return replace(
                trace, axes=axes, exact=exact, weighted=weighted, pair=trace.pair if tensor.shape == shape else None
            )

        return describe

    def _softmaxed(
        self, name: str, first: Tensor, trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Tensor], Trace | None]:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(dim, int):
            # What torch does for an axis that is not given.
            dim = 0 if first.dim() in (0, 1, 3) else 1
        dim = dim - first.dim() if dim >= 0 else dim
        if not trace.live:
            return lambda tensor: Trace()

        def describe(tensor: Tensor) -> Trace | None:
            softmax = Softmax(self.where, "softmax", dim, tensor.detach(), trace)
            self.softmaxes.append((self.where, dim, tuple(tensor.shape)))
            if name == "log_softmax":
                return Trace(live=True, logarithm=softmax)
            return Trace(live=True, softmax=softmax, exact=True)

        return describe

    def _multiplied(
        self,
        name: str,
        pair: Factors,
        kwargs: dict[str, Any],
        origin: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Trace:
        """Describe a matrix product: a projection, a product of activations, or values summed with weights.

        Args:
            name: Name of the function.
            pair: What is multiplied.
            kwargs: Keyword arguments of the call.
            origin: The tensors whose views the factors are, if these are not themselves followed.
            bias: What the same call adds.
        """
        given = origin or (pair.left, pair.right)
        left, right = (self.trace(tensor) for tensor in given)
        live = any(t is not None and t.live for t in (left, right))
        if left is None or right is None:
            return Trace(live=live)
        for mine, other, tensor, letters in (
            (left, right, pair.left, pair.labels.left), (right, left, pair.right, pair.labels.right)
        ):  # fmt: skip
            if mine.softmax is not None and (other.live or other.projected) and other.softmax is None:
                axes = tuple(letters.index(c) - len(letters) for c in pair.labels.contracted)
                if axes:
                    values = given[1] if mine is left else given[0]
                    used = Contraction(mine.softmax, self.where, tensor.detach(), axes, mine.exact, False)
                    self.report(replace(used, values=values.detach(), values_layer=other.layer))
                return Trace(live=live, mixed=mine.softmax)
        operands = [trace.live or trace.projected for trace in (left, right)]
        if not all(operands):
            return self._through_layer(pair, left, right, bias)
        if left.softmax is not None or right.softmax is not None:
            return Trace(live=live)
        alpha = kwargs.get("alpha", 1.0) if name in ("baddbmm", "addmm") else 1.0
        product = Product(
            Factors(pair.left.detach(), pair.right.detach(), pair.labels),
            left.factor * right.factor,
            left.bounded or right.bounded,
            left.projected and right.projected,
            left.upcast and right.upcast,
            (left.layer, right.layer),
        )
        out = pair.labels.out
        rows, columns = pair.labels.own(True), pair.labels.own(False)
        places = (out.index(rows[-1]) - len(out), out.index(columns[-1]) - len(out)) if rows and columns else None
        return Trace(live=live, factor=float(alpha), product=product, axes=places)

    def _linear(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], trace: Trace | None, live: bool
    ) -> Callable[[Tensor], Trace | None]:
        """Note a call of a linear layer whose weight is ``(out, in)``."""
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        known = self.trace(weight)
        before = trace or Trace()

        def describe(tensor: Tensor) -> Trace | None:
            parameter = known.parameter if known is not None else None
            layer = None
            if self.layers is not None and parameter is not None and parameter.dim() > 1:
                start = (weight.storage_offset() - parameter.storage_offset()) // max(1, weight.stride(0))
                first_row = start if parameter.dim() == 2 else 0
                layer = Layer(self.where, parameter, parameter.dim() - 2, tensor.detach(), first_row)
                self.layers(layer, before)
            return Trace(live=live, projected=True, layer=layer, last=frozenset([layer]) if layer else frozenset())

        return describe

    def _through_layer(self, pair: Factors, left: Trace, right: Trace, bias: Tensor | None) -> Trace:
        """Note a product with a parameter, such as the ``(in, out)`` weight of GPT-2."""
        side, before, tensor, letters = (
            (left, right, pair.left, pair.labels.left) if right.live else (right, left, pair.right, pair.labels.right)
        )
        live = left.live or right.live
        parameter, own = side.parameter, pair.labels.own(right.live)
        layer = None
        if self.layers is not None and parameter is not None and parameter.dim() == tensor.dim() == 2 and len(own) == 1:
            stride = tensor.stride(letters.index(own))
            axis = parameter.stride().index(stride) if stride in parameter.stride() else 1
            result = torch.matmul(pair.left.detach(), pair.right.detach())
            layer = Layer(self.where, parameter, axis, result if bias is None else result + bias.detach())
            self.layers(layer, before)
        return Trace(live=live, projected=True, layer=layer, last=frozenset([layer]) if layer else frozenset())

    def _summed_pair(self, pair: tuple[Tensor, Tensor], shape: torch.Size) -> Trace:
        """Describe ``(a * b).sum(-1)``: a product of activations if each has an axis of its own."""
        return self._multiplied("einsum", summed(pair, shape), {}, pair)

    def _reduced(
        self, name: str, first: Tensor, trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Tensor], Trace | None]:
        """Describe exponentials and sums: a softmax written out, a weighted sum, a product written out."""
        if name == "exp":
            grown = Trace(live=trace.live, exponential=trace)
            if trace.logarithm is not None:
                softmax = replace(trace.logarithm, weights=first.detach().exp())
                grown = Trace(live=True, softmax=softmax, exact=True)
            return lambda tensor: grown
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = (dims,) if isinstance(dims, int) else tuple(dims) if isinstance(dims, (tuple, list)) else ()
        axes = tuple(dim - first.dim() if dim >= 0 else dim for dim in dims)
        for weights in trace.weighted if axes else ():
            known = self.trace(weights)
            if known is not None and known.softmax is not None:
                used = weights.detach().expand(first.shape)
                self.report(Contraction(known.softmax, self.where, used, axes, known.exact, True))
        result = Trace(live=trace.live)
        if trace.pair is not None and axes == (-1,) and name == "sum":
            result = self._summed_pair(trace.pair, first.shape)
        if trace.exponential is not None and len(axes) == 1:
            result = Trace(live=trace.live, normaliser=(trace, axes[0]))
        return lambda tensor: result

    def _elementwise(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], live: bool) -> Trace:
        """Describe arithmetic between a followed tensor and constants or other tensors."""
        fresh = Trace(live=live)
        if name in ("mul", "multiply", "div", "divide", "true_divide", "rmul", "imul", "itruediv", "truediv"):
            return self._scaled(args, kwargs, "div" in name or "divide" in name, fresh)
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, int, float))]
        main = self._main(values)
        if main is None:
            return fresh
        trace = self.trace(main) or fresh
        changed = replace(trace, live=live, exact=False, casts=0, upcast=False, pair=None, weighted=())
        others = [self.trace(value) for value in values if value is not main]
        if name in ADDING:
            added = [other for other in others if other is not None]
            bias = bool(added) and "sub" not in name
            projected = trace.projected and all(other.projected or not other.live for other in added)
            bounded = trace.bounded or any(other.bounded for other in added)
            return replace(changed, biased=trace.biased or bias, projected=projected, bounded=bounded)
        if name in MASKING:
            limits = [abs(v) for v in (*args[1:], *kwargs.values()) if isinstance(v, (int, float))]
            cut = name.startswith(("clamp", "clip")) and any(limit < ALMOST_NOTHING for limit in limits)
            return replace(changed, bounded=trace.bounded or cut)
        if name in BOUNDED and (trace.product is not None):
            return replace(changed, bounded=True)
        return fresh

    def _main(self, values: Iterable[Any]) -> Tensor | None:
        """Return the argument that is followed: a product or softmax first, then the larger tensor."""
        tensors = [(value, found) for value in values if (found := self.trace(value)) is not None]
        if not tensors:
            return None

        def rank(item: tuple[Tensor, Trace]) -> tuple[bool, bool, int]:
            return item[1].product is not None or item[1].softmax is not None, item[1].live, item[0].numel()

        main: Tensor = max(tensors, key=rank)[0]
        return main

    def _scaled(self, args: tuple[Any, ...], kwargs: dict[str, Any], divided: bool, fresh: Trace) -> Trace:
        """Describe a multiplication or division."""
        values = [*args, *kwargs.values()][:2]
        main = self._main(values)
        if main is None or len(values) < 2:
            return fresh
        other = values[1] if values[0] is main else values[0]
        trace, by = self.trace(main) or fresh, self.trace(other)
        if divided and values[0] is not main:
            return fresh
        if divided and by is not None and by.normaliser is not None and by.normaliser[0] is trace:
            return self._written_out(main, other, trace, by.normaliser[1])
        plain = replace(trace, live=fresh.live, casts=0, upcast=False, pair=None, weighted=())
        if by is None:
            amount = constant(other)
            if amount is None:
                # A table of constants: a mask or a rotation keeps the scale of queries and keys, but on scores it is
                # a temperature by head.
                mask = isinstance(other, Tensor) and bool(((other == 0) | (other == 1)).all())
                return replace(plain, exact=False, bounded=trace.bounded or (trace.product is not None and not mask))
            factor = trace.factor * amount if not divided else trace.factor / amount if amount else math.inf
            return replace(plain, factor=factor, exact=trace.exact and amount == 1)
        weights = tuple(v for v, t in ((main, trace), (other, by)) if t.softmax is not None)
        if not divided and weights and (len(weights) == 2 or by.live):
            values = torch.broadcast_shapes(main.shape, other.shape).numel()
            if values > min(tensor.numel() for tensor in weights):
                return Trace(live=True, weighted=weights)
        pair = (main, other) if not divided and trace.live and by.live and isinstance(other, Tensor) else None
        # A factor per vector, as of a norm, keeps the trail of a layer; one per element is an activation or a gate.
        layer = trace.layer if isinstance(other, Tensor) and other.shape[-1:] in ((), (1,)) else None
        return replace(plain, exact=False, bounded=True, pair=pair, layer=trace.layer if not by.live else layer)

    def _written_out(self, above: Tensor, below: Any, trace: Trace, dim: int) -> Trace:
        """Describe ``exp(x) / exp(x).sum(dim)``, which is a softmax."""
        assert trace.exponential is not None
        value = (above / below).detach()
        softmax = Softmax(self.where, "softmax", dim, value, trace.exponential)
        return Trace(live=True, softmax=softmax, exact=True)

    def _sum_fused(self, softmax: Softmax, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Report the weighted sum inside a fused attention."""
        values = args[2] if len(args) > 2 else kwargs["value"]
        known = self.trace(values)
        contraction = Contraction(softmax, self.where, softmax.weights, (-1,), True, False)
        self.report(replace(contraction, values=values.detach(), values_layer=known.layer if known else None))

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Softmax:
        """Recompute the weights of a fused attention from its arguments."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, mask = given["query"], given["key"], given.get("attn_mask")
        q, k, scale, weights = fused_weights(given)
        left, right = self.trace(query) or Trace(), self.trace(key) or Trace()
        letters = "abcdefgh"[: q.dim() - 2]
        pair = factors("einsum", (f"{letters}qd,{letters}kd->{letters}qk", q, k), {})
        assert pair is not None
        product = Product(
            pair, left.factor * right.factor, left.bounded or right.bounded,
            left.projected and right.projected, left.upcast and right.upcast, (left.layer, right.layer),
        )  # fmt: skip
        known = self.trace(mask) if mask is not None else None
        trace = Trace(live=True, factor=scale, product=product, axes=(-2, -1), biased=known is not None)
        return Softmax(self.where, "scaled_dot_product_attention", -1, weights, trace)


@contextmanager
def traced(module: nn.Module, report: Report, layers: LayerReport | None = None) -> Iterator[Tracer]:
    """Follow what `module` computes while the block runs.

    Kernels that run a whole layer at once are turned off meanwhile; they compute the same.

    Args:
        module: The model; its hooks are removed afterwards.
        report: Gets each sum weighted by a softmax as it happens.
        layers: Gets each call of a linear layer and what is known about its input.
    """
    tracer = Tracer(report, layers)

    def entering(name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if child is module and not tracer.running:
                tracer.begin(args, kwargs)
            tracer.running.append(name)

        return hook

    def leaving(*_: Any) -> None:
        tracer.running.pop()

    handles = []
    for name, child in module.named_modules():
        if name and is_function(child):
            continue
        handles.append(child.register_forward_pre_hook(entering(name), with_kwargs=True))
        handles.append(child.register_forward_hook(leaving, always_call=True))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with tracer:
            yield tracer
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
