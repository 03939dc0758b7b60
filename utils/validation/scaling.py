"""Does memory grow from call to call, and how does it grow with the length?

Both are answered by counting the bytes of the tensors that operators return (`utils.validation.allocations`), never by
asking the system, so that one leaked float is seen and noise is not.
"""

import functools
import gc
import math
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.adapters.model_adapter import ModelAdapter
from utils.runtime.errors import AdapterError
from utils.runtime.garbage import old_objects_aside
from utils.runtime.resources import format_bytes
from utils.runtime.seeding import seed_streams
from utils.validation.allocations import Allocations
from utils.validation.check import Budget, Finding, Outcome, Skipped
from utils.validation.probing import ModelCrash, forward_seconds, guarded, has_length
from utils.validation.watching import running_modules

LEAST_CALLS, FEW_CALLS, ENOUGH_CALLS, MANY_CALLS = 3, 9, 20, 40
"""Calls in any case, those that show what is kept at every fourth call only, and those of a model that keeps more than
after the first, on a short budget and else: bounded caches are full by then."""
LONGEST_PERIOD = 4
"""Calls from one that keeps more to the next."""
COLLECTED = 8
"""Calls between two collections of garbage, which else may look kept."""
MOST_OBJECTS, DEEPEST = 20_000, 6
NUMBERS_PER_CALL = 64
"""Plain numbers that may be added to containers in each call; fewer are a log, not a leak."""
DESCRIBED_LENGTH, PROMISED_LENGTH = 32, 2048
CALLED_LENGTH = 5
QUADRATIC_EXPONENT, QUADRATIC_SHARE = 1.5, 0.1
"""Memory counts as quadratic when the growth from the middle to the longest length, held against the growth before it,
has this exponent, or when what autograd keeps has this share of the peak in a term that is quadratic in the length."""


@old_objects_aside()
def check_memory_growth(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Call the model again and again, in eval and in train mode, and count the bytes that stay.

    Every call has other content of the same shape. A model that keeps more after a few calls than after the first is
    called up to 40 times, after which a bounded cache has stopped growing.

    Code: ``memory_growth`` (warn).
    """
    if adapter.failure is not None:
        raise AdapterError(adapter.failure)
    details: dict[str, Any] = {}
    for training in (False, True):
        mode = "train" if training else "eval"
        calls = _Calls(adapter, training)
        try:
            calls.run(LEAST_CALLS)
            calls.run(FEW_CALLS - LEAST_CALLS, budget, least=0)
        except ModelCrash:
            if not training:
                raise
            # Other checks say that it cannot be trained at this length.
            details["train_bytes"] = "it raises in train mode"
            continue
        if calls.grown():
            gc.collect()
            calls.note()
        if calls.grown():
            made = len(calls.bytes)
            calls.run(MANY_CALLS - made, budget, least=ENOUGH_CALLS - made)
            gc.collect()
            calls.note()
        details[f"{mode}_bytes"] = calls.bytes
        per_call = calls.per_call()
        if not per_call:
            continue
        where, kept = calls.holder()
        message = (
            f"each call in {mode} mode keeps {per_call} more on average: "
            f"{format_bytes(calls.bytes[0])} after the first, {format_bytes(calls.bytes[-1])} after "
            f"{len(calls.bytes)}{kept}"
        )
        hint = (
            "Do not store outputs, hidden states or losses on the model; where they are needed, store .detach() of"
            " them in a container that is cleared or bounded, such as deque(maxlen=100)."
        )
        finding = Finding("memory_growth", "warn", where or adapter.name, message, hint, _growth_lines(adapter))
        return Outcome(per_call, "0 B", message, [finding], details)
    why = f"no more memory is kept after {FEW_CALLS} calls in each mode than after 1"
    return Outcome("0 B", "0 B", why, (), details)


class _Calls:
    """Repeated calls of a model, and what is left after each.

    Attributes:
        bytes: Bytes alive after each call.
    """

    def __init__(self, adapter: ModelAdapter, training: bool) -> None:
        self.adapter, self.training = adapter, training
        self.bytes: list[int] = []
        self.numbers: list[int] = []
        longest = adapter.max_length.value or CALLED_LENGTH
        self._length = adapter.legal_length(min(CALLED_LENGTH, longest)) if has_length(adapter) else None
        self._middle = 0
        self._tracker: Allocations | None = None

    def run(self, count: int, budget: Budget | None = None, least: int = 0) -> None:
        """Call the model so many times, or `least` times if the budget ends."""
        adapter = self.adapter
        adapter.module.train(self.training)
        with running_modules(adapter.module) as running:
            if self._tracker is None:
                self._tracker = Allocations(adapter.module)
            self._tracker.running = running
            for index in range(count):
                if budget is not None and index >= least and not budget.afford(0.05, "fewer repeated calls"):
                    break
                if index == count // 2:
                    self._middle = self._tracker.count
                if len(self.bytes) > FEW_CALLS and len(self.bytes) % COLLECTED == 0:
                    gc.collect()
                self._call(len(self.bytes))
                self.note(append=True)

    def _call(self, index: int) -> None:
        inputs = self.adapter.example_inputs(2, self._length, seed=index)
        call = self.adapter.forward_in_training if self.training else self.adapter.forward
        seed_streams(index, "forward")
        assert self._tracker is not None
        with torch.set_grad_enabled(self.training), self._tracker:
            guarded(self.adapter, inputs, "", functools.partial(call, inputs))

    def note(self, append: bool = False) -> None:
        """Count what is left, anew or for the last call again."""
        assert self._tracker is not None
        now = self._tracker.current, sum(1 for _ in _plain_numbers(self.adapter.module))
        for values, value in zip((self.bytes, self.numbers), now, strict=True):
            if append:
                values.append(value)
            else:
                values[-1] = value

    def grown(self) -> bool:
        """Tell whether more is left than after the first call."""
        return any(values[-1] > values[0] for values in (self.bytes, self.numbers))

    def per_call(self) -> str:
        """Return how much each call keeps in the long run, in words; empty for nothing."""
        half, quarter = len(self.bytes) // 2, len(self.bytes) // 4
        if len(self.bytes) <= LEAST_CALLS:
            return ""
        for values, least in ((self.bytes, 1), (self.numbers, NUMBERS_PER_CALL)):
            late = values[half:]
            rate = (late[-1] - late[0]) / (len(late) - 1)
            # What is cleared now and then comes back to where it was.
            rising = min(values[-quarter:]) > max(values[quarter:half], default=0)
            if rising and rate >= least and _periodic(late):
                return format_bytes(rate) if values is self.bytes else f"{rate:.0f} numbers"
        return ""

    def holder(self) -> tuple[str, str]:
        """Return the module that holds on to what stayed, and in what; else the one that made most of it."""
        assert self._tracker is not None
        fresh = self._tracker.addresses(since=self._middle)
        for name, child, attribute in _reachable(self.adapter.module, fresh):
            return name or type(child).__name__, f", in {attribute}"
        made = self._tracker.makers(fresh)
        if made:
            return made.most_common(1)[0][0], ""
        counts = Counter(_plain_numbers(self.adapter.module))
        return (counts.most_common(1)[0][0] if counts else ""), ""


def _periodic(values: list[int]) -> bool:
    """Tell whether numbers grow in nearly every period, of one step or of a few."""
    for period in range(1, LONGEST_PERIOD + 1):
        steps = [b - a for a, b in pairwise(values[::period])]
        if len(steps) >= min(period, 3) and sum(step > 0 for step in steps) > 0.8 * len(steps):
            return True
    return False


def _plain_numbers(module: nn.Module) -> Iterator[str]:
    """Yield a module's name for every number inside the lists, dicts and sets that it holds."""
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if not key.startswith("_") or key.strip("_") not in INTERNAL:
                for item in _walk(value, deep_objects=False):
                    if isinstance(item, (int, float)) and not isinstance(item, bool) and item is not value:
                        yield name


INTERNAL = frozenset(key.strip("_") for key in vars(nn.Module()) if key.startswith("_"))


def _reachable(module: nn.Module, addresses: set[int]) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the modules from which tensors at these addresses can be reached, by their attributes first."""
    children = list(module.named_modules())
    for name, child in children:
        for key, value in {**vars(child), **child._buffers}.items():
            if key not in ("_parameters", "_modules", "_buffers") and _holds(value, addresses):
                yield name, child, f"`{key.lstrip('_') if key.strip('_') in INTERNAL else key}`"
    # Lists shared by a class, hidden in a default argument or global: the innermost module of that code is named.
    for name, child in reversed(children):
        kind = type(child)
        if kind.__module__.startswith("torch."):
            continue
        for key, value in vars(kind).items():
            if _holds(value, addresses):
                yield name, child, f"`{kind.__name__}.{key}`"
    for name, child in reversed(children):
        code = getattr(type(child).forward, "__code__", None)
        spaces = getattr(type(child).forward, "__globals__", {})
        for key in code.co_names if code is not None else ():
            if isinstance(value := spaces.get(key), (list, dict, set, deque, Tensor)) and _holds(value, addresses):
                yield name, child, f"the global `{key}`"


def _holds(value: Any, addresses: set[int]) -> bool:
    """Tell whether a tensor or array at one of these addresses is inside a value."""
    for item in _walk(value):
        if isinstance(item, Tensor) and item.layout == torch.strided:
            if item.device.type != "meta" and item.untyped_storage().data_ptr() in addresses:
                return True
        elif isinstance(item, np.ndarray) and item.__array_interface__["data"][0] in addresses:
            return True
    return False


def _walk(value: Any, deep_objects: bool = True) -> Iterator[Any]:
    """Yield a value and all that is inside it: containers, functions' closures and defaults, attributes of objects."""
    waiting = deque([(value, 0)])
    seen: dict[int, Any] = {}
    while waiting and len(seen) < MOST_OBJECTS:
        item, depth = waiting.popleft()
        if isinstance(item, (int, float, Tensor, np.ndarray)):
            yield item
            continue
        if id(item) in seen or depth > DEEPEST or isinstance(item, (str, bytes, nn.Module, type, types.ModuleType)):
            continue
        seen[id(item)] = item
        if isinstance(item, Mapping):
            inside = list(item.values())
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            inside = list(item)
        elif not deep_objects:
            continue
        elif isinstance(item, types.FunctionType):
            cells = [cell.cell_contents for cell in item.__closure__ or () if cell != types.CellType()]
            inside = [*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
        else:
            inside = list(getattr(item, "__dict__", {}).values())
        waiting.extend((part, depth + 1) for part in inside)


def _growth_lines(adapter: ModelAdapter) -> str:
    """Return code that shows the growth."""
    return (
        f"import gc, torch; x = {example_code(adapter)}\n"
        "alive = lambda: sum(type(item) is torch.Tensor for item in gc.get_objects())\n"
        "print([alive() for _ in range(5) if model(x) is not None])"
    )


def example_code(adapter: ModelAdapter) -> str:
    """Return Python that makes an input of the shape that the model takes."""
    main = adapter.example_inputs(2)[adapter.main_input]
    if main.is_floating_point():
        return f"torch.randn{tuple(main.shape)}"
    return f"torch.randint({adapter.readable_ids()}, {tuple(main.shape)})"


def check_memory_scaling(adapter: ModelAdapter, budget: Budget) -> Outcome:
    """Measure the peak of live tensors of a forward pass that records for training, at three lengths.

    Without a promise of linear memory (``ModelSpec.linear_memory``) the growth is described and not judged.

    Code: ``quadratic_memory`` (warn).
    """
    promised = bool(adapter.spec.linear_memory)
    if not has_length(adapter) and not (promised and _stretchable(adapter)):
        raise Skipped("the input has no length that could be chosen")
    lengths = _lengths(adapter, budget, PROMISED_LENGTH if promised else DESCRIBED_LENGTH)
    if len(set(lengths)) < 3:
        raise Skipped(f"three different lengths are needed, and only {sorted(set(lengths))} are legal")
    runs = [_measure(adapter, length) for length in lengths]
    peaks = [run.peak for run in runs]
    first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
    exponent = math.log2(second / first) if first > 0 and second > 0 else 0.0
    by_module = _quadratic_bytes(runs, lengths)
    share = sum(by_module.values()) / max(peaks[2], 1)
    details = {"lengths": lengths, "peak_bytes": peaks, "exponent": exponent, "quadratic_share": share,
               "promised_linear": promised}  # fmt: skip
    text = ", ".join(f"{format_bytes(peak)} at {length}" for peak, length in zip(peaks, lengths, strict=True))
    why = f"peak of live tensors {text}; growth exponent {exponent:.2f}"
    quadratic = exponent > QUADRATIC_EXPONENT or share > QUADRATIC_SHARE
    if not (promised and quadratic):
        why += "" if promised or not quadratic else ", quadratic in part (no promise of linear memory was made)"
        return Outcome(exponent, QUADRATIC_EXPONENT if promised else None, why, (), details)
    where = by_module.most_common(1)[0][0] if by_module else ""
    message = (
        f"peak of live tensors {text}: growth exponent {exponent:.2f}, {share:.0%} of it in tensors "
        "that grow with the square of the length, though linear memory was promised"
    )
    hint = (
        "Use scaled_dot_product_attention without an explicit mask, attention within windows or chunks, or a"
        " recurrence; and make no (length, length) masks or biases."
    )
    finding = Finding("quadratic_memory", "warn", where or adapter.name, message, hint)
    return Outcome(exponent, QUADRATIC_EXPONENT, message, [finding], details)


@dataclass(frozen=True)
class _Run:
    """What one forward pass needed: most bytes at once, and bytes kept for the backward pass by module."""

    peak: int
    kept: Counter[str]


def _stretchable(adapter: ModelAdapter) -> bool:
    """Tell whether the input is a sequence of feature vectors ``(batch, time, width)``."""
    return adapter.modality == "features" and adapter.example_inputs(1)[adapter.main_input].dim() == 3


def _lengths(adapter: ModelAdapter, budget: Budget, top: int) -> list[int]:
    """Return a length that fits the budget, its half and its quarter, the shortest first."""
    if not has_length(adapter):
        return [top // 16, top // 8, top // 4]
    top = min(top, adapter.max_length.value or top)
    reference = adapter.legal_length(min(32, top))
    seconds = forward_seconds(adapter, reference) if budget.remaining() else math.inf
    wanted = top
    # Three lengths cost twice the longest, and recording as much again.
    while top > 64 and 4 * seconds * top / reference > budget.remaining():
        top //= 2
    if top < wanted:
        budget.reduced.append(f"memory measured up to length {top}, not {wanted}")
    return [adapter.legal_length(max(1, top // part)) for part in (4, 2, 1)]


def _measure(adapter: ModelAdapter, length: int) -> _Run:
    """Run one forward pass that records for autograd."""
    if has_length(adapter):
        inputs = adapter.example_inputs(1, length)
    else:
        inputs = adapter.example_inputs(1)
        main = inputs[adapter.main_input]
        inputs = {**inputs, adapter.main_input: main.repeat(1, -(-length // main.shape[1]), 1)[:, :length]}
    seed_streams(0, "forward")
    with running_modules(adapter.module) as running, torch.enable_grad():
        tracker = Allocations(adapter.module, inputs.values(), running)
        call: Callable[[], Any] = functools.partial(adapter.forward, inputs)
        with tracker:
            result = guarded(adapter, inputs, "", call)
        run = _Run(tracker.peak, tracker.makers(tracker.addresses()))
        del result
    return run


def _quadratic_bytes(runs: list[_Run], lengths: list[int]) -> Counter[str]:
    """Return by module the bytes of its kept tensors at the longest length that grow with the square of the length.

    The second divided difference of three points is the coefficient of the square.
    """
    found = Counter[str]()
    (x0, x1, x2), last = lengths, runs[2].kept
    for where in last:
        y0, y1, y2 = (run.kept[where] for run in runs)
        square = ((y2 - y1) / (x2 - x1) - (y1 - y0) / (x1 - x0)) / (x2 - x0)
        found[where] = max(0, round(square * x2**2))
    return found
