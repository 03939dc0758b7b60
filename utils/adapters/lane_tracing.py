"""Follows lanes (channels, features) through one forward pass, from the axes of parameters to each other.

A torch function mode sees every operation of Python code, moves the labels of `utils.adapters.lane_labels` along and
changes no result. What it does not understand makes the lanes that it touches fixed, with the operation's name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from utils.adapters.capture import named_tensors, unfused_attention
from utils.adapters.contractions import MATRIX_PRODUCTS
from utils.adapters.lane_labels import UNKNOWN, Operand, Slots, joined, merged, varying
from utils.adapters.lane_norms import Node, invariance
from utils.adapters.lane_notes import Note, Statistic, operand, without
from utils.adapters.lane_operations import (
    CUTTING,
    ELEMENTWISE,
    FACTORIES,
    LEAVING,
    MEANS,
    MOVING,
    POOLING,
    REDUCING,
    SHAPING,
    SOFTMAXES,
    axes_of,
    given_arguments,
    tensors_in,
)
from utils.adapters.lane_weights import WeightOperations
from utils.adapters.operations import OPENED_MULTI_HEAD, constant, results
from utils.runtime.dispatch import OperatorMode


class LaneTracer(TorchFunctionMode):
    """Follows one forward pass; use it through `lanes_followed`.

    Attributes:
        slots: What was found.
        norms: Lanes across which a norm takes statistics, name of its module ("" for inline code), and its kind.
        parts: Lanes of the parts that one `chunk` makes; they can only grow together.
        used: Names of the parameters and buffers that took part.
        inside: A function is running that was seen, so that the operators in it are no secret.
        running: Modules that are running, the innermost last: name, and whether it has no parts.
    """

    def __init__(self, module: nn.Module) -> None:
        """Know the names of a model's tensors and nothing else."""
        super().__init__()
        self.slots = Slots()
        self.norms: list[tuple[Tensor, str, str]] = []
        self.parts: list[list[Tensor]] = []
        self.used: set[str] = set()
        self.inside = False
        self.running: list[tuple[str, bool]] = []
        # Of a tied tensor, the first name counts.
        self._names: dict[int, str] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._names.setdefault(id(tensor), name)
        self._notes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._weights = WeightOperations(self.slots, self._note, self._notes.__setitem__)
        self._pending: dict[Statistic, bool] = {}
        self._written: set[int] = set()
        self._made = 0

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark the model's inputs."""
        for _, tensor in named_tensors([args, kwargs]):
            self._notes[tensor] = Note(live=True)

    def finish(self, output: Tensor) -> None:
        """Fix what the model returns and what was never understood."""
        note = self._note(output)
        for one in note.labels:
            self.slots.fix(one, "it is the model's output")
        self._spoil(note, "the model's output")
        for statistic, waiting in self._pending.items():
            if waiting:
                reason = f"`{statistic.name}` is taken across its lanes, and not as part of a norm"
                self.slots.fix(statistic.labels, reason)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and follow it."""
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            with self:
                return OPENED_MULTI_HEAD(*args, **kwargs)
        before, self.inside = self.inside, True
        try:
            return self._run(func, args, kwargs)
        finally:
            self.inside = before

    def hidden(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        """Take in an operator that no function call announced, as in scripted code: it is not followed.

        Args:
            name: The operator.
            given: Its tensors.
            made: Its results.
        """
        notes = [self._note(tensor) for tensor in given]
        self._unknown(name, given, notes)
        if any(note.live for note in notes):
            for tensor in made:
                self._made += 1
                self._notes[tensor] = Note(live=True, node=Node(self._made, None))

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and note what its result is."""
        name = getattr(func, "__name__", "").strip("_")
        given = tensors_in((args, kwargs))
        # In-place operations change what is known about their first argument, so it is read before.
        notes = [self._note(tensor) for tensor in given]
        values = {id(tensor): self._uniform(tensor) for tensor in given if name in ELEMENTWISE}
        result = func(*args, **kwargs)
        made = results(result)
        if getattr(func, "__name__", "").endswith(("_", "setitem__")) and any(note.live for note in notes):
            # What is written into a part of a tensor is in the whole of it.
            self._written.add(_place(given[0]))
        if not made:
            if name in LEAVING:
                self._unknown(name, given, notes)
            return result
        self.used.update(own for tensor in given if (own := self._names.get(id(tensor))) is not None)
        if name in FACTORIES or not notes or not any(note.live or note.labels for note in notes):
            return result
        try:
            found = self._describe(name, func, args, kwargs, given, notes, values, result)
        except Exception:
            # What cannot be noted is not followed; the model runs on.
            found = None
        if found is None or len(found) != len(made):
            self._unknown(name, given, notes)
            found = [Note(any(note.live for note in notes)) for _ in made]
        inplace = bool(given) and any(tensor is given[0] for tensor in made)
        for place, (tensor, note) in enumerate(zip(made, found, strict=True)):
            self._made += 1
            call = None if inplace or not note.live else (func, args, kwargs)
            self._notes[tensor] = replace(note, node=Node(self._made, call, place))
            if note.statistics and call is not None:
                self._resolve(tensor)
        return result

    def _note(self, tensor: Tensor) -> Note:
        """Return what is known about a tensor; parameters and buffers are labelled at their first use."""
        known: Note | None = self._notes.get(tensor)
        if known is None:
            known = Note(live=_place(tensor) in self._written)
            if (name := self._names.get(id(tensor))) is not None and tensor.is_floating_point():
                known = Note(live=False, labels=self.slots.add(name, tuple(tensor.shape)))
                self._notes[tensor] = known
        return known

    def _uniform(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is one number everywhere and will be: nothing learned or computed."""
        followed = id(tensor) in self._names or tensor in self._notes or _place(tensor) in self._written
        return not followed and constant(tensor) is not None

    def _unknown(self, name: str, given: list[Tensor], notes: list[Note]) -> None:
        """Fix every lane that an operation touches which is not understood."""
        for note in notes:
            for one in note.labels:
                self.slots.fix(one, f"`{name}` touches it, an operation that is not followed")
            self._spoil(note, f"`{name}`")

    def _spoil(self, note: Note, use: str) -> None:
        """Fix the lanes of statistics that are used by something that is no norm."""
        for statistic in note.statistics:
            self.slots.fix(statistic.labels, f"`{statistic.name}` is taken across its lanes and used by {use}")

    def _describe(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        notes: list[Note],
        values: dict[int, bool],
        result: Any,
    ) -> list[Note] | None:
        """Return what to note about each result; None for operations that are not understood."""
        live = any(note.live for note in notes)
        made = results(result)
        statistics = tuple(dict.fromkeys(s for note in notes for s in note.statistics))
        plain = Note(live, statistics=statistics)
        if name in SHAPING or name in MOVING or name in CUTTING or (name == "get" and given[0].dim() == made[0].dim()):
            return self._moved(name, func, args, kwargs, given, notes, result)
        if name in ("cat", "concat", "concatenate", "stack"):
            return [replace(plain, labels=self._joined_along(name, args, kwargs, given, notes, made[0]))]
        if name in ELEMENTWISE or (name in ("max", "min") and len(given) == 2):
            if any(tensor.shape != torch.broadcast_shapes(*(one.shape for one in given)) for tensor in made):
                return None
            operands = [
                operand(tensor, note, uniform=values.get(id(tensor), False))
                for tensor, note in zip(given, notes, strict=True)
            ]
            labels = joined(self.slots, operands)
            if live:
                for note in notes:
                    if not note.live:
                        self.slots.play(note.labels, "pointwise")
            return [replace(plain, labels=labels) for _ in made]
        if name in REDUCING:
            return self._reduced(name, args, kwargs, given[0], notes[0], plain, made)
        if name in ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"):
            for note in notes:
                self._spoil(note, f"`{name}`")
            return [self._normed(name, args, kwargs, made[0])]
        for note in notes:
            self._spoil(note, f"`{name}`")
        if name in SOFTMAXES:
            dims = axes_of(name, args, kwargs, given[0].dim())
            for one in notes[0].labels:
                if varying(one) & dims:
                    self.slots.fix(one, f"`{name}` runs over its lanes")
            return [Note(live, notes[0].labels)]
        if name in POOLING:
            lead = given[0].dim() - POOLING[name] if POOLING[name] else 2
            return [
                Note(live, without(self.slots, notes[0].labels, frozenset(range(lead, given[0].dim())), name))
            ] * len(made)
        if name == "pad":
            pads = args[1] if len(args) > 1 else kwargs["pad"]
            padded = frozenset(given[0].dim() - 1 - place // 2 for place, amount in enumerate(pads) if amount)
            return [Note(live, without(self.slots, notes[0].labels, padded, name))]
        if name == "glu":
            dim = axes_of(name, args, kwargs, given[0].dim())
            halves = [one.expand(given[0].shape).chunk(2, *dim) for one in notes[0].labels]
            both = [Operand(tuple(made[0].shape), self._compressed([h[i] for h in halves]), live) for i in (0, 1)]
            return [Note(live, joined(self.slots, both))]
        found = self._weights.labels(name, args, kwargs, made[0])
        return None if found is None else [Note(live or name not in MATRIX_PRODUCTS, found)]

    def _compressed(self, labels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.slots.compressed(one) for one in labels)

    def _moved(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        notes: list[Note],
        result: Any,
    ) -> list[Note] | None:
        """Move labels as the operation moves numbers; notice cuts and splits."""
        tensor, note = given[0], notes[0]
        if not args or args[0] is not tensor:
            return None
        for other in notes[1:]:
            if other.labels and name not in ("expand_as", "view_as", "reshape_as", "type_as", "broadcast_to"):
                return None
        made = results(result)
        found: list[list[Tensor]] = [[] for _ in made]
        for one in note.labels:
            whole = one.expand(tensor.shape)
            if name in SHAPING:
                parts = [whole.reshape(made[0].shape)]
            else:
                rest = [value.cpu() if isinstance(value, Tensor) else value for value in args[1:]]
                parts = results(func(whole.clone() if name == "get" else whole, *rest, **kwargs))
            if len(parts) != len(made) or any(p.shape != m.shape for p, m in zip(parts, made, strict=True)):
                return None
            small = self._compressed(parts)
            if name in SHAPING and len(varying(small[0])) > len(varying(self.slots.compressed(one))):
                sizes = ", ".join(str(made[0].shape[axis]) for axis in sorted(varying(small[0])))
                self.slots.fix(one, f"split into ({sizes})")
            if name in CUTTING:
                self._cut(name, one, small)
            for place, part in zip(found, small, strict=True):
                place.append(part)
        return [
            Note(note.live, merged(self.slots, place) if len(place) > 1 else tuple(place), note.statistics)
            for place in found
        ]

    def _cut(self, name: str, labels: Tensor, parts: Sequence[Tensor]) -> None:
        """Fix lanes of which an operation keeps a part, unless `chunk` makes parts that can grow alike."""
        before = self.slots.compressed(labels)
        if all(self.slots.same(part, before) for part in parts):
            return
        if name == "chunk" and len({part.numel() for part in parts}) == 1:
            self.parts.append(list(parts))
        else:
            self.slots.fix(labels, f"cut by `{name}` at places that the code computes")

    def _joined_along(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        notes: list[Note],
        made: Tensor,
    ) -> tuple[Tensor, ...]:
        """Label what `cat` or `stack` makes: along other axes than the joined one, parts have the same lanes."""
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)) % made.dim()
        parts = []
        for tensor, note in zip(given, notes, strict=True):
            shape = (*tensor.shape[:dim], 1, *tensor.shape[dim:]) if name == "stack" else tuple(tensor.shape)
            labels = tuple(one.unsqueeze(dim) if name == "stack" else one for one in note.labels)
            if tensor.numel():
                parts.append(Operand(shape, labels, note.live))
        across = [replace(part, labels=tuple(o for o in part.labels if dim not in varying(o))) for part in parts]
        kept = list(joined(self.slots, across))
        kinds = {varying(one) for part in parts for one in part.labels if dim in varying(one)}
        for kind in kinds:
            pieces = []
            for part in parts:
                one = next((o for o in part.labels if varying(o) == kind), None)
                sizes = [made.shape[a] if a in kind else 1 for a in range(made.dim())]
                sizes[dim] = part.shape[dim]
                pieces.append(torch.zeros(sizes, dtype=torch.long) if one is None else one.expand(sizes))
            kept.append(torch.cat(pieces, dim))
        return merged(self.slots, kept)

    def _reduced(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensor: Tensor,
        note: Note,
        plain: Note,
        made: list[Tensor],
    ) -> list[Note]:
        """Label what a mean, sum or the like leaves; keep in mind what it takes across lanes."""
        dims = axes_of(name, args, kwargs, tensor.dim())
        kept, statistics = [], list(plain.statistics)
        for one in note.labels:
            over = varying(one) & dims
            if not over:
                same = made[0].dim() == tensor.dim()
                index = tuple(0 if a in dims and not same else slice(None) for a in range(one.dim()))
                kept.append(one[index])
            elif name in MEANS and note.live:
                statistics.append(Statistic(one, self._made + 1, name, over != varying(one)))
                self._pending[statistics[-1]] = True
            else:
                self.slots.fix(one, f"`{name}` runs over its lanes")
        labels = tuple(kept)
        return [Note(note.live, labels, tuple(statistics)) for _ in made]

    def _normed(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], made: Tensor) -> Note:
        """Label the result of one of torch's norms."""
        given = given_arguments(name, args, kwargs)
        tensor: Tensor = given["input"]
        note = self._note(tensor)
        operands, dims = [operand(tensor, note)], tensor.dim()
        channels = [tensor.shape[1] if axis == 1 else 1 for axis in range(dims)] if dims > 1 else list(tensor.shape)
        for key in ("weight", "bias", "running_mean", "running_var"):
            if (value := given.get(key)) is not None:
                shape = list(value.shape) if name in ("layer_norm", "rms_norm") else channels
                own = self._note(value)
                labels = tuple(one.reshape(shape) for one in own.labels)
                operands.append(Operand(tuple(shape), labels))
                self.slots.play(labels, "pointwise")
        labels = joined(self.slots, operands)
        groups = given.get("num_groups", 0)
        first = 2
        if "normalized_shape" in given:
            first = dims - len(given["normalized_shape"])
        elif name == "group_norm" and groups < tensor.shape[1]:
            first = 1
        over = frozenset(range(first, dims))
        statistics = []
        for one in note.labels:
            if not varying(one) & over:
                continue
            if groups > 1:
                self.slots.fix(one, f"`{name}` takes statistics over {groups} groups of its lanes")
            partial = groups > 1 or not varying(one) <= over
            statistics.append(Statistic(one, self._made + 1, name, partial))
            self._pending[statistics[-1]] = True
        return Note(note.live, labels, tuple(statistics))

    def _resolve(self, tensor: Tensor) -> None:
        """Tell whether a tensor is the result of a norm, by what it does to scaled and shifted lanes."""
        note = self._notes[tensor]
        if not note.labels:
            return
        found = invariance(tensor, min(s.order for s in note.statistics), self._node)
        if found is None:
            return
        kind, base = found
        # Numbers that are divided by a statistic of other lanes than their own are not normalised by it.
        for labels in (note.labels, self._note(base).labels):
            known = {lane for one in labels for lane in self.slots.roots(one).ravel().tolist()}
            if any(not known.issuperset(self.slots.roots(s.labels).ravel().tolist()) for s in note.statistics):
                return
        name, leaf = self.running[-1] if self.running else ("", False)
        for statistic in note.statistics:
            self._pending[statistic] = False
        for statistic in note.statistics:
            if bool((statistic.labels == UNKNOWN).any()):
                self.slots.fix(statistic.labels, f"`{statistic.name}` is taken across it and numbers that are no lanes")
        # Of mean and variance of one norm, the first tells which lanes; several axes give several.
        seen: list[Tensor] = []
        for statistic in note.statistics:
            if not any(self.slots.same(statistic.labels, other) for other in seen):
                seen.append(statistic.labels)
                self.norms.append((statistic.labels, name if leaf else "", "group" if statistic.partial else kind))
        note.statistics = ()

    def _node(self, tensor: Tensor) -> Node | None:
        """Return how a tensor was made, if it depends on the input."""
        note: Note | None = self._notes.get(tensor)
        return note.node if note is not None and note.live else None


class _Watch(OperatorMode):
    """Tells a tracer of operators that no function call announced."""

    def __init__(self, tracer: LaneTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # The operator itself would be announced to the tracer as a function.
        with torch._C.DisableTorchFunction():
            made = func(*args, **kwargs)
        if not self.tracer.inside:
            name = func.overloadpacket.__name__.partition(".")[0]
            with torch._C.DisableTorchFunction():
                self.tracer.hidden(name, tensors_in((args, kwargs)), results(made))
        return made


def _place(tensor: Tensor) -> int:
    """Return where a tensor's storage is; 0 if it has none of its own."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if plain else 0


@contextmanager
def lanes_followed(module: nn.Module) -> Iterator[LaneTracer]:
    """Follow what `module` computes while the block runs; call `LaneTracer.finish` with its output in it.

    Kernels that run a whole layer at once are turned off meanwhile; they compute the same.

    Args:
        module: The model; its hooks are removed afterwards.
    """
    tracer = LaneTracer(module)

    def entering(name: str, leaf: bool) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if child is module and not tracer.running:
                tracer.begin(args, kwargs)
            tracer.running.append((name, leaf))

        return hook

    def leaving(*_: Any) -> None:
        tracer.running.pop()

    handles = []
    for name, child in module.named_modules():
        leaf = bool(name) and next(child.children(), None) is None
        handles.append(child.register_forward_pre_hook(entering(name, leaf), with_kwargs=True))
        handles.append(child.register_forward_hook(leaving, always_call=True))
    try:
        with unfused_attention(), _Watch(tracer), tracer:
            yield tracer
    finally:
        for handle in handles:
            handle.remove()
